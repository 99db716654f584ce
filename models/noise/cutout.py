"""Cutout: a grey square somewhere in the image (DeVries and Taylor 2017)."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws, scaled_integers
from models.randomness import Block

_GREY = 128 / 255


class CutoutConfig(BaseModel):
    """One grey (128 / 255) square, its centre anywhere in the image, cut off at the borders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(
        default=0.5, gt=0, le=1, description="Side of the square, share of the image's side."
    )


def squares(centers: Tensor, before: Tensor, after: Tensor, height: int, width: int) -> Tensor:
    """Return (N, 1, H, W) bool, true inside squares clipped by the border.

    Args:
        centers: (N, 2) integers, y and x.
        before: (N,) pixels above and to the left of the centre.
        after: (N,) pixels below and to the right, the centre included.
        height: of the images.
        width: of the images.
    """
    insides: list[Tensor] = []
    for axis, size in ((0, height), (1, width)):
        distance = torch.arange(size, device=centers.device) - centers[:, axis, None]
        insides.append((distance >= -before[:, None]) & (distance < after[:, None]))
    return (insides[0][:, :, None] & insides[1][:, None, :])[:, None]


def random_centers(words: Tensor, height: int, width: int) -> Tensor:
    """Return (N, 2) int64 centres (y, x), uniform over the pixels, from (N, 2) words."""
    return torch.stack(
        (scaled_integers(words[:, 0], height), scaled_integers(words[:, 1], width)), dim=1
    )


def cutout(images: Tensor, config: CutoutConfig, draws: Draws) -> Tensor:
    """Return float images (B, C, H, W) in [0, 1] with a square of 128 / 255 in each.

    The side is round(fraction * min(H, W)), at least one pixel.
    """
    height, width = images.shape[-2:]
    side = max(1, round(config.fraction * min(height, width)))
    centers = random_centers(draws.words(Block.CUTOUT, 2), height, width)
    before = torch.full_like(centers[:, 0], side // 2)
    mask = squares(centers, before, side - before, height, width)
    return images.masked_fill(mask.to(images.device), _GREY)
