"""Arrays of counts in JSON records: as lists of numbers they would be most of a record's cost."""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray

_LITTLE_ENDIAN = "<i8"
_FAST = 1


def to_text(values: NDArray[np.int64]) -> str:
    """Return int64 values of any shape as base64 of zlib of little-endian bytes."""
    if values.dtype != np.int64:
        raise ValueError(f"values of dtype {values.dtype}: must be int64")
    data = zlib.compress(values.astype(_LITTLE_ENDIAN).tobytes(), _FAST)
    return base64.b64encode(data).decode("ascii")


def from_text(text: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the values in their shape.

    Raises: ValueError if they are not as many.
    """
    flat = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=_LITTLE_ENDIAN)
    return flat.astype(np.int64).reshape(shape)
