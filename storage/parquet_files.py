"""Parquet as we write and read it: the same bytes for the same table, and nothing unexpected."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as _parquet  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from storage.manifest import StoredObject, read_stored
from storage.objects import local_path
from storage.store import Store

arrow: Any = pyarrow
"""pyarrow, which has no types of its own."""
_pq: Any = _parquet

ROW_GROUP_ROWS = 65_536
ZSTD_LEVEL = 3


def write_table(
    table: Any,
    *,
    compression: str | dict[str, str] = "zstd",
    compression_level: int | dict[str, int] = ZSTD_LEVEL,
    encodings: dict[str, str] | None = None,
    has_statistics: bool = True,
    has_checksums: bool = True,
) -> bytes:
    """Return a Parquet file's bytes: fixed settings, no time of writing.

    Args:
        table: to be written.
        compression: of all columns, or of each by its path in the schema.
        compression_level: in the same way; of columns that have one.
        encodings: of some columns by path, where it is not PLAIN.
        has_statistics: write the least and the greatest value of each column and row group.
        has_checksums: write a checksum of each page, for those who read parts of the file.
    """
    buffer = arrow.BufferOutputStream()  # written without Python, and so without its lock
    _pq.write_table(
        table,
        buffer,
        row_group_size=ROW_GROUP_ROWS,
        compression=compression,
        compression_level=compression_level,
        column_encoding=encodings,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=False,
        write_page_checksum=has_checksums,
        write_statistics=has_statistics,
    )
    return cast("bytes", buffer.getvalue().to_pybytes())


def read_table(data: bytes, *, schema: Any, num_rows: int, where: str) -> Any:
    """Read a file that must have this schema, version included, and this many rows.

    Raises: ValueError, naming `where`, if it has not, before any data is read.
    """
    try:
        return _checked(arrow.BufferReader(data), schema, num_rows, where).read()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a readable Parquet file: {error}") from error


def column_names(data: bytes, *, where: str) -> list[str]:
    """Return the names of a file's columns, for files whose columns depend on their content.

    Raises: ValueError, naming `where`, if it is not Parquet.
    """
    try:
        return list(_pq.read_schema(arrow.BufferReader(data)).names)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a readable Parquet file: {error}") from error


class OpenTable:
    """A file of which columns are read as they are asked for, their pages checked."""

    def __init__(self, reopen: Any, file: Any) -> None:
        """Take an open file, and what opens it anew from bytes that were read whole."""
        self._reopen, self._file = reopen, file

    def read(self, columns: Sequence[str]) -> Any:
        """Return a table of these columns.

        Raises: CorruptObject if what is stored is damaged.
        """
        try:
            return self._file.read(columns=list(columns), use_threads=False)
        except (arrow.ArrowException, OSError):
            self._file = self._reopen()
            return self._file.read(columns=list(columns), use_threads=False)


def open_table(
    store: Store, stored: StoredObject, whole: bytes | None, *, schema: Any, num_rows: int
) -> OpenTable:
    """Open a stored file that must have this schema, version included, and this many rows.

    Args:
        store: where it is.
        stored: its reference.
        whole: its bytes, where they were read and verified; None to read parts of it only. Where a
            part cannot be read, the file is read whole and verified, which tells what is wrong.
        schema: wanted.
        num_rows: wanted.
    Raises: CorruptObject if it is damaged; ValueError for another schema or count.
    """
    where = store.url_of(stored.path)

    def reopen() -> Any:
        return of_verified(read_stored(store, stored))

    def of_verified(data: bytes) -> Any:
        return _checked(arrow.BufferReader(data), schema, num_rows, where, is_verified=True)

    if whole is not None:
        return OpenTable(reopen, of_verified(whole))
    try:
        local = local_path(where)
        part = (
            store.open(stored.path, size=stored.size)
            if local is None
            else arrow.OSFile(str(local))  # read without Python, and so without its lock
        )
        return OpenTable(reopen, _checked(part, schema, num_rows, where))
    except (arrow.ArrowException, OSError, ValueError):
        return OpenTable(reopen, reopen())


def _checked(
    source: Any, schema: Any, num_rows: int, where: str, *, is_verified: bool = False
) -> Any:
    file = _pq.ParquetFile(source, page_checksum_verification=not is_verified)
    there = file.schema_arrow  # made anew each time it is asked for
    if not there.equals(schema, check_metadata=False):
        raise ValueError(f"{where}: columns {there}, not {schema}")
    if (found := _version(there)) != (wanted := _version(schema)):
        raise ValueError(f"{where}: version {found}, not {wanted}: upgrade selftrain")
    if file.metadata.num_rows != num_rows:
        raise ValueError(f"{where}: {file.metadata.num_rows} rows, not {num_rows}")
    return file


def _version(schema: Any) -> dict[bytes, bytes]:
    metadata: dict[bytes, bytes] = dict(schema.metadata or {})
    return {name: value for name, value in metadata.items() if name.startswith(b"selftrain.")}


def fixed_lists(values: NDArray[Any], kind: Any) -> Any:
    """Return the arrow array of a matrix (N, W), whose type `kind` is a list of W."""
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(flat, type=kind)


def matrix(table: Any, name: str) -> NDArray[Any]:
    """Return a column of lists of one length W as an array (N, W)."""
    values = table.column(name).combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), values.type.list_size)


def column(table: Any, name: str) -> NDArray[Any]:
    """Return a column as an array; texts as objects."""
    return np.asarray(table.column(name).to_numpy())
