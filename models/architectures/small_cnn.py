"""A small residual network for images of 8 to 64 pixels: minutes on a CPU, for demos and tests."""

from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.noise.stochastic_depth import StochasticDepth

_NUM_STAGES = 3


class SmallCnnConfig(BaseModel):
    """Three stages, each a convolution, a 2x2 max pooling and residual blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["small_cnn"] = "small_cnn"
    width: int = Field(
        default=32, ge=1, le=1024, description="Channels of the first stage; stages have 1, 2, 4x."
    )
    depth: int = Field(default=1, ge=1, le=32, description="Residual blocks in each stage.")


class SmallCnnBlock(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + self.stochastic_depth(out))


class SmallCnn(nn.Module):
    """Stem, three stages, average pooling, dropout, linear layer; sides of at least 8 pixels."""

    def __init__(self, config: SmallCnnConfig, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
        for stage in range(_NUM_STAGES):
            out_channels = width << stage
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.MaxPool2d(2),  # before BatchNorm and ReLU: a quarter of their work
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
                *(SmallCnnBlock(out_channels) for _ in range(config.depth)),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of normalised images (B, 3, H, W)."""
        return self.fc(self.dropout(self.features(x).mean((2, 3))))


def build_small_cnn(config: SmallCnnConfig, num_classes: int, *, dropout: float) -> SmallCnn:
    """Return the network with fresh weights."""
    return SmallCnn(config, num_classes, dropout=dropout)
