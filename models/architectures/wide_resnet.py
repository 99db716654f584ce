"""Wide ResNet as used throughout semi-supervised learning (WRN-28-2 and larger)."""

from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.noise.stochastic_depth import StochasticDepth

_LEAKY_SLOPE = 0.1
_MOMENTUM = 0.1
# Every width is a multiple of 16, so that 8 groups always divide it.
_GROUPS = 8


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
        default=_MOMENTUM,
        gt=0.0,
        le=1.0,
        description="Share of the new batch in the running statistics. The SSL code bases use "
        "0.001, which needs some 10,000 steps before the statistics can be trusted.",
    )
    norm: Literal["batch", "group"] = Field(
        default="batch",
        description="batch: BatchNorm. group: GroupNorm in 8 groups, whose images do not see each "
        "other, so that the result does not depend on how a step is split into parts.",
        json_schema_extra={"absent_means": "batch"},
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse a depth that is not 6n + 4, and a momentum that nothing would read."""
        if (self.depth - 4) % 6:
            raise ValueError(
                f"wide_resnet.depth must be 6n + 4 (10, 16, 22, 28, ...), got {self.depth}"
            )
        if self.norm == "group" and self.batch_norm_momentum != _MOMENTUM:
            raise ValueError(
                f"wide_resnet.batch_norm_momentum={self.batch_norm_momentum} has no effect with "
                "norm: group, which keeps no running statistics: leave it out, or take norm: batch"
            )


def _norm(config: WideResNetConfig, channels: int) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(_GROUPS, channels)
    return nn.BatchNorm2d(channels, momentum=config.batch_norm_momentum)


class WideResNetBlock(nn.Module):
    """One pre-activation block; where the width changes the shortcut sees the activated input."""

    def __init__(
        self, config: WideResNetConfig, in_channels: int, out_channels: int, stride: int
    ) -> None:
        super().__init__()
        self.bn1 = _norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = _norm(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if stride != 1 or in_channels != out_channels
            else None
        )
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, at half the resolution where its stride is 2."""
        active = F.leaky_relu(self.bn1(x), _LEAKY_SLOPE)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv2(F.leaky_relu(self.bn2(self.conv1(active)), _LEAKY_SLOPE))
        return shortcut + self.stochastic_depth(out)


class WideResNet(nn.Module):
    """Source: Zagoruyko and Komodakis 2016; leaky ReLU and initial weights as in TorchSSL."""

    def __init__(self, config: WideResNetConfig, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for stage in range(3):
            out_channels = (16 << stage) * config.width
            for i in range((config.depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(WideResNetBlock(config, channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = _norm(config, channels)
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
