"""Strengths in bins, as torchvision's policies count them."""

import math

import torch
from torch import Tensor

from models.noise.operations import NOTHING, Operation

# torchvision's names; Identity is an operation of TrivialAugment.
OPERATIONS: dict[str, int] = {
    "Identity": NOTHING,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X,
    "TranslateY": Operation.TRANSLATE_Y,
    "Rotate": Operation.ROTATE,
    "Brightness": Operation.BRIGHTNESS,
    "Color": Operation.COLOR,
    "Contrast": Operation.CONTRAST,
    "Sharpness": Operation.SHARPNESS,
    "Posterize": Operation.POSTERIZE,
    "Solarize": Operation.SOLARIZE,
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
}


def argument_table(
    num_bins: int,
    *,
    shear: float,
    pixels_x: float,
    pixels_y: float,
    degrees: float,
    enhancement: float,
    posterize_bits: int,
) -> Tensor:
    """Return (16, num_bins, 2) float32: arguments of operation, bin and sign (1 is negative).

    Args:
        num_bins: from no effect (bin 0) to the full one (the last).
        shear: largest, pixels a row.
        pixels_x: largest translation in x; whole pixels are taken of each bin.
        pixels_y: the same in y.
        degrees: largest rotation.
        enhancement: largest deviation of a factor from 1.
        posterize_bits: most bits that are dropped.
    Source: torchvision.transforms.autoaugment, `_augmentation_space` and `_apply_op`.
    """
    zeros = torch.zeros(num_bins)
    bins = torch.arange(num_bins)
    dropped = (bins / ((num_bins - 1) / posterize_bits)).round()
    signed = {
        Operation.SHEAR_X: torch.linspace(0.0, shear, num_bins),
        Operation.SHEAR_Y: torch.linspace(0.0, shear, num_bins),
        # Content moves by the magnitude, so the position that is read moves the other way.
        Operation.TRANSLATE_X: -torch.linspace(0.0, pixels_x, num_bins).trunc(),
        Operation.TRANSLATE_Y: -torch.linspace(0.0, pixels_y, num_bins).trunc(),
        Operation.ROTATE: torch.linspace(0.0, degrees, num_bins) * (math.pi / 180),
    }
    factors = torch.linspace(0.0, enhancement, num_bins)
    enhanced = (Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS)
    unsigned = {
        Operation.POSTERIZE: 8 - dropped,
        Operation.SOLARIZE: torch.linspace(255.0, 0.0, num_bins),
    }
    table = {operation: (zeros, zeros) for operation in Operation}
    table |= {operation: (values, -values) for operation, values in signed.items()}
    table |= {operation: (1 + factors, 1 - factors) for operation in enhanced}
    table |= {operation: (values, values) for operation, values in unsigned.items()}
    return torch.stack([torch.stack(table[operation], dim=1) for operation in Operation])
