"""CutMix: a box of one image pasted into another, targets mixed by area (Yun et al. 2019)."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import scaled_integers


class CutMixConfig(BaseModel):
    """A box of another image of the batch covers each image; area share 1 - Beta(alpha, alpha)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cutmix"] = "cutmix"
    alpha: float = Field(
        default=1.0, gt=0, le=100, description="Of the Beta distribution; 1 draws it uniformly."
    )
    prob: float = Field(
        default=1.0, gt=0, le=1, description="Probability that a batch is mixed at all."
    )


def cutmix_boxes(words: Tensor, lam: Tensor, height: int, width: int) -> Tensor:
    """Return boxes of area share 1 - lam about uniform centres, cut off at the borders.

    Args:
        words: (B, 2) int64 in [0, 2**32), for the centres y and x.
        lam: (B,) in [0, 1], the share that an image is to keep before cutting off.
        height: of the images.
        width: of the images.
    Returns: (B, 4) int64: left, top, right, bottom, right and bottom exclusive.
    Source: CutMix-PyTorch train.py, rand_bbox.
    """
    side = (1 - lam.double()).clamp(min=0).sqrt()
    bounds: list[Tensor] = []
    for axis, size in ((1, width), (0, height)):
        center = scaled_integers(words[:, axis], size)
        half = (side * size).to(torch.int64) // 2
        bounds += [(center - half).clamp(0, size), (center + half).clamp(0, size)]
    left, right, top, bottom = bounds
    return torch.stack((left, top, right, bottom), dim=1)


def kept_shares(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return (B,) float64: the share of each image that (B, 4) boxes leave uncovered.

    This is the lambda of the targets. The lambda that the box was drawn for is not: cutting the box
    off at the border covers less.
    """
    left, top, right, bottom = boxes.double().unbind(1)
    return 1 - (right - left) * (bottom - top) / (height * width)


def paste(images: Tensor, others: Tensor, boxes: Tensor) -> Tensor:
    """Return `images` whose (B, 4) boxes (left, top, right, bottom) show the pixels of `others`."""
    height, width = images.shape[-2:]
    left, top, right, bottom = boxes.to(images.device).view(-1, 4, 1, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    is_pasted = (x >= left) & (x < right) & (y >= top) & (y < bottom)  # (B, 1, H, W)
    return torch.where(is_pasted, others, images)
