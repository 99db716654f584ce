"""What the pipeline calls a classifier: normalisation and a network, images in, logits out."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Interpolation = Literal["bilinear", "bicubic"]
"""Filter of the resize to the input size."""


class Normalization(BaseModel):
    """Per-channel (x - mean) / std of RGB in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="RGB means in [0, 1]; default: ImageNet's."
    )
    std: tuple[float, float, float] = Field(
        default=(0.229, 0.224, 0.225), description="RGB standard deviations, each > 0."
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse a std that is not positive."""
        if min(self.std) <= 0:
            raise ValueError(f"normalization.std must be > 0 in every channel, got {self.std}")


class Classifier(nn.Module):
    """A network behind its normalisation; float RGB (B, 3, H, W) in [0, 1] -> logits (B, C).

    The normalisation is no part of the state dict: it belongs to the model's description.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalization = normalization
        for name, values in (("mean", normalization.mean), ("std", normalization.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.backbone((images - self.mean) / self.std)
