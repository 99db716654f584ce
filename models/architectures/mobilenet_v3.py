"""MobileNetV3 small and large with stochastic depth, under torchvision's weight names."""

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import (  # pyright: ignore[reportMissingTypeStubs]
    InvertedResidual,
    InvertedResidualConfig,
    MobileNetV3,
)

from models.noise.stochastic_depth import StochasticDepth

# (kernel, expanded channels, output channels, squeeze-excite, activation, stride) of every block;
# the stem has 16 channels. Source: Howard et al. 2019, tables 1 and 2.
_STEM_CHANNELS = 16
_Block = tuple[int, int, int, bool, Literal["RE", "HS"], int]
_PUBLISHED: dict[str, tuple[int, tuple[_Block, ...]]] = {
    "small": (
        1024,
        (
            (3, 16, 16, True, "RE", 2),
            (3, 72, 24, False, "RE", 2),
            (3, 88, 24, False, "RE", 1),
            (5, 96, 40, True, "HS", 2),
            (5, 240, 40, True, "HS", 1),
            (5, 240, 40, True, "HS", 1),
            (5, 120, 48, True, "HS", 1),
            (5, 144, 48, True, "HS", 1),
            (5, 288, 96, True, "HS", 2),
            (5, 576, 96, True, "HS", 1),
            (5, 576, 96, True, "HS", 1),
        ),
    ),
    "large": (
        1280,
        (
            (3, 16, 16, False, "RE", 1),
            (3, 64, 24, False, "RE", 2),
            (3, 72, 24, False, "RE", 1),
            (5, 72, 40, True, "RE", 2),
            (5, 120, 40, True, "RE", 1),
            (5, 120, 40, True, "RE", 1),
            (3, 240, 80, False, "HS", 2),
            (3, 200, 80, False, "HS", 1),
            (3, 184, 80, False, "HS", 1),
            (3, 184, 80, False, "HS", 1),
            (3, 480, 112, True, "HS", 1),
            (3, 672, 112, True, "HS", 1),
            (5, 672, 160, True, "HS", 2),
            (5, 960, 160, True, "HS", 1),
            (5, 960, 160, True, "HS", 1),
        ),
    ),
}


class MobileNetV3Config(BaseModel):
    """A MobileNetV3; weights exchange with torchvision's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mobilenet_v3"] = "mobilenet_v3"
    name: Literal["small", "large"] = Field(default="large", description="Size of the network.")


class _InvertedResidual(InvertedResidual):
    """torchvision's block, whose residual branch can be dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Blocks without an identity count, too, as in EfficientNet, but drop nothing.
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, input: Tensor) -> Tensor:
        out = cast(Tensor, self.block(input))
        return input + self.stochastic_depth(out) if self.use_res_connect else out


def build_mobilenet_v3(
    config: MobileNetV3Config, num_classes: int, *, dropout: float
) -> MobileNetV3:
    """Return the network with fresh weights."""
    last_channel, published = _PUBLISHED[config.name]
    blocks: list[InvertedResidualConfig] = []
    channels = _STEM_CHANNELS
    for kernel, expanded, out_channels, use_se, activation, stride in published:
        blocks.append(
            InvertedResidualConfig(
                channels, kernel, expanded, out_channels, use_se, activation, stride, 1, 1.0
            )
        )
        channels = out_channels
    network = MobileNetV3(
        blocks, last_channel, num_classes, block=_InvertedResidual, dropout=dropout
    )
    # torchvision's works in place, which a tensor that others hold (a hook's) would not survive.
    network.classifier[2] = nn.Dropout(dropout)
    return network
