"""EfficientNet B0 to B7 and L2, the networks of the Noisy Student paper."""

from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torchvision.models.efficientnet import (  # pyright: ignore[reportMissingTypeStubs]
    EfficientNet,
    MBConvConfig,
)

# (width, depth, resolution, dropout) multipliers and settings of the published networks.
# Source: noisystudent efficientnet_builder.py; L2 also in timm's tf_efficientnet_l2.
_PUBLISHED: dict[str, tuple[float, float, int, float]] = {
    "b0": (1.0, 1.0, 224, 0.2),
    "b1": (1.0, 1.1, 240, 0.2),
    "b2": (1.1, 1.2, 260, 0.3),
    "b3": (1.2, 1.4, 300, 0.3),
    "b4": (1.4, 1.8, 380, 0.4),
    "b5": (1.6, 2.2, 456, 0.4),
    "b6": (1.8, 2.6, 528, 0.5),
    "b7": (2.0, 3.1, 600, 0.5),
    "l2": (4.3, 5.3, 800, 0.5),
}


class EfficientNetConfig(BaseModel):
    """An EfficientNet; dropout is noise and stands in the noise settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["efficientnet"] = "efficientnet"
    name: Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l2"] = Field(
        default="b0", description="Size of the network."
    )
    batch_norm_momentum: float = Field(
        default=0.01,
        gt=0.0,
        le=1.0,
        description="Share of the new batch in the running statistics (the paper's 0.99 is 0.01 "
        "here); raise it for runs of fewer than some 2,000 steps.",
    )
    batch_norm_eps: float = Field(
        default=1e-3,
        gt=0.0,
        le=1e-2,
        description="Added to the variance. torchvision's own weights of b0 to b4 were trained "
        "with 1e-5; the paper's, and torchvision's of b5 to b7, with 1e-3.",
        json_schema_extra={"absent_means": 1e-3},
    )


def published_dropout(name: str) -> float:
    """Return the dropout rate that the paper trained a size with, 0.2 (b0) to 0.5 (l2)."""
    return _settings(name)[3]


def published_image_size(name: str) -> int:
    """Return the test resolution in pixels that the paper used for a size, 224 to 800."""
    return _settings(name)[2]


def _settings(name: str) -> tuple[float, float, int, float]:
    if name not in _PUBLISHED:
        raise ValueError(f"unknown EfficientNet {name!r}; known: {', '.join(_PUBLISHED)}")
    return _PUBLISHED[name]


def build_efficientnet(
    config: EfficientNetConfig, num_classes: int, *, dropout: float
) -> EfficientNet:
    """Return the network with fresh weights; its weight names are torchvision's."""
    width, depth, _, _ = _settings(config.name)
    stage = partial(MBConvConfig, width_mult=width, depth_mult=depth)
    stages = [  # expansion, kernel, stride, input channels, output channels, layers
        stage(1, 3, 1, 32, 16, 1),
        stage(6, 3, 2, 16, 24, 2),
        stage(6, 5, 2, 24, 40, 2),
        stage(6, 3, 2, 40, 80, 3),
        stage(6, 5, 1, 80, 112, 3),
        stage(6, 5, 2, 112, 192, 4),
        stage(6, 3, 1, 192, 320, 1),
    ]
    norm = partial(nn.BatchNorm2d, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
    return EfficientNet(
        stages, dropout, stochastic_depth_prob=0.0, num_classes=num_classes, norm_layer=norm
    )
