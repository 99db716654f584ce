"""Resizing of uint8 pixels, antialiased, with the numbers of torchvision's transforms."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.architectures import Interpolation

_LONGEST = 4
"""Times the shorter side; what a central square lies far outside of need not be resized."""


def resized_centre(
    pixels: NDArray[np.uint8], size: int, crop_padding: int, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """Resize the shorter side to size + crop_padding and cut the central square.

    Of an image more than four times as long as wide the ends are cut off first, for the memory.

    Args:
        pixels: (H, W, 3).
        size: side of the result.
        crop_padding: by how much the resized shorter side is longer than the result.
        interpolation: antialiased when it makes smaller.
    Returns: (size, size, 3), a view or a copy.
    Source: torchvision's Resize and CenterCrop, on uint8 tensors; 0.29.
    """
    pixels = _without_ends(pixels)
    height, width = pixels.shape[:2]
    shorter, short = min(height, width), size + crop_padding
    # The longer side is cut to whole pixels, as torchvision does.
    longer = int(short * max(height, width) / shorter)
    new_height, new_width = (short, longer) if height <= width else (longer, short)
    resized = resized_pixels(pixels, new_height, new_width, interpolation)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[top : top + size, left : left + size]


def resized_pixels(
    pixels: NDArray[np.uint8], height: int, width: int, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """Return (H, W, 3) pixels at another height and width; as they are where it is their own."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # torch has no word for arrays that cannot be written to, such as Pillow's.
    writable = pixels if pixels.flags.writeable else pixels.copy()
    # (H, W, 3) is (1, 3, H, W) in channels-last memory, for which torch has its fast path.
    image = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
    resized: Tensor = F.interpolate(
        image, size=(height, width), mode=interpolation, antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _without_ends(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut as much off both ends of a very long image as leaves four times its shorter side."""
    height, width = pixels.shape[:2]
    margin = (max(height, width) - _LONGEST * min(height, width)) // 2
    if margin <= 0:
        return pixels
    cut = pixels[margin:-margin] if height > width else pixels[:, margin:-margin]
    return np.ascontiguousarray(cut)
