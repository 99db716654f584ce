"""RandAugment: a few random image operations per sample at one shared magnitude."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws, scaled_integers
from models.noise.cutout import random_centers
from models.noise.fixmatch_augment import fixmatch_augment_
from models.noise.operations import MOVES, NOTHING, Operation, apply_operations_
from models.randomness import Block

_WORDS_PER_LAYER = 8
"""Of which are used: operation, is it applied, sign, cutout y, cutout x."""

_RELEASED_SIZE = 224
_RELEASED_TRANSLATION = 100.0
_RELEASED_CUTOUT = 40.0
_SMALL_SIZE = 64
"""Up to this side the released code's rule for small images holds: an eighth of the side."""

_CLIPPED_MAGNITUDE = 10.0
_CLIPPED_TRANSLATION = 0.45


class RandAugmentConfig(BaseModel):
    """`num_ops` operations one after another, each drawn uniformly with replacement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_ops: int = Field(default=2, ge=1, le=16, description="Operations per image.")
    magnitude: float = Field(
        default=9.0, ge=0, le=30, description="Strength; 10 is the operations' nominal maximum."
    )
    convention: Literal["tf_extrapolate", "clip10"] = Field(
        default="tf_extrapolate",
        description="tf_extrapolate: the released Noisy Student code, 16 operations with Cutout, "
        "magnitudes above 10 go on growing. clip10: 15 operations without Cutout, magnitude at "
        "most 10, translations up to 0.45 of the side, as in timm.",
    )
    op_prob: float = Field(
        default=1.0, ge=0, le=1, description="Probability that a drawn operation is applied."
    )
    magnitude_per_op: Literal["fixed", "uniform"] = Field(
        default="fixed",
        description="fixed: `magnitude`. uniform: FixMatch's form, 14 operations with one that "
        "does nothing, each at a strength drawn uniformly from its own range, then a grey square "
        "with a side of up to half the image's; magnitude and convention are not read.",
        json_schema_extra={"absent_means": "fixed"},
    )
    translate_pixels: float | None = Field(
        default=None,
        ge=0,
        description="tf_extrapolate: pixels of a translation at magnitude 10. Absent: an eighth of "
        "the side up to 64 pixels, else 100/224 of it (the released code: 100 at every size).",
    )
    cutout_pixels: float | None = Field(
        default=None,
        ge=0,
        description="tf_extrapolate: half the side of Cutout's square at magnitude 10. Absent: an "
        "eighth of the shorter side up to 64 pixels, else 40/224 (the released code: 40).",
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse what the convention or FixMatch's form does not read."""
        if self.magnitude_per_op == "uniform":
            unread = ("magnitude", "convention", "translate_pixels", "cutout_pixels")
            fields = type(self).model_fields
            given = [name for name in unread if getattr(self, name) != fields[name].default]
            if given:
                raise ValueError(
                    f"randaugment.{given[0]}={getattr(self, given[0])} has no effect with "
                    "magnitude_per_op: uniform, which has ranges of its own: remove it"
                )
        if self.convention == "clip10" and (self.translate_pixels, self.cutout_pixels) != (
            None,
            None,
        ):
            raise ValueError(
                "randaugment.translate_pixels and cutout_pixels belong to convention "
                "tf_extrapolate, and clip10 would ignore them: remove them"
            )


def num_operations(config: RandAugmentConfig) -> int:
    """Return how many operations a convention draws from: 16 or, without Cutout, 15."""
    return len(Operation) if config.convention == "tf_extrapolate" else len(Operation) - 1


def drawn_operations(config: RandAugmentConfig, draws: Draws) -> Tensor:
    """Return (B, num_ops) int64: the number of each operation, -1 where it is not applied."""
    words = _words(config, draws)
    operations = scaled_integers(words[..., 0], num_operations(config))
    is_applied = words[..., 1] < round(config.op_prob * 2**32)
    return torch.where(is_applied, operations, NOTHING)


def randaugment(images: Tensor, config: RandAugmentConfig, draws: Draws) -> Tensor:
    """Return augmented float images (B, 3, H, W) that hold whole numbers 0..255, as the input."""
    images = images.clone()
    if config.magnitude_per_op == "uniform":
        return fixmatch_augment_(images, config.num_ops, config.op_prob, draws)
    words = _words(config, draws)
    operations = drawn_operations(config, draws)
    height, width = images.shape[-2:]
    at_level = _arguments(config, height, width).to(words.device)
    for layer in range(config.num_ops):
        drawn, own = operations[:, layer], words[:, layer]
        values = at_level[drawn.clamp(min=0)]
        is_negative = (own[:, 2] >= 1 << 31) & _is_signed(drawn)
        apply_operations_(
            images,
            drawn,
            torch.where(is_negative, -values, values),
            centers=random_centers(own[:, 3:5], height, width),
        )
    return images


def _words(config: RandAugmentConfig, draws: Draws) -> Tensor:
    words = draws.words(Block.RANDAUGMENT, config.num_ops * _WORDS_PER_LAYER)
    return words.view(len(draws), config.num_ops, _WORDS_PER_LAYER)


def _level(config: RandAugmentConfig) -> float:
    """Return the magnitude as a share of the nominal maximum 10."""
    magnitude = config.magnitude
    if config.convention == "clip10":
        magnitude = min(magnitude, _CLIPPED_MAGNITUDE)
    return magnitude / 10.0


def _is_signed(operations: Tensor) -> Tensor:
    return torch.isin(operations, torch.tensor([int(move) for move in MOVES]).to(operations))


def _arguments(config: RandAugmentConfig, height: int, width: int) -> Tensor:
    """Return (16,) float32: the argument of each operation at the config's magnitude, unsigned."""
    level = _level(config)
    enhancement = 1.8 * level + 0.1
    arguments = {
        Operation.ROTATE: math.radians(30.0 * level),
        Operation.POSTERIZE: float(int(4 * level)),
        Operation.SOLARIZE: float(int(256 * level)),
        Operation.COLOR: enhancement,
        Operation.CONTRAST: enhancement,
        Operation.BRIGHTNESS: enhancement,
        Operation.SHARPNESS: enhancement,
        Operation.SHEAR_X: 0.3 * level,
        Operation.SHEAR_Y: 0.3 * level,
        Operation.TRANSLATE_X: _translation(config, width) * level,
        Operation.TRANSLATE_Y: _translation(config, height) * level,
        Operation.SOLARIZE_ADD: float(int(110 * level)),
        Operation.CUTOUT: float(_half_side(config, height, width)),
    }
    return torch.tensor([arguments.get(operation, 0.0) for operation in Operation])


def _translation(config: RandAugmentConfig, side: int) -> float:
    if config.convention == "clip10":
        return _CLIPPED_TRANSLATION * side
    if config.translate_pixels is None:
        return _default_pixels(_RELEASED_TRANSLATION, side)
    return config.translate_pixels


def _default_pixels(released: float, side: int) -> float:
    """Return pixels at magnitude 10. Source: noisystudent preprocessing.py, 32 and 224 pixels."""
    return side // 8 if side <= _SMALL_SIZE else released * side / _RELEASED_SIZE


def _half_side(config: RandAugmentConfig, height: int, width: int) -> int:
    at_ten = config.cutout_pixels
    if at_ten is None:
        at_ten = _default_pixels(_RELEASED_CUTOUT, min(height, width))
    return int(_level(config) * at_ten)
