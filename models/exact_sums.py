"""Sums over a corpus that are the same bits in any order and grouping, in memory that stays small.

Floating-point addition is not associative, so a sum over shards would depend on their order. Here
each value becomes a fixed-point number of 64 binary places, held as two words of 32 places, and
words are added as integers: associative, commutative, and exact.
"""

import numpy as np
from numpy.typing import NDArray

_WORD = 2.0**32
_WORD_BITS = 32
_MAX_ROWS = 2**31 - 1  # a value of 1 is 2**32 in the upper word: int64 holds so many of them


def exact_sum(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Map: the sum over rows, (2, D), upper and lower words; add it over shards.

    Args:
        values: (N, D) in [0, 1] (up to 1e-6 above, for rounded sums). What lies below 2**-64 of a
            value is cut off.
    Raises: ValueError for NaN or a value out of range.
    """
    exact = np.asarray(values, dtype=np.float64)
    if exact.ndim != 2 or not ((exact >= 0) & (exact <= 1 + 1e-6)).all():
        raise ValueError(
            f"values of shape {exact.shape}: must be (N, D), all in [0, 1]; were logits given, or "
            "is the model broken?"
        )
    scaled = np.minimum(exact, 1) * _WORD  # a power of two: no digit is lost
    upper = np.floor(scaled)
    lower = np.floor((scaled - upper) * _WORD)
    words = np.stack([upper, lower]).astype(np.int64)  # (2, N, D)
    return words.sum(axis=1)


def exact_mean(sums: NDArray[np.int64], num_rows: int) -> NDArray[np.float64]:
    """Finish: the mean (D,) of all rows, each rounded once.

    Raises: ValueError for no rows, or more than an integer word holds (2**31 - 1).
    """
    if not 1 <= num_rows <= _MAX_ROWS:
        raise ValueError(f"a mean over {num_rows} rows: need 1 to {_MAX_ROWS}")
    return np.array(
        [
            ((int(upper) << _WORD_BITS) + int(lower)) / (num_rows << 2 * _WORD_BITS)
            for upper, lower in sums.T
        ]
    )
