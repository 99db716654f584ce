"""The one conversion of image files to RGB, and the views of an image, for all stages alike."""

import io
import struct
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.architectures import Interpolation
from tasks.jpeg_files import plain_pixels, plain_size
from tasks.resizing import resized_centre, resized_pixels

T = TypeVar("T")

CONVERSION = "turbo-torch-1"
"""Name of this conversion in fingerprints; a change of any pixel it gives needs a new name."""

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP")

_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_SWAPPING = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}

Reduction = Callable[[int, int], int]
"""(upright width, height) -> 1, 2, 4 or 8."""


class BadImage(ValueError):
    """An image file that cannot be decoded, whole, to RGB."""


def decode_pixels(
    data: bytes | memoryview, *, where: str, reduction: Reduction | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP file to the (H, W, 3) pixels of an upright RGB image.

    Of an animation the first frame. Transparency is laid over white; see `to_rgb`. A plain JPEG
    goes through libjpeg-turbo without Pillow, to the same pixels; all else, and whatever that
    warns of, through Pillow.

    Args:
        data: the whole file.
        where: sample key or path, for errors.
        reduction: by what a JPEG's sides may be divided, from its upright width and height; other
            formats are decoded whole.
    Returns: an array that nobody else has.
    Raises: BadImage, naming `where`, for another format, a cut or damaged file, or more than 64
        million pixels (checked before any is decoded).
    """
    if _is_decoded_plainly(data, where, reduction):
        pixels = plain_pixels(data)
        if pixels is not None:
            return pixels
    return np.array(_decode(data, FORMATS, where, reduction))


def decode_image(
    data: bytes | memoryview, *, where: str, reduction: Reduction | None = None
) -> Image.Image:
    """Decode as `decode_pixels` does, to an image of Pillow's."""
    return Image.fromarray(decode_pixels(data, where=where, reduction=reduction))


def _is_decoded_plainly(data: bytes | memoryview, where: str, reduction: Reduction | None) -> bool:
    plain = plain_size(data)
    if plain is None:
        return False
    (width, height), may_be_turned = plain
    if width * height > MAX_PIXELS:
        return False
    if may_be_turned and _opened(data, FORMATS, where, _turn) is not None:
        return False
    return reduction is None or reduction(width, height) == 1


def upright_size(data: bytes | memoryview, *, where: str) -> tuple[int, int]:
    """Return the width and height that `decode_image` gives, read from the file's head.

    Raises: BadImage, naming `where`; that there is none promises nothing for the rest of the file.
    """
    return _opened(data, FORMATS, where, _upright_size)


def largest_reduction(width: float, height: float, size: int) -> int:
    """Return the largest of 1, 2, 4 and 8 that leaves both sides at least `size` pixels long."""
    return next((k for k in (8, 4, 2) if min(width, height) // k >= size), 1)


def decode_any_image(data: bytes | memoryview, *, where: str) -> Image.Image:
    """Decode as `decode_image` does, also BMP, GIF, PPM and TIFF: for making shards only."""
    return _decode(data, (*FORMATS, "BMP", "GIF", "PPM", "TIFF"), where)


def image_kind(data: bytes | memoryview) -> Literal["jpg", "png", "webp"] | None:
    """Tell the formats that shards hold by their first bytes, whatever the file is called."""
    head = bytes(data[:12])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "webp"
    return None


def _decode(
    data: bytes | memoryview,
    formats: tuple[str, ...],
    where: str,
    reduction: Reduction | None = None,
) -> Image.Image:
    def decode(image: Image.Image) -> Image.Image:
        if reduction is not None and image.format == "JPEG":
            divisor = reduction(*_upright_size(image))
            # libjpeg's own scaling, before the inverse cosine transform: it saves its time.
            image.draft(None, (image.width // divisor, image.height // divisor))
        image.load()
        return to_rgb(_upright(image))

    return _opened(data, formats, where, decode)


def _opened(
    data: bytes | memoryview,
    formats: tuple[str, ...],
    where: str,
    use: Callable[[Image.Image], T],
) -> T:
    """Return what `use` makes of an image of which only the head was read."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{where}: {width} x {height} pixels; the limit is {MAX_PIXELS}")
            return use(image)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage(
            f"{where}: not a readable image of {', '.join(formats)} ({len(data)} bytes, beginning "
            f"{bytes(data[:8])!r})"
        ) from error
    except Exception as error:  # on damaged files PIL's decoders raise almost anything
        raise BadImage(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return None  # a damaged EXIF block says nothing of the pixels
    return _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _turn(image) in _SWAPPING else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB.

    16-bit grey is scaled by 1/257 and rounded (65535 becomes 255); CMYK is converted as Adobe's
    JPEGs mean it; palettes are looked up; transparency, be it alpha or one transparent colour, is
    laid over white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        image = _grey_from_16_bit(image)
    if image.mode in {"LA", "PA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def clean_view(
    image: Image.Image | NDArray[np.uint8],
    size: int,
    crop_padding: int = 0,
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Resize the shorter side to size + crop_padding and cut the centre: the view without noise.

    A padding of 32 at 224 keeps 7/8 of the shorter side. An RGB image that already is (size, size)
    comes back as it is without padding.

    Args:
        image: RGB, of Pillow's or (H, W, 3).
        size: side of the result in pixels.
        crop_padding: what the cut leaves of the resized shorter side.
        interpolation: antialiased when it makes smaller.
    Returns: (size, size, 3), possibly a view of a larger array.
    Source: torchvision's Resize and CenterCrop, as its weights' own transforms put them together.
    """
    _check_interpolation(interpolation)
    return resized_centre(np.asarray(image), size, crop_padding, interpolation)


def random_resized_view(
    image: Image.Image | NDArray[np.uint8],
    size: int,
    box: tuple[float, float, float, float],
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Resize a given box of the image; the box is drawn by the caller.

    Args:
        image: RGB, of Pillow's or (H, W, 3).
        size: side of the result in pixels.
        box: left, top, right, bottom in pixels of the image, right and bottom exclusive; rounded
            to whole pixels, of which at least one is left.
        interpolation: antialiased when it makes smaller.
    Returns: (size, size, 3).
    Raises: ValueError if the box is empty or leaves the image.
    """
    _check_interpolation(interpolation)
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box {box} is empty or leaves the image of {(width, height)} pixels")
    across, down = _whole(left, right, width), _whole(top, bottom, height)
    return resized_pixels(np.ascontiguousarray(pixels[down, across]), size, size, interpolation)


def _whole(start: float, end: float, length: int) -> slice:
    """Round an interval to whole pixels; one that rounds to nothing becomes one pixel."""
    first = min(round(start), length - 1)
    return slice(first, max(round(end), first + 1))


def _check_interpolation(interpolation: Interpolation) -> None:
    known = get_args(Interpolation)
    if interpolation not in known:
        raise ValueError(f"unknown interpolation {interpolation!r}; there are {[*known]}")
