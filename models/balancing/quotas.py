"""How many samples a class is to have, and how fractions of copies become whole ones."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def resolved_quota(k: int | Literal["median"], class_counts: NDArray[np.int64]) -> int:
    """The quota as a number.

    Args:
        k: given, or "median": the median of the counts above 0, halves rounded up.
        class_counts: (C,) samples of each class that passed the threshold.
    Returns: at least 1, also where no class has any.
    """
    if k != "median":
        return k
    present = class_counts[class_counts > 0]
    return max(1, math.floor(float(np.median(present)) + 0.5)) if len(present) else 1


def expected_copies(
    quota: int | NDArray[np.int64],
    available: NDArray[np.int64],
    *,
    upsample: bool,
    max_copies: int,
) -> NDArray[np.float64]:
    """Copies of each sample so that a class of `available` samples comes to `quota`.

    Returns: (C,) quota / available, at most `max_copies`, at most 1 without `upsample`; 0 for a
        class with nothing.
    """
    limit = float(max_copies if upsample else 1)
    ratio = quota / np.maximum(available, 1)
    return np.where(available > 0, np.minimum(ratio, limit), 0.0)


def randomly_rounded(
    expected: NDArray[np.float64], uniforms: NDArray[np.floating]
) -> NDArray[np.uint16]:
    """Whole numbers with the given expectations: floor, plus 1 where the draw is below the rest.

    Args:
        expected: (N,) in [0, 65535].
        uniforms: (N,) in [0, 1).
    """
    if uniforms.shape != expected.shape:
        raise ValueError(f"{uniforms.shape} draws for {expected.shape} rows: need one a row")
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError("draws must lie in [0, 1)")
    whole = np.floor(expected)
    return (whole + (uniforms < expected - whole)).astype(np.uint16)
