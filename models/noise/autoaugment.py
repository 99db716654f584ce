"""AutoAugment: one of 25 learned pairs of operations for each image (Cubuk et al. 2019)."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.transforms.autoaugment import (  # pyright: ignore[reportMissingTypeStubs]
    AutoAugment,
    AutoAugmentPolicy,
)

from models.draws import Draws, scaled_integers
from models.noise.magnitudes import OPERATIONS, argument_table
from models.noise.operations import NOTHING, apply_operations_
from models.randomness import Block

_LAYERS = 2
_WORDS = 1 + 2 * _LAYERS
"""The pair, then for each of its operations: is it applied, sign."""

_BINS = 10
_TRANSLATION = 150 / 331


class AutoAugmentConfig(BaseModel):
    """The policy that was learned on one dataset; it has no strength to set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["imagenet", "cifar10", "svhn"] = Field(
        default="imagenet", description="The dataset that the pairs were learned on."
    )


def policy_rows(config: AutoAugmentConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs as (25, 2) tensors: operation, probability (float64), bin of the strength.

    Source: torchvision's tables; operations without strength have bin 0.
    """
    pairs = AutoAugment(AutoAugmentPolicy(config.policy)).policies
    operations = [[OPERATIONS[name] for name, _, _ in pair] for pair in pairs]
    probs = [[prob for _, prob, _ in pair] for pair in pairs]
    bins = [[magnitude or 0 for _, _, magnitude in pair] for pair in pairs]
    return torch.tensor(operations), torch.tensor(probs, dtype=torch.float64), torch.tensor(bins)


def drawn_pairs(
    config: AutoAugmentConfig, draws: Draws, *, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return (B, 2) int64 operations, NOTHING where one is not applied, and float32 arguments."""
    words = draws.words(Block.AUTOAUGMENT, _WORDS)
    device = words.device
    operations, probs, bins = (rows.to(device) for rows in policy_rows(config))
    pair = scaled_integers(words[:, 0], len(operations))
    is_applied = words[:, 1::2] < (probs[pair] * 2**32)
    is_negative = (words[:, 2::2] >= 1 << 31).to(torch.int64)
    table = argument_table(
        _BINS,
        shear=0.3,
        pixels_x=_TRANSLATION * width,
        pixels_y=_TRANSLATION * height,
        degrees=30.0,
        enhancement=0.9,
        posterize_bits=4,
    ).to(device)
    arguments = table[operations[pair], bins[pair], is_negative]
    return torch.where(is_applied, operations[pair], NOTHING), arguments


def autoaugment(images: Tensor, config: AutoAugmentConfig, draws: Draws) -> Tensor:
    """Return augmented float images (B, 3, H, W) that hold whole numbers 0..255, as the input.

    As torchvision's AutoAugment with nearest interpolation and fill 128, the grey of the released
    code.
    """
    height, width = images.shape[-2:]
    operations, arguments = drawn_pairs(config, draws, height=height, width=width)
    images = images.clone()
    for layer in range(_LAYERS):
        apply_operations_(
            images, operations[:, layer], arguments[:, layer], shear_about_corner=True
        )
    return images
