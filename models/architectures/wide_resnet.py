"""Wide ResNet as used throughout semi-supervised learning (WRN-28-2 and larger)."""

from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.noise.stochastic_depth import StochasticDepth

_LEAKY_SLOPE = 0.1


class WideResNetConfig(BaseModel):
    """Pre-activation residual blocks, three stages, leaky ReLU 0.1, for 32-pixel images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["wide_resnet"] = "wide_resnet"
    depth: int = Field(
        default=28,
        ge=10,
        le=1000,
        multiple_of=2,
        description="Convolutional layers, 6n + 4: 10, 16, 22, 28, 34, 40, ...",
    )
    width: int = Field(default=2, ge=1, le=64, description="Widening factor; stages 16, 32, 64 x.")
    batch_norm_momentum: float = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="Share of the new batch in the running statistics. The SSL code bases use "
        "0.001, which needs some 10,000 steps before the statistics can be trusted.",
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse a depth that is not 6n + 4."""
        if (self.depth - 4) % 6:
            raise ValueError(
                f"wide_resnet.depth must be 6n + 4 (10, 16, 22, 28, ...), got {self.depth}"
            )


class _Block(nn.Module):
    """One pre-activation block; where the width changes the shortcut sees the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, momentum=momentum)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if stride != 1 or in_channels != out_channels
            else None
        )
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.bn1(x), _LEAKY_SLOPE)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv2(F.leaky_relu(self.bn2(self.conv1(active)), _LEAKY_SLOPE))
        return shortcut + self.stochastic_depth(out)


class WideResNet(nn.Module):
    """Source: Zagoruyko and Komodakis 2016; leaky ReLU and initial weights as in TorchSSL."""

    def __init__(self, config: WideResNetConfig, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        momentum = config.batch_norm_momentum
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for stage in range(3):
            out_channels = (16 << stage) * config.width
            for i in range((config.depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_Block(channels, out_channels, stride, momentum))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, a=_LEAKY_SLOPE, mode="fan_out", nonlinearity="leaky_relu"
                )
        nn.init.xavier_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of normalised images (B, 3, H, W)."""
        features = F.leaky_relu(self.bn(self.blocks(self.conv(x))), _LEAKY_SLOPE)
        return self.fc(self.dropout(features.mean((2, 3))))


def build_wide_resnet(config: WideResNetConfig, num_classes: int, *, dropout: float) -> WideResNet:
    """Return the network with fresh weights."""
    return WideResNet(config, num_classes, dropout=dropout)
