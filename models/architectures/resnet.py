"""torchvision's ResNets with dropout and stochastic depth, under torchvision's weight names."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.models.resnet import (  # pyright: ignore[reportMissingTypeStubs]
    BasicBlock,
    Bottleneck,
    ResNet,
)

from models.noise.stochastic_depth import StochasticDepth


class ResNetConfig(BaseModel):
    """A ResNet for images of about 64 pixels and more; weights exchange with torchvision's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["resnet"] = "resnet"
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = Field(
        default="resnet50", description="torchvision's name of the network."
    )


class _BasicBlock(BasicBlock):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.stochastic_depth(self.bn2(self.conv2(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(Bottleneck):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.stochastic_depth(self.bn3(self.conv3(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


_LAYERS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (_BasicBlock, [2, 2, 2, 2]),
    "resnet34": (_BasicBlock, [3, 4, 6, 3]),
    "resnet50": (_Bottleneck, [3, 4, 6, 3]),
    "resnet101": (_Bottleneck, [3, 4, 23, 3]),
    "resnet152": (_Bottleneck, [3, 8, 36, 3]),
}


class _ResNet(ResNet):
    def __init__(self, config: ResNetConfig, num_classes: int, *, dropout: float) -> None:
        block, layers = _LAYERS[config.name]
        super().__init__(block, layers, num_classes=num_classes)
        # After the average pooling and before `fc`; a module without weights adds no name.
        self.avgpool = nn.Sequential(self.avgpool, nn.Dropout(dropout))


def build_resnet(config: ResNetConfig, num_classes: int, *, dropout: float) -> ResNet:
    """Return the network with fresh weights."""
    return _ResNet(config, num_classes, dropout=dropout)
