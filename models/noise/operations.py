"""The operations that policies draw from, each sample of a batch with its own and its own argument.

Samples with the same operation are gathered and computed together; all moves are one warp.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import assert_never

import torch
from torch import Tensor

from models.noise import image_operations as ops
from models.noise.geometry import centered_maps, identity_maps

NOTHING = -1
"""In place of an operation: the sample stays as it is."""


class Operation(IntEnum):
    """The operations, in the order of the released RandAugment, which draws the number.

    Their arguments: ROTATE radians; SHEAR_X and SHEAR_Y pixels a row or column; TRANSLATE_X and
    TRANSLATE_Y pixels; POSTERIZE bits kept; SOLARIZE the threshold; SOLARIZE_ADD the addition;
    COLOR, CONTRAST, BRIGHTNESS and SHARPNESS the factor, 1 for no change; CUTOUT half the side. The
    others have none. Moves name the position that is read: content moves the other way.
    """

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


MOVES = (
    Operation.ROTATE,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
)


def apply_operations_(
    images: Tensor,
    operations: Tensor,
    arguments: Tensor,
    *,
    centers: Tensor | None = None,
    shear_about_corner: bool = False,
    move: Callable[[Tensor, Tensor], Tensor] = ops.move,
) -> None:
    """Write over each image what its operation makes of it.

    Args:
        images: (B, 3, H, W) float32 that hold whole numbers 0..255, before and after; written to.
        operations: (B,) int64 of `Operation`, or NOTHING.
        arguments: (B,) float32, see `Operation`.
        centers: (B, 2) int64, y and x, read by CUTOUT.
        shear_about_corner: shears keep the corner of the image, as PIL's, instead of the middle of
            its first pixel; the difference is half a pixel times the shear.
        move: reads images at (N, 2, 3) maps.
    """
    operations = operations.cpu()
    moved: list[tuple[Operation, Tensor]] = []
    for operation in Operation:
        group = (operations == operation).nonzero()[:, 0]
        if len(group) == 0:
            continue
        if operation in MOVES:
            moved.append((operation, group))
            continue
        chosen, values = group.to(images.device), arguments[group.to(arguments.device)]
        where = None if centers is None else centers[group.to(centers.device)]
        images[chosen] = _recolored(images[chosen], operation, values.to(images.device), where)
    if moved:  # all rotations, shears and translations are one warp
        chosen = torch.cat([group for _, group in moved]).to(images.device)
        height, width = images.shape[-2:]
        maps = [
            _maps(
                operation, arguments[group.to(arguments.device)], height, width, shear_about_corner
            )
            for operation, group in moved
        ]
        images[chosen] = move(images[chosen], torch.cat(maps).to(images.device))


def _maps(
    operation: Operation, values: Tensor, height: int, width: int, about_corner: bool
) -> Tensor:
    n = len(values)
    if operation is Operation.ROTATE:
        cos, sin = torch.cos(values), torch.sin(values)
        linear = torch.stack((cos, -sin, sin, cos), dim=1).view(n, 2, 2)
        return centered_maps(linear, torch.zeros(n, 2, device=values.device), height, width)
    maps = identity_maps(n).to(values.device)
    if operation in (Operation.SHEAR_X, Operation.SHEAR_Y):
        row, column = (0, 1) if operation is Operation.SHEAR_X else (1, 0)
        maps[:, row, column] = values
        if about_corner:
            maps[:, row, 2] = values / 2
        return maps
    maps[:, 0 if operation is Operation.TRANSLATE_X else 1, 2] = values
    return maps


def _recolored(
    images: Tensor, operation: Operation, values: Tensor, centers: Tensor | None
) -> Tensor:
    match operation:
        case Operation.AUTOCONTRAST:
            return ops.autocontrast(images)
        case Operation.EQUALIZE:
            return ops.equalize(images)
        case Operation.INVERT:
            return ops.invert(images)
        case Operation.POSTERIZE:
            return ops.posterize(images, values)
        case Operation.SOLARIZE:
            return ops.solarize(images, values)
        case Operation.SOLARIZE_ADD:
            return ops.solarize_add(images, values)
        case Operation.COLOR:
            return ops.color(images, values)
        case Operation.CONTRAST:
            return ops.contrast(images, values)
        case Operation.BRIGHTNESS:
            return ops.brightness(images, values)
        case Operation.SHARPNESS:
            return ops.sharpness(images, values)
        case Operation.CUTOUT:
            assert centers is not None, "CUTOUT needs centres"
            return ops.cut_out(images, centers.to(images.device), values)
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
