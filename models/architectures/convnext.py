"""ConvNeXt tiny to large: convolutional, LayerNorm instead of BatchNorm."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torchvision.models.convnext import (  # pyright: ignore[reportMissingTypeStubs]
    CNBlockConfig,
    ConvNeXt,
)

# (channels, blocks) of the four stages. Source: Liu et al. 2022, section 3.
_PUBLISHED: dict[str, tuple[tuple[int, int], ...]] = {
    "tiny": ((96, 3), (192, 3), (384, 9), (768, 3)),
    "small": ((96, 3), (192, 3), (384, 27), (768, 3)),
    "base": ((128, 3), (256, 3), (512, 27), (1024, 3)),
    "large": ((192, 3), (384, 3), (768, 27), (1536, 3)),
}


class ConvNeXtConfig(BaseModel):
    """A ConvNeXt for images of 32 pixels and more; weights exchange with torchvision's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["convnext"] = "convnext"
    name: Literal["tiny", "small", "base", "large"] = Field(
        default="tiny", description="Size of the network."
    )


def build_convnext(config: ConvNeXtConfig, num_classes: int, *, dropout: float) -> ConvNeXt:
    """Return the network with fresh weights; its weight names are torchvision's."""
    stages = _PUBLISHED[config.name]
    following = [channels for channels, _ in stages[1:]] + [None]
    settings = [
        CNBlockConfig(channels, next_channels, num_blocks)
        for (channels, num_blocks), next_channels in zip(stages, following, strict=True)
    ]
    network = ConvNeXt(settings, stochastic_depth_prob=0.0, num_classes=num_classes)
    # Before the last layer, within a module that has no weights, so that no name changes.
    network.classifier[1] = nn.Sequential(nn.Flatten(1), nn.Dropout(dropout))
    return network
