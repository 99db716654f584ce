"""RandAugment: a few random image operations per sample at one shared magnitude."""

import math
from enum import IntEnum
from typing import Literal, assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.noise import image_operations as ops
from models.noise.cutout import random_centers
from models.noise.geometry import centered_maps, identity_maps
from models.randomness import Block, Draws, scaled_integers

_WORDS_PER_LAYER = 8
"""Of which are used: operation, is it applied, sign, cutout y, cutout x."""

_RELEASED_SIZE = 224
_RELEASED_TRANSLATION = 100.0
_RELEASED_CUTOUT = 40.0
_SMALL_SIZE = 64
"""Up to this side the released code's rule for small images holds: an eighth of the side."""

_CLIPPED_MAGNITUDE = 10.0
_CLIPPED_TRANSLATION = 0.45


class Operation(IntEnum):
    """The operations, in the order of the released code; the number is what is drawn."""

    AUTOCONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    COLOR = 6
    CONTRAST = 7
    BRIGHTNESS = 8
    SHARPNESS = 9
    SHEAR_X = 10
    SHEAR_Y = 11
    TRANSLATE_X = 12
    TRANSLATE_Y = 13
    SOLARIZE_ADD = 14
    CUTOUT = 15


_MOVES = (
    Operation.ROTATE,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
)


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
        """Refuse pixels that the convention does not read."""
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
    return torch.where(is_applied, operations, -1)


def randaugment(images: Tensor, config: RandAugmentConfig, draws: Draws) -> Tensor:
    """Return augmented float images (B, 3, H, W) that hold whole numbers 0..255, as the input."""
    words = _words(config, draws)
    operations = drawn_operations(config, draws).cpu()
    images = images.clone()
    for layer in range(config.num_ops):
        moved: list[tuple[Operation, Tensor]] = []
        for operation in Operation:
            group = (operations[:, layer] == operation).nonzero()[:, 0]
            if len(group) == 0:
                continue
            if operation in _MOVES:
                moved.append((operation, group))
                continue
            chosen = group.to(images.device)
            images[chosen] = _recolored(
                images[chosen], operation, config, words[group.to(words.device), layer]
            )
        if moved:  # all rotations, shears and translations are one warp
            height, width = images.shape[-2:]
            maps = [
                _maps(operation, config, words[group.to(words.device), layer], height, width)
                for operation, group in moved
            ]
            chosen = torch.cat([group for _, group in moved]).to(images.device)
            images[chosen] = ops.move(images[chosen], torch.cat(maps).to(images.device))
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


def _signed(words: Tensor, value: float) -> Tensor:
    return torch.where(words[:, 2] >= 1 << 31, -value, value)


def _maps(
    operation: Operation, config: RandAugmentConfig, words: Tensor, height: int, width: int
) -> Tensor:
    """Return (N, 2, 3) maps. Rotations turn about the centre, shears keep the top left pixel."""
    n, level = len(words), _level(config)
    maps = identity_maps(n).to(words.device)
    if operation is Operation.ROTATE:
        angle = _signed(words, math.radians(30.0 * level))
        cos, sin = torch.cos(angle), torch.sin(angle)
        linear = torch.stack((cos, -sin, sin, cos), dim=1).view(n, 2, 2)
        return centered_maps(linear, torch.zeros(n, 2, device=words.device), height, width)
    if operation in (Operation.SHEAR_X, Operation.SHEAR_Y):
        row, column = (0, 1) if operation is Operation.SHEAR_X else (1, 0)
        maps[:, row, column] = _signed(words, 0.3 * level)
        return maps
    row, side = (0, width) if operation is Operation.TRANSLATE_X else (1, height)
    maps[:, row, 2] = _signed(words, _translation(config, side) * level)
    return maps


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


def _recolored(
    images: Tensor, operation: Operation, config: RandAugmentConfig, words: Tensor
) -> Tensor:
    level = _level(config)

    def full(value: float) -> Tensor:
        return torch.full((images.shape[0],), value, device=images.device)

    enhancement = full(1.8 * level + 0.1)
    match operation:
        case Operation.AUTOCONTRAST:
            return ops.autocontrast(images)
        case Operation.EQUALIZE:
            return ops.equalize(images)
        case Operation.INVERT:
            return ops.invert(images)
        case Operation.POSTERIZE:
            return ops.posterize(images, full(float(int(4 * level))))
        case Operation.SOLARIZE:
            return ops.solarize(images, full(float(int(256 * level))))
        case Operation.SOLARIZE_ADD:
            return ops.solarize_add(images, full(float(int(110 * level))))
        case Operation.COLOR:
            return ops.color(images, enhancement)
        case Operation.CONTRAST:
            return ops.contrast(images, enhancement)
        case Operation.BRIGHTNESS:
            return ops.brightness(images, enhancement)
        case Operation.SHARPNESS:
            return ops.sharpness(images, enhancement)
        case Operation.CUTOUT:
            height, width = images.shape[-2:]
            centers = random_centers(words[:, 3:5], height, width).to(images.device)
            return ops.cut_out(images, centers, full(float(_half_side(config, height, width))))
        case (
            Operation.ROTATE
            | Operation.SHEAR_X
            | Operation.SHEAR_Y
            | Operation.TRANSLATE_X
            | Operation.TRANSLATE_Y
        ):
            raise AssertionError(f"{operation.name} is a move")
        case _ as unreachable:
            assert_never(unreachable)
