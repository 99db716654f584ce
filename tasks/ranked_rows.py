"""The rows that passes rank, kept from one pass to the next in a file without a name.

They are a few bytes a row of what is read for them, and up to three passes look at them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_HEADER = np.dtype(np.int64)
_HEADER_BYTES = 3 * _HEADER.itemsize
_ROW_BYTES = 16
"""At most, of a class and a value."""


@dataclass(frozen=True)
class RankedRows:
    """Classes and values of the rows of each shard that pass, in their order.

    What cannot be kept, because the disk is full, is not there when it is asked for.

    Attributes:
        descriptor: of an open file of the selection's own, one number in all its processes.
        places: stem -> where its rows are in the file.
    """

    descriptor: int
    places: Mapping[str, int]

    @classmethod
    def of(cls, descriptor: int, most_rows: Iterable[tuple[str, int]]) -> "RankedRows":
        """Give each shard a place.

        Args:
            descriptor: of an empty file; what is not written of it takes no room.
            most_rows: stem and the most rows that it may have, of each shard.
        """
        places: dict[str, int] = {}
        end = 0
        for stem, num_rows in most_rows:
            places[stem] = end
            end += _HEADER_BYTES + num_rows * _ROW_BYTES
        return cls(descriptor, places)

    def of_shards(self, stems: Sequence[str]) -> "RankedRows":
        """Return where those of some shards are."""
        return RankedRows(self.descriptor, {stem: self.places[stem] for stem in stems})

    def keep(self, stem: str, labels: NDArray[np.integer], values: NDArray[np.floating]) -> None:
        """Keep the class and the value of each row, (M,) each."""
        place = self.places[stem]
        size = labels.nbytes + values.nbytes
        kinds = [ord(labels.dtype.char), ord(values.dtype.char)]
        header = np.array([len(labels) + 1, *kinds], _HEADER).tobytes()
        with suppress(OSError):
            # The header last: what a process that dies has begun is not there.
            columns = [labels.data, values.data]
            if os.pwritev(self.descriptor, columns, place + _HEADER_BYTES) == size:
                os.pwrite(self.descriptor, header, place)

    def kept(self, stem: str) -> tuple[NDArray[np.integer], NDArray[np.floating]] | None:
        """Return the class and the value of each row, or None where they are not kept."""
        place = self.places[stem]
        header = os.pread(self.descriptor, _HEADER_BYTES, place)
        if len(header) < _HEADER_BYTES:
            return None
        following, *kinds = np.frombuffer(header, _HEADER).tolist()
        if following == 0:  # nothing was written here
            return None
        num_rows = following - 1
        of_labels, of_values = (np.dtype(chr(kind)) for kind in kinds)
        size = num_rows * (of_labels.itemsize + of_values.itemsize)
        data = os.pread(self.descriptor, size, place + _HEADER_BYTES)
        labels = np.frombuffer(data, of_labels, num_rows)
        return labels, np.frombuffer(data, of_values, num_rows, num_rows * of_labels.itemsize)
