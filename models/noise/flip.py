"""Horizontal flips with probability one half."""

import torch
from torch import Tensor

from models.draws import Draws
from models.randomness import Block


def flip(images: Tensor, draws: Draws) -> Tensor:
    """Return (B, C, H, W) images of which about half are mirrored left to right."""
    is_flipped = (draws.words(Block.FLIP, 1)[:, 0] >= 1 << 31).to(images.device)
    return torch.where(is_flipped[:, None, None, None], images.flip(3), images)
