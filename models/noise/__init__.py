"""The noise that a student is trained under, one technique a file.

Input noise (crop, flip, affine, a policy such as RandAugment, erasing) is a pure function of the
images and of each sample's draws; layer noise (dropout, stochastic depth) belongs to the network,
mixing to the batch (`models.mixing`).
"""

from typing import Self, assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from models.draws import Draws
from models.noise.affine import AffineConfig, affine
from models.noise.augmix import AugMixConfig, augmix
from models.noise.autoaugment import AutoAugmentConfig, autoaugment
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
from models.noise.mixing import MixingConfig
from models.noise.patch_gaussian import PatchGaussianConfig, patch_gaussian
from models.noise.randaugment import RandAugmentConfig, randaugment
from models.noise.random_erasing import RandomErasingConfig, random_erasing
from models.noise.stochastic_depth import StochasticDepthConfig
from models.noise.trivial_augment import TrivialAugmentConfig, trivial_augment

__all__ = [
    "AffineConfig",
    "AugMixConfig",
    "AutoAugmentConfig",
    "CropConfig",
    "CutoutConfig",
    "MixingConfig",
    "NoCropConfig",
    "NoiseConfig",
    "PadShiftConfig",
    "PatchGaussianConfig",
    "RandAugmentConfig",
    "RandomErasingConfig",
    "RandomResizedConfig",
    "StochasticDepthConfig",
    "TrivialAugmentConfig",
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
    autoaugment: AutoAugmentConfig | None = Field(
        default=None,
        description="AutoAugment, instead of RandAugment.",
        json_schema_extra={"absent_means": None},
    )
    trivial_augment: TrivialAugmentConfig | None = Field(
        default=None,
        description="TrivialAugment, instead of RandAugment.",
        json_schema_extra={"absent_means": None},
    )
    augmix: AugMixConfig | None = Field(
        default=None,
        description="AugMix, instead of RandAugment; its consistency loss belongs to the "
        "objective.",
        json_schema_extra={"absent_means": None},
    )
    cutout: CutoutConfig | None = Field(default=None, description="A grey square in each image.")
    random_erasing: RandomErasingConfig | None = Field(
        default=None,
        description="A box overwritten in some of the images.",
        json_schema_extra={"absent_means": None},
    )
    patch_gaussian: PatchGaussianConfig | None = Field(
        default=None,
        description="Gaussian noise in a square of each image.",
        json_schema_extra={"absent_means": None},
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Rate before the last linear layer; absent: none."
    )
    stochastic_depth: StochasticDepthConfig | None = Field(
        default=None, description="Dropped residual branches; absent: none."
    )
    mixing: MixingConfig | None = Field(
        default=None,
        description="How images of a batch are mixed with each other, and their targets with them; "
        "absent: they are not.",
        json_schema_extra={"absent_means": None},
    )

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        policies = ("randaugment", "autoaugment", "trivial_augment", "augmix")
        given = [name for name in policies if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"noise.{' and noise.'.join(given)} are all given, but each is a whole policy and "
                "none was tuned to follow another: keep one"
            )
        return self


def apply_input_noise(images: Tensor, config: NoiseConfig, draws: Draws) -> Tensor:
    """Return noised images, in the order of the fields of `NoiseConfig`.

    A sample's result depends on its image and its draws alone. A `random_resized` crop happens
    where images are decoded (`draw_boxes`) and is taken as done here.

    Args:
        images: (B, 3, H, W) uint8, or float in [0, 1] (the policies round it to 8 bits).
        config: the noise; its layer noise and mixing are not read.
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
    images = _under_policy(images, config, draws) / 255
    if config.cutout is not None:
        images = cutout(images, config.cutout, draws)
    if config.random_erasing is not None:
        images = random_erasing(images, config.random_erasing, draws)
    if config.patch_gaussian is not None:
        images = patch_gaussian(images, config.patch_gaussian, draws)
    return images


def _under_policy(images: Tensor, config: NoiseConfig, draws: Draws) -> Tensor:
    """Return float images on the scale 0..255 after the one policy of the config, if any."""
    if config.randaugment is not None:
        return randaugment(_rounded(images), config.randaugment, draws)
    if config.autoaugment is not None:
        return autoaugment(_rounded(images), config.autoaugment, draws)
    if config.trivial_augment is not None:
        return trivial_augment(_rounded(images), draws)
    if config.augmix is not None:
        return augmix(_rounded(images), config.augmix, draws)
    return images


def _rounded(images: Tensor) -> Tensor:
    """What an 8-bit image would hold: policies compute with whole numbers."""
    return images.round().clamp_(0, 255)
