"""TrivialAugment: one operation at one random strength for each image (Müller and Hutter 2021)."""

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.draws import Draws, scaled_integers
from models.noise.magnitudes import OPERATIONS, argument_table
from models.noise.operations import apply_operations_
from models.randomness import Block

_WORDS = 3
_BINS = 31
# All but Invert; the first does nothing.
_CHOICES = tuple(number for name, number in OPERATIONS.items() if name != "Invert")


class TrivialAugmentConfig(BaseModel):
    """The wide space of strengths; there is nothing to set."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def drawn_trivial(draws: Draws) -> tuple[Tensor, Tensor]:
    """Return (B,) int64 operations, NOTHING among them, and (B,) float32 arguments."""
    words = draws.words(Block.TRIVIAL_AUGMENT, _WORDS)
    choices = torch.tensor(_CHOICES, device=words.device)
    operations = choices[scaled_integers(words[:, 0], len(_CHOICES))]
    bins = scaled_integers(words[:, 1], _BINS)
    is_negative = (words[:, 2] >= 1 << 31).to(torch.int64)
    table = argument_table(
        _BINS,
        shear=0.99,
        pixels_x=32.0,
        pixels_y=32.0,
        degrees=135.0,
        enhancement=0.99,
        posterize_bits=6,
    ).to(words.device)
    return operations, table[operations.clamp(min=0), bins, is_negative]


def trivial_augment(images: Tensor, draws: Draws) -> Tensor:
    """Return augmented float images (B, 3, H, W) that hold whole numbers 0..255, as the input.

    As torchvision's TrivialAugmentWide with nearest interpolation and fill 128. Translations are
    of up to 32 pixels whatever the size, as published: at 32 pixels nothing may be left.
    """
    operations, arguments = drawn_trivial(draws)
    images = images.clone()
    apply_operations_(images, operations, arguments, shear_about_corner=True)
    return images
