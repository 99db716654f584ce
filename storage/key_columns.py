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
        _, offsets, data = self.values.buffers()
        ends = np.frombuffer(offsets, np.int32)[self.values.offset :]
        text = cast("bytes", data.to_pybytes())
        spans = zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)
        return [text[start:end] for start, end in spans]
