"""The noise that a student is trained under, one technique a file.

Input noise (crop, flip, affine, RandAugment, cutout) is a pure function of the images and of each
sample's draws; layer noise (dropout, stochastic depth) belongs to the network.
"""

from typing import assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.noise.affine import AffineConfig, affine
from models.noise.crop import (
    CropConfig,
    NoCropConfig,
    PadShiftConfig,
    RandomResizedConfig,
    draw_boxes,
    pad_shift,
)
from models.noise.cutout import CutoutConfig, cutout
from models.noise.flip import flip
from models.noise.randaugment import RandAugmentConfig, randaugment
from models.noise.stochastic_depth import StochasticDepthConfig
from models.randomness import Draws

__all__ = [
    "AffineConfig",
    "CropConfig",
    "CutoutConfig",
    "NoCropConfig",
    "NoiseConfig",
    "PadShiftConfig",
    "RandAugmentConfig",
    "RandomResizedConfig",
    "StochasticDepthConfig",
    "apply_input_noise",
    "draw_boxes",
]


class NoiseConfig(BaseModel):
    """All noise of a training stage, applied to labelled and pseudo-labelled images alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop: CropConfig = Field(default=NoCropConfig(), description="Random crop.")
    horizontal_flip: bool = Field(
        default=True, description="Mirror half of the images; switch off for digits and text."
    )
    affine: AffineConfig | None = Field(default=None, description="Random affine map.")
    randaugment: RandAugmentConfig | None = Field(default=None, description="RandAugment.")
    cutout: CutoutConfig | None = Field(default=None, description="A grey square in each image.")
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Rate before the last linear layer; absent: none."
    )
    stochastic_depth: StochasticDepthConfig | None = Field(
        default=None, description="Dropped residual branches; absent: none."
    )


def apply_input_noise(images: Tensor, config: NoiseConfig, draws: Draws) -> Tensor:
    """Return noised images, in the order crop, flip, affine, RandAugment, cutout.

    A sample's result depends on its image and its draws alone. A `random_resized` crop happens
    where images are decoded (`draw_boxes`) and is taken as done here.

    Args:
        images: (B, 3, H, W) uint8, or float in [0, 1] (RandAugment rounds it to 8 bits).
        config: the noise; its layer noise is not read.
        draws: of the B samples, on any device; on the CPU they cost an accelerator no waiting.
    Returns: (B, 3, H, W) float32 in [0, 1], on the images' device.
    Raises: ValueError for another shape or type, or if the numbers of images and draws differ.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if images.shape[0] != len(draws):
        raise ValueError(f"{images.shape[0]} images and {len(draws)} draws: one each is needed")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
    match config.crop:
        case PadShiftConfig():
            images = pad_shift(images, config.crop, draws)
        case NoCropConfig() | RandomResizedConfig():
            pass
        case _ as unreachable:
            assert_never(unreachable)
    if config.horizontal_flip:
        images = flip(images, draws)
    # From here on float32 on the scale 0..255.
    if images.dtype == torch.uint8:
        images = images.to(torch.float32)
    else:
        images = images.to(torch.float32) * 255
    if config.affine is not None:
        images = affine(images, config.affine, draws)
    if config.randaugment is not None:
        images = randaugment(images.round().clamp_(0, 255), config.randaugment, draws)
    images = images / 255
    if config.cutout is not None:
        images = cutout(images, config.cutout, draws)
    return images
