"""Random crops: shifts of a padded image, and boxes of random area that decoding cuts out."""

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws
from models.randomness import Block

_ATTEMPTS = 10
_WORDS_PER_ATTEMPT = 4


class NoCropConfig(BaseModel):
    """The clean view: the central square."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"


class PadShiftConfig(BaseModel):
    """Pad by reflection and cut the original size at a random place, for small images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["pad_shift"] = "pad_shift"
    pixels: int = Field(
        default=4, ge=1, description="Largest shift in each direction; below the image's side."
    )


class RandomResizedConfig(BaseModel):
    """A box of random area and aspect ratio resized to the input size, the Inception crop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["random_resized"] = "random_resized"
    scale: tuple[float, float] = Field(
        default=(0.08, 1.0), description="Smallest and largest share of the area, in (0, 1]."
    )
    ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="Smallest and largest width / height, > 0."
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse intervals that are empty or out of range."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop.scale must be 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop.ratio must be 0 < smallest <= largest, got {self.ratio}")


CropConfig = Annotated[
    NoCropConfig | PadShiftConfig | RandomResizedConfig, Field(discriminator="kind")
]


def pad_shift(images: Tensor, config: PadShiftConfig, draws: Draws) -> Tensor:
    """Return (B, C, H, W) images shifted by up to `pixels`, their borders reflected.

    Raises: ValueError if `pixels` is not below both sides.
    """
    height, width = images.shape[-2:]
    pixels = config.pixels
    if pixels >= min(height, width):
        raise ValueError(
            f"crop.pixels must be below the image's sides, got {pixels} for {height} x {width}"
        )
    offsets = draws.integers(Block.CROP, 2, 2 * pixels + 1) - pixels  # (B, 2): y, x
    offsets = offsets.to(images.device)
    device = images.device
    rows = _reflected(torch.arange(height, device=device) + offsets[:, :1], height)
    columns = _reflected(torch.arange(width, device=device) + offsets[:, 1:], width)
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (B, H * W)
    batch, channels = images.shape[:2]
    index = flat[:, None].expand(batch, channels, height * width)
    return images.flatten(2).gather(2, index).view_as(images)


def _reflected(positions: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def draw_boxes(
    config: RandomResizedConfig, draws: Draws, widths: Tensor, heights: Tensor
) -> Tensor:
    """Return the box to cut out of every image, in whole pixels.

    Ten attempts at an area and an aspect ratio; where none fits inside the image, the largest
    central box whose ratio is allowed.

    Args:
        config: intervals of area and ratio.
        draws: of the B samples, on the CPU.
        widths: (B,) integers, pixels.
        heights: (B,) integers, pixels.
    Returns: (B, 4) int64: left, top, right, bottom, right and bottom exclusive.
    Source: torchvision RandomResizedCrop.get_params; scale and ratio as in the Inception crop.
    """
    width, height = widths.double()[:, None], heights.double()[:, None]
    words = draws.words(Block.CROP, _ATTEMPTS * _WORDS_PER_ATTEMPT).double() * 2.0**-32
    u = words.view(len(draws), _ATTEMPTS, _WORDS_PER_ATTEMPT)
    low, high = config.scale
    area = width * height * (low + u[..., 0] * (high - low))  # (B, attempts)
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = torch.exp(log_low + u[..., 1] * (log_high - log_low))
    box_width, box_height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (box_width >= 1) & (box_height >= 1) & (box_width <= width) & (box_height <= height)
    left = (u[..., 2] * (width - box_width + 1)).floor()
    top = (u[..., 3] * (height - box_height + 1)).floor()
    boxes = torch.stack((left, top, left + box_width, top + box_height), dim=-1)

    first = fits.to(torch.int64).argmax(dim=1)  # the first attempt that fits, else 0
    chosen = boxes[torch.arange(len(draws)), first]
    fallback = _central_boxes(width[:, 0], height[:, 0], config.ratio)
    return torch.where(fits.any(dim=1)[:, None], chosen, fallback).to(torch.int64)


def _central_boxes(width: Tensor, height: Tensor, ratio: tuple[float, float]) -> Tensor:
    box_width = torch.minimum(width, (height * ratio[1]).round()).clamp(min=1)
    box_height = torch.minimum(height, (width / ratio[0]).round()).clamp(min=1)
    left, top = ((width - box_width) / 2).floor(), ((height - box_height) / 2).floor()
    return torch.stack((left, top, left + box_width, top + box_height), dim=-1)
