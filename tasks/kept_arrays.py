"""Arrays of each shard, kept from one pass to the next in a file without a name.

They are a few bytes a row of what is read and computed for them, and up to four passes need them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = np.dtype(np.int64)
_MOST_ARRAYS = 6
_HEADER_BYTES = (1 + 2 * _MOST_ARRAYS) * _HEADER.itemsize
"""How many arrays there are, and of each the letter of its dtype and its length."""


@dataclass(frozen=True)
class KeptArrays:
    """A few arrays of each shard.

    What cannot be kept, because the disk is full, is not there when it is asked for.

    Attributes:
        descriptor: of an open file of the selection's own, one number in all its processes.
        places: stem -> where its arrays are in the file.
    """

    descriptor: int
    places: Mapping[str, int]

    @classmethod
    def of(cls, descriptor: int, most_bytes: Iterable[tuple[str, int]]) -> "KeptArrays":
        """Give each shard a place.

        Args:
            descriptor: of an empty file; what is not written of it takes no room.
            most_bytes: stem and the most bytes that its arrays may have together, of each shard.
        """
        places: dict[str, int] = {}
        end = 0
        for stem, num_bytes in most_bytes:
            places[stem] = end
            end += _HEADER_BYTES + num_bytes
        return cls(descriptor, places)

    def of_shards(self, stems: Sequence[str]) -> "KeptArrays":
        """Return where those of some shards are."""
        return KeptArrays(self.descriptor, {stem: self.places[stem] for stem in stems})

    def keep(self, stem: str, arrays: Sequence[NDArray[Any]]) -> None:
        """Keep some arrays (N,), each with its own N, at most six."""
        assert len(arrays) <= _MOST_ARRAYS, f"{len(arrays)} arrays have no room in a header"
        place = self.places[stem]
        # Their number and one: where nothing was written there are zeros.
        header = [len(arrays) + 1]
        for array in arrays:
            header += [ord(array.dtype.char), len(array)]
        written = np.array(header, _HEADER).tobytes()
        parts = [np.ascontiguousarray(array).data for array in arrays]
        size = sum(part.nbytes for part in parts)
        with suppress(OSError):
            # The header last: what a process that dies has begun is not there.
            if os.pwritev(self.descriptor, parts, place + _HEADER_BYTES) == size:
                os.pwrite(self.descriptor, written, place)

    def kept(self, stem: str) -> list[NDArray[Any]] | None:
        """Return the arrays, which cannot be written to, or None where they are not kept."""
        place = self.places[stem]
        data = os.pread(self.descriptor, _HEADER_BYTES, place)
        if len(data) < _HEADER_BYTES:
            return None
        header: list[int] = np.frombuffer(data, _HEADER).tolist()
        num_arrays = header[0] - 1
        if num_arrays < 0:  # nothing was written here
            return None
        kinds = [np.dtype(chr(kind)) for kind in header[1::2][:num_arrays]]
        lengths = header[2::2][:num_arrays]
        sizes = [kind.itemsize * length for kind, length in zip(kinds, lengths, strict=True)]
        data = os.pread(self.descriptor, sum(sizes), place + _HEADER_BYTES)
        arrays: list[NDArray[Any]] = []
        start = 0
        for kind, length, size in zip(kinds, lengths, sizes, strict=True):
            arrays.append(np.frombuffer(data, kind, length, start))
            start += size
        return arrays
