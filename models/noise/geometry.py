"""Affine maps of a batch of images, one map per sample.

Coordinates are pixel indices: x to the right, y downwards, the centre of the top left pixel is
(0, 0). A map takes an *output* position to the input position that is read there.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = Literal["zeros", "border", "reflection"]


def identity_maps(n: int) -> Tensor:
    """Return (n, 2, 3) float32: rows (1, 0, 0) and (0, 1, 0)."""
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(n, 1, 1)


def centered_maps(linear: Tensor, shift: Tensor, height: int, width: int) -> Tensor:
    """Return the maps p -> linear (p - centre) + centre + shift.

    Args:
        linear: (N, 2, 2), acting on (x, y).
        shift: (N, 2) in pixels, (x, y).
        height: of the images.
        width: of the images.
    Returns: (N, 2, 3).
    """
    x, y = (width - 1) / 2, (height - 1) / 2
    moved = torch.stack(
        (
            x + shift[:, 0] - linear[:, 0, 0] * x - linear[:, 0, 1] * y,
            y + shift[:, 1] - linear[:, 1, 0] * x - linear[:, 1, 1] * y,
        ),
        dim=1,
    )
    return torch.cat((linear, moved[:, :, None]), dim=2)


def _source_positions(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return x and y (N, H, W). No matrix product: its rounding would depend on the batch size."""
    x = torch.arange(width, device=maps.device, dtype=torch.float32)
    y = torch.arange(height, device=maps.device, dtype=torch.float32)[:, None]
    m = maps[:, :, :, None, None]
    sources = [m[:, i, 0] * x + (m[:, i, 1] * y + m[:, i, 2]) for i in range(2)]
    return sources[0], sources[1]


def warp_nearest(images: Tensor, maps: Tensor, fill: float) -> Tensor:
    """Return images read at the nearest input pixel; positions outside get `fill`.

    Args:
        images: (N, C, H, W).
        maps: (N, 2, 3), output to input.
        fill: value of the image's scale.
    """
    n, channels, height, width = images.shape
    x, y = (p.round() for p in _source_positions(maps.to(images.device), height, width))
    is_outside = (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)
    flat = (y * width + x).masked_fill(is_outside, 0).to(torch.int64).flatten(1)
    index = flat[:, None].expand(n, channels, height * width)
    warped = images.flatten(2).gather(2, index).view_as(images)
    return warped.masked_fill(is_outside[:, None], fill)


def warp_bilinear(images: Tensor, maps: Tensor, padding: Padding) -> Tensor:
    """Return float images (N, C, H, W) read between the four nearest pixels of maps (N, 2, 3)."""
    height, width = images.shape[-2:]
    x, y = _source_positions(maps.to(images.device), height, width)
    # grid_sample's coordinates without align_corners: -1 and 1 are the outer edges of the image.
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return F.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode=padding, align_corners=False
    )
