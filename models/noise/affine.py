"""Mild random affine maps: rotation, translation, scale and shear, drawn together per sample."""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws
from models.noise.geometry import Padding, centered_maps, warp_bilinear
from models.randomness import Block

_WORDS = 5


class AffineConfig(BaseModel):
    """Ranges of one random affine map about the centre; bilinear."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    degrees: float = Field(default=10.0, ge=0, le=180, description="Largest rotation, degrees.")
    translate: float = Field(
        default=0.1, ge=0, le=1, description="Largest shift in x and in y, share of the side."
    )
    scale: tuple[float, float] = Field(
        default=(0.9, 1.1), description="Smallest and largest magnification, > 0."
    )
    shear: float = Field(default=0.0, ge=0, lt=90, description="Largest shear in x, degrees.")
    padding: Padding = Field(
        default="border", description="What lies outside the image: its border pixel, a mirror, 0."
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse an empty interval of scales."""
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"affine.scale must be 0 < smallest <= largest, got {self.scale}")


def affine_maps(config: AffineConfig, draws: Draws, height: int, width: int) -> Tensor:
    """Return (B, 2, 3) maps from output to input pixels, drawn uniformly from the ranges."""
    u = draws.uniform(Block.AFFINE, _WORDS)
    signed = 2 * u - 1
    angle = signed[:, 0] * math.radians(config.degrees)
    shear = torch.tan(signed[:, 1] * math.radians(config.shear))
    low, high = config.scale
    zoom = low + u[:, 2] * (high - low)
    shift = signed[:, 3:5] * config.translate * u.new_tensor((width, height))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # rotation by -angle, scaled by 1 / zoom, after a shear in x
    linear = torch.stack((cos, sin + cos * shear, -sin, cos - sin * shear), dim=1).view(-1, 2, 2)
    return centered_maps(linear, shift, height, width)


def affine(images: Tensor, config: AffineConfig, draws: Draws) -> Tensor:
    """Return float images (B, C, H, W), each under its own map."""
    height, width = images.shape[-2:]
    return warp_bilinear(images, affine_maps(config, draws, height, width), config.padding)
