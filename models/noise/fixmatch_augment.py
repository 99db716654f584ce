"""FixMatch's RandAugment: every operation at a strength of its own, then Cutout up to a half.

Source: USB augmentation/randaugment.py, whose magnitude argument does nothing either. Two
differences: what lies outside the image and the square are grey 128, and the square is cut off at
the border (there its left and upper edge are moved inside instead).
"""

import math

import torch
from torch import Tensor

from models.draws import Draws, scaled_integers
from models.noise import image_operations as ops
from models.noise.cutout import random_centers
from models.noise.operations import NOTHING, Operation, apply_operations_
from models.randomness import Block

_WORDS_PER_LAYER = 4
"""Operation, is it applied, strength, and one to spare."""

_LARGEST_CUTOUT = 0.5
_ENHANCEMENT = (0.05, 0.95)

# The operation that does nothing is drawn as often as each other.
_CHOICES: tuple[tuple[int, float, float], ...] = (
    (Operation.AUTOCONTRAST, 0.0, 0.0),
    (Operation.BRIGHTNESS, *_ENHANCEMENT),
    (Operation.COLOR, *_ENHANCEMENT),
    (Operation.CONTRAST, *_ENHANCEMENT),
    (Operation.EQUALIZE, 0.0, 0.0),
    (NOTHING, 0.0, 0.0),
    (Operation.POSTERIZE, 4.0, 8.0),
    (Operation.ROTATE, math.radians(-30.0), math.radians(30.0)),
    (Operation.SHARPNESS, *_ENHANCEMENT),
    (Operation.SHEAR_X, -0.3, 0.3),
    (Operation.SHEAR_Y, -0.3, 0.3),
    (Operation.SOLARIZE, 0.0, 256.0),
    (Operation.TRANSLATE_X, -0.3, 0.3),  # of the width
    (Operation.TRANSLATE_Y, -0.3, 0.3),  # of the height
)


def fixmatch_operations(
    num_ops: int, op_prob: float, draws: Draws, *, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return (B, num_ops) int64 operations or NOTHING, and their float32 arguments."""
    words = draws.words(Block.RANDAUGMENT, num_ops * _WORDS_PER_LAYER)
    words = words.view(len(draws), num_ops, _WORDS_PER_LAYER)
    choice = scaled_integers(words[..., 0], len(_CHOICES))
    is_applied = words[..., 1] < round(op_prob * 2**32)
    table = torch.tensor([row[1:] for row in _CHOICES], device=words.device)
    numbers = torch.tensor([row[0] for row in _CHOICES], device=words.device)
    low, high = table[choice].unbind(-1)
    arguments = low + (words[..., 2] >> 8).to(torch.float32) * 2.0**-24 * (high - low)
    operations = numbers[choice]
    arguments = torch.where(operations == Operation.POSTERIZE, arguments.floor(), arguments)
    arguments = torch.where(operations == Operation.TRANSLATE_X, arguments * width, arguments)
    arguments = torch.where(operations == Operation.TRANSLATE_Y, arguments * height, arguments)
    return torch.where(is_applied, operations, NOTHING), arguments


def fixmatch_augment_(images: Tensor, num_ops: int, op_prob: float, draws: Draws) -> Tensor:
    """Write over (B, 3, H, W) float images of whole numbers 0..255, and return them.

    Args:
        images: written to.
        num_ops: operations per image.
        op_prob: probability that each is applied; the square always is.
        draws: of the B samples.
    """
    height, width = images.shape[-2:]
    operations, arguments = fixmatch_operations(num_ops, op_prob, draws, height=height, width=width)
    for layer in range(num_ops):
        apply_operations_(
            images, operations[:, layer], arguments[:, layer], shear_about_corner=True
        )
    first = num_ops * _WORDS_PER_LAYER
    words = draws.words(Block.RANDAUGMENT, first + 3)[:, first:]
    share = (words[:, 0] >> 8).to(torch.float32) * 2.0**-24 * _LARGEST_CUTOUT
    half_sides = (share * min(height, width) / 2).round()
    centers = random_centers(words[:, 1:], height, width).to(images.device)
    return ops.cut_out(images, centers, half_sides.to(images.device))
