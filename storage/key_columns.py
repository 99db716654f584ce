"""In-shard keys as they lie in a Parquet file: made Python strings only where one asks."""

from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from storage.parquet_files import arrow


class KeyColumn(Sequence[str]):
    """N in-shard keys, unique and not empty, for that was checked when the file was written.

    Attributes:
        values: the arrow array of strings.
    """

    def __init__(self, values: Any) -> None:
        """Take an arrow array, chunked or not."""
        if isinstance(values, arrow.ChunkedArray):
            # Combining copies even a single chunk.
            values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
        self.values: Any = values

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "KeyColumn": ...
    def __getitem__(self, index: int | slice) -> "str | KeyColumn":
        """Return one key, or the column of some."""
        if isinstance(index, slice):
            return KeyColumn(self.values[index])
        return cast("str", self.values[index].as_py())

    def __iter__(self) -> Iterator[str]:
        """Yield the keys in their order."""
        return iter(cast("list[str]", self.values.to_pylist()))

    def of_rows(self, rows: NDArray[np.intp]) -> list[str]:
        """Return the keys of some rows."""
        return [key.decode() for key in self.utf8_of_rows(rows)]

    def utf8_of_rows(self, rows: NDArray[np.intp]) -> list[bytes]:
        """Return the keys of some rows as UTF-8."""
        if not len(rows):
            return []
        # Not by arrow's `take`, the first of which in a process takes longer than all others.
        _, offsets, data = self.values.buffers()
        ends = np.frombuffer(offsets, np.int32)[self.values.offset :]
        starts, stops = ends[rows], ends[rows + 1]
        width = int(stops[0] - starts[0])
        if (stops - starts == width).all():
            # From each byte on as many as a key has: numpy picks the keys among these.
            windows = np.ndarray((data.size - width + 1,), f"V{width}", data, strides=(1,))
            return cast("list[bytes]", windows[starts].tolist())
        text = cast("bytes", data.to_pybytes())
        spans = zip(starts.tolist(), stops.tolist(), strict=True)
        return [text[start:stop] for start, stop in spans]
