"""JPEG files that need no special care, straight to an array: what most corpora consist of."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_HEADS = {0xC0, 0xC1, 0xC2}  # frames of Huffman-coded JPEGs: baseline, extended, progressive
_APPLICATION = range(0xE0, 0xF0)
_EXIF_OR_XMP = 0xE1
_SEVERAL_PICTURES = 0xE2
_SKIPPED = {*_APPLICATION, 0xC4, 0xDB, 0xDD, 0xFE}  # tables, restart interval, comment


def plain_size(data: bytes | memoryview) -> tuple[tuple[int, int], bool] | None:
    """Return width and height of a plain JPEG, and whether it may be turned by its metadata.

    Plain are grey and three-channel JPEGs of 8 bits in one picture. The head alone is read.

    Returns: None for all else: other formats, CMYK, damaged heads, JPEGs of several pictures.
    """
    view = memoryview(data)
    if bytes(view[:2]) != b"\xff\xd8":
        return None
    position, may_be_turned = 2, False
    while position + 10 <= len(view) and view[position] == 0xFF:
        marker = view[position + 1]
        if marker in _HEADS:
            precision, num_channels = view[position + 4], view[position + 9]
            height = view[position + 5] << 8 | view[position + 6]
            width = view[position + 7] << 8 | view[position + 8]
            if precision != 8 or num_channels not in (1, 3) or not width or not height:
                return None
            return (width, height), may_be_turned
        if marker not in _SKIPPED:
            return None
        if marker == _EXIF_OR_XMP:
            may_be_turned = True
        if marker == _SEVERAL_PICTURES and bytes(view[position + 4 : position + 8]) == b"MPF\0":
            return None
        position += 2 + (view[position + 2] << 8 | view[position + 3])
    return None


def plain_pixels(data: bytes | memoryview) -> NDArray[np.uint8] | None:
    """Decode a plain JPEG to (H, W, 3) RGB, the pixels that Pillow gives; grey three times.

    Returns: None where libjpeg-turbo warns or gives up, and someone has to look closer.
    """
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
