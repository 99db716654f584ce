"""The image operations of the policies, each on a batch with one argument per sample.

Images are float32 (N, 3, H, W) that hold whole numbers 0..255, and so are the results: the
arithmetic is that of 8-bit images, with results cut off (not rounded) where the released code casts
to uint8. No operation mixes samples, and sums are of integers, so a sample's result does not depend
on its batch.

Source: noisystudent randaugment.py. One difference: its `contrast` blends with the number of pixels
divided by 256 where PIL, and we, take the mean grey value.
"""

import torch
from torch import Tensor

from models.noise.cutout import squares
from models.noise.geometry import warp_nearest

FILL = 128.0


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]  # (N,) -> (N, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]  # (N, 1, H, W)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Return degenerate + factor * (image - degenerate): factor 0 is degenerate, 1 the image."""
    mixed = degenerate + _per_sample(factors) * (images - degenerate)
    return mixed.clamp_(0, 255).floor_()


def autocontrast(images: Tensor) -> Tensor:
    """Stretch every channel to 0..255; a constant channel stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    stretched = ((images - low) * 255 / span.clamp(min=1)).floor_()
    return torch.where(span > 0, stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Equalise the histogram of every channel as PIL does; where its step is 0 nothing changes."""
    n, channels, height, width = images.shape
    pixels = images.to(torch.int64).reshape(n * channels, height * width)
    ones = torch.ones((), dtype=torch.int64, device=images.device).expand_as(pixels)
    counts = torch.zeros(n * channels, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, pixels, ones)  # (N * C, 256)
    brightest = pixels.amax(1, keepdim=True)
    step = (height * width - counts.gather(1, brightest)) // 255  # (N * C, 1)
    before = counts.cumsum(1) - counts  # pixels darker than each value
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    equalized = table.gather(1, pixels)
    return torch.where(step > 0, equalized, pixels).view_as(images).to(images.dtype)


def invert(images: Tensor) -> Tensor:
    """Return 255 - image."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` of the 8, (N,) integers; 8 and more change nothing, 0 counts as 1."""
    step = _per_sample(2.0 ** (8 - bits.clamp(1, 8)))
    return (images / step).floor_() * step


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the values that reach the (N,) threshold; above 255 nothing changes."""
    return torch.where(images < _per_sample(thresholds), images, 255 - images)


def solarize_add(images: Tensor, additions: Tensor) -> Tensor:
    """Add (N,) amounts to the values below 128, up to 255."""
    return torch.where(images < 128, (images + _per_sample(additions)).clamp_(0, 255), images)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(_grey(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey value (cut to a whole number)."""
    grey = _grey(images).to(torch.int64)
    mean = grey.sum((1, 2, 3)) // (grey.shape[2] * grey.shape[3])
    return _blend(_per_sample(mean.to(images.dtype)), images, factors)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black."""
    return (images * _per_sample(factors)).clamp_(0, 255).floor_()


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image smoothed by PIL's SMOOTH kernel; the outer pixels stay."""
    if min(images.shape[-2:]) < 3:
        return images
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    boxes = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = images[:, :, 1:-1, 1:-1]
    degenerate = images.clone()
    degenerate[:, :, 1:-1, 1:-1] = ((boxes + 4 * inner) / 13).floor_()
    return _blend(degenerate, images, factors)


def move(images: Tensor, maps: Tensor) -> Tensor:
    """Apply (N, 2, 3) affine maps, nearest pixel, grey 128 where the image ends."""
    return warp_nearest(images, maps, FILL)


def cut_out(images: Tensor, centers: Tensor, half_sides: Tensor) -> Tensor:
    """Fill squares of side 2 * half_side about (N, 2) centres (y, x) with grey 128."""
    mask = squares(centers, half_sides, half_sides, images.shape[2], images.shape[3])
    return images.masked_fill(mask, FILL)
