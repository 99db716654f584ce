"""AugMix: several chains of operations, mixed with each other and with the image.

Source: Hendrycks et al. 2020; augmix augment_and_mix.py and augmentations.py. As there, moves read
bilinearly and show black outside the image. The consistency loss that goes with it is an objective.
"""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws, scaled_integers
from models.noise.beta import WORDS_PER_GAMMA, beta_draws, dirichlet_draws
from models.noise.geometry import warp_bilinear
from models.noise.operations import MOVES, NOTHING, Operation, apply_operations_
from models.randomness import Block

_DEEPEST = 3
"""A drawn depth is 1 to 3."""

_WORDS_PER_LAYER = 3
"""Operation, strength, sign."""

_OPERATIONS = (
    Operation.AUTOCONTRAST,
    Operation.EQUALIZE,
    Operation.POSTERIZE,
    Operation.ROTATE,
    Operation.SOLARIZE,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
)
_IN_IMAGENET_C = (
    Operation.COLOR,
    Operation.CONTRAST,
    Operation.BRIGHTNESS,
    Operation.SHARPNESS,
)


class AugMixConfig(BaseModel):
    """(1 - m) image + m sum w_i chain_i(image), w ~ Dirichlet(alpha), m ~ Beta(alpha, alpha)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    severity: float = Field(
        default=3.0,
        ge=0.1,
        le=10,
        description="Largest strength; each operation draws its own from 0.1 to it. The released "
        "code takes 3 for CIFAR and 1 for ImageNet.",
    )
    width: int = Field(default=3, ge=1, le=8, description="Chains.")
    depth: int | None = Field(
        default=None, ge=1, le=8, description="Operations of a chain; null draws 1, 2 or 3."
    )
    alpha: float = Field(
        default=1.0, gt=0, le=100, description="Of the Dirichlet and the Beta distribution."
    )
    all_ops: bool = Field(
        default=False,
        description="Also color, contrast, brightness and sharpness, which resemble corruptions of "
        "ImageNet-C; leave it off where that benchmark is reported.",
    )


def drawn_chains(
    config: AugMixConfig, draws: Draws, *, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return (B, chains, depth) int64 operations, NOTHING past a chain's end, and arguments."""
    layers = config.depth or _DEEPEST
    words_per_chain = 1 + layers * _WORDS_PER_LAYER
    words = draws.words(Block.AUGMIX, config.width * words_per_chain)
    words = words.view(len(draws), config.width, words_per_chain)
    depths = scaled_integers(words[..., 0], _DEEPEST) + 1
    if config.depth is not None:
        depths = torch.full_like(depths, config.depth)
    own = words[..., 1:].reshape(len(draws), config.width, layers, _WORDS_PER_LAYER)
    choices = (*_OPERATIONS, *_IN_IMAGENET_C) if config.all_ops else _OPERATIONS
    numbers = torch.tensor(choices, device=words.device)
    operations = numbers[scaled_integers(own[..., 0], len(choices))]
    share = own[..., 1].double() * 2.0**-32
    levels = 0.1 + share * (config.severity - 0.1)
    arguments = _arguments(operations, levels, height, width)
    is_move = torch.isin(operations, torch.tensor(MOVES, device=operations.device))
    is_negative = is_move & (own[..., 2] >= 1 << 31)
    arguments = torch.where(is_negative, -arguments, arguments).float()
    is_within = torch.arange(layers, device=words.device) < depths[..., None]
    return torch.where(is_within, operations, NOTHING), arguments


def _arguments(operations: Tensor, levels: Tensor, height: int, width: int) -> Tensor:
    """Return the unsigned argument of every operation at its level of 0 to 10, float64."""
    shares = levels / 10
    by_operation = {
        Operation.POSTERIZE: 4 - (4 * shares).trunc(),
        Operation.ROTATE: (30 * shares).trunc() * (math.pi / 180),
        Operation.SOLARIZE: 256 - (256 * shares).trunc(),
        Operation.SHEAR_X: 0.3 * shares,
        Operation.SHEAR_Y: 0.3 * shares,
        Operation.TRANSLATE_X: (width / 3 * shares).trunc(),
        Operation.TRANSLATE_Y: (height / 3 * shares).trunc(),
    }
    by_operation |= {operation: 1.8 * shares + 0.1 for operation in _IN_IMAGENET_C}
    arguments = torch.zeros_like(levels)
    for operation, values in by_operation.items():
        arguments = torch.where(operations == operation, values, arguments)
    return arguments


def mixture_weights(config: AugMixConfig, draws: Draws) -> Tensor:
    """Return (B, 1 + chains) float32 shares of the image and of its chains; rows sum to 1."""
    words = draws.words(Block.AUGMIX_WEIGHTS, (config.width + 2) * WORDS_PER_GAMMA)
    chains = dirichlet_draws(words[:, 2 * WORDS_PER_GAMMA :], config.alpha, config.width)
    mixed = beta_draws(words[:, : 2 * WORDS_PER_GAMMA], config.alpha)[:, None]
    return torch.cat((1 - mixed, mixed * chains), dim=1).float()


def _move(images: Tensor, maps: Tensor) -> Tensor:
    return warp_bilinear(images, maps, "zeros").round_().clamp_(0, 255)


def augment_and_mix(
    images: Tensor, operations: Tensor, arguments: Tensor, shares: Tensor
) -> Tensor:
    """Return share_0 * image + sum of share_i * chain_i(image), (B, 3, H, W) in 0..255.

    Args:
        images: (B, 3, H, W) float32 that hold whole numbers 0..255.
        operations: (B, chains, depth) int64.
        arguments: (B, chains, depth) float32.
        shares: (B, 1 + chains) float32, rows sum to 1.
    """
    batch, num_chains, depth = operations.shape
    chains = images.repeat(num_chains, 1, 1, 1)  # (chains * B, 3, H, W), chain by chain
    # (B, chains, depth) -> (chains * B, depth)
    operations = operations.transpose(0, 1).flatten(0, 1)
    arguments = arguments.transpose(0, 1).flatten(0, 1)
    for layer in range(depth):
        apply_operations_(
            chains, operations[:, layer], arguments[:, layer], shear_about_corner=True, move=_move
        )
    shares = shares.to(images.device)
    mixture = images * shares[:, 0, None, None, None]
    for i in range(num_chains):
        chain = chains[i * batch : (i + 1) * batch]
        mixture = mixture + chain * shares[:, i + 1, None, None, None]
    return mixture.clamp_(0, 255)  # the shares sum to 1 within rounding


def augmix(images: Tensor, config: AugMixConfig, draws: Draws) -> Tensor:
    """Return mixtures (B, 3, H, W) on the scale 0..255 of float images of whole numbers 0..255."""
    height, width = images.shape[-2:]
    operations, arguments = drawn_chains(config, draws, height=height, width=width)
    return augment_and_mix(images, operations, arguments, mixture_weights(config, draws))
