"""Patch Gaussian: Gaussian noise inside a random square (Lopes et al. 2019)."""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws
from models.noise.cutout import random_centers, squares
from models.noise.pixel_words import pixel_words
from models.randomness import Block

_WORDS = 5
"""Two name the field of pixels; then the standard deviation, the centre's y and x."""


class PatchGaussianConfig(BaseModel):
    """Noise N(0, s^2), s ~ U(0, max_sigma), in a square whose centre is anywhere in the image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_pixels: int = Field(
        default=25,
        ge=1,
        description="Side of the square, cut off at the borders; 25 is the paper's for CIFAR, "
        "twice the image's side noises all of it.",
    )
    max_sigma: float = Field(
        default=0.1,
        gt=0,
        le=2,
        description="Largest standard deviation, on the scale of images in [0, 1].",
    )


def patch_gaussian(images: Tensor, config: PatchGaussianConfig, draws: Draws) -> Tensor:
    """Return float images (B, 3, H, W) in [0, 1] with noise in a square of each, clipped to [0, 1].

    Every channel of every pixel has noise of its own.
    """
    height, width = images.shape[-2:]
    words = draws.words(Block.PATCH_GAUSSIAN, _WORDS)
    centers = random_centers(words[:, 3:], height, width)
    before = torch.full_like(centers[:, 0], config.patch_pixels // 2)
    mask = squares(centers, before, config.patch_pixels - before, height, width)
    pixels = mask[:, 0].to(images.device).nonzero()  # (M, 3): sample, row, column
    sigmas = ((words[:, 2] >> 8).to(torch.float32) * 2.0**-24 * config.max_sigma).to(images.device)
    noise = _normals(pixel_words(draws, Block.PATCH_GAUSSIAN, pixels)) * sigmas[pixels[:, 0], None]
    noised = images.clone()
    places = noised.permute(0, 2, 3, 1)  # (B, H, W, 3), a view
    places[pixels.unbind(1)] = (places[pixels.unbind(1)] + noise).clamp_(0, 1)
    return noised


def _normals(words: Tensor) -> Tensor:
    """Return (M, 3) float32 from (M, 4) words, by Box and Muller."""
    u = ((words >> 8).to(torch.float32) + 0.5) * 2.0**-24  # inside (0, 1)
    radius = (-2 * u[:, ::2].log()).sqrt()  # (M, 2)
    angle = 2 * math.pi * u[:, 1::2]
    return torch.cat((radius * torch.cos(angle), (radius * torch.sin(angle))[:, :1]), dim=1)
