"""EfficientNetV2 S, M and L: faster to train than the first family at the same accuracy."""

from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torchvision.models.efficientnet import (  # pyright: ignore[reportMissingTypeStubs]
    EfficientNet,
    FusedMBConvConfig,
    MBConvConfig,
)

_BATCH_NORM_EPS = 1e-3
_LAST_CHANNEL = 1280

# (kind, expansion, stride, input channels, output channels, layers) of every stage, kernel 3.
# Source: Tan and Le 2021, table 4; torchvision efficientnet.py.
_Stage = tuple[Literal["fused", "mb"], int, int, int, int, int]
_PUBLISHED: dict[str, tuple[_Stage, ...]] = {
    "s": (
        ("fused", 1, 1, 24, 24, 2),
        ("fused", 4, 2, 24, 48, 4),
        ("fused", 4, 2, 48, 64, 4),
        ("mb", 4, 2, 64, 128, 6),
        ("mb", 6, 1, 128, 160, 9),
        ("mb", 6, 2, 160, 256, 15),
    ),
    "m": (
        ("fused", 1, 1, 24, 24, 3),
        ("fused", 4, 2, 24, 48, 5),
        ("fused", 4, 2, 48, 80, 5),
        ("mb", 4, 2, 80, 160, 7),
        ("mb", 6, 1, 160, 176, 14),
        ("mb", 6, 2, 176, 304, 18),
        ("mb", 6, 1, 304, 512, 5),
    ),
    "l": (
        ("fused", 1, 1, 32, 32, 4),
        ("fused", 4, 2, 32, 64, 7),
        ("fused", 4, 2, 64, 96, 7),
        ("mb", 4, 2, 96, 192, 10),
        ("mb", 6, 1, 192, 224, 19),
        ("mb", 6, 2, 224, 384, 25),
        ("mb", 6, 1, 384, 640, 7),
    ),
}


class EfficientNetV2Config(BaseModel):
    """An EfficientNetV2; weights exchange with torchvision's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["efficientnet_v2"] = "efficientnet_v2"
    name: Literal["s", "m", "l"] = Field(default="s", description="Size of the network.")
    batch_norm_momentum: float = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="Share of the new batch in the running statistics.",
    )


def build_efficientnet_v2(
    config: EfficientNetV2Config, num_classes: int, *, dropout: float
) -> EfficientNet:
    """Return the network with fresh weights; its weight names are torchvision's."""
    stages = [
        (FusedMBConvConfig if kind == "fused" else MBConvConfig)(
            expansion, 3, stride, in_channels, out_channels, layers
        )
        for kind, expansion, stride, in_channels, out_channels, layers in _PUBLISHED[config.name]
    ]
    norm = partial(nn.BatchNorm2d, eps=_BATCH_NORM_EPS, momentum=config.batch_norm_momentum)
    return EfficientNet(
        stages,
        dropout,
        stochastic_depth_prob=0.0,
        num_classes=num_classes,
        norm_layer=norm,
        last_channel=_LAST_CHANNEL,
    )
