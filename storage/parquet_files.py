"""Parquet as we write and read it: the same bytes for the same table, and nothing unexpected."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as _parquet  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

arrow: Any = pyarrow
"""pyarrow, which has no types of its own."""
_pq: Any = _parquet

ROW_GROUP_ROWS = 65_536
ZSTD_LEVEL = 3


def write_table(table: Any) -> bytes:
    """Return a Parquet file's bytes: fixed settings, no time of writing, a checksum per page."""
    buffer = io.BytesIO()
    _pq.write_table(
        table,
        buffer,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=False,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def read_table(
    data: bytes,
    *,
    schema: Any,
    num_rows: int,
    where: str,
    columns: Sequence[str] | None = None,
) -> Any:
    """Read a file that must have this schema, version included, and this many rows.

    Raises: ValueError, naming `where`, if it has not, before any data is read.
    """
    try:
        file = _pq.ParquetFile(arrow.BufferReader(data), page_checksum_verification=True)
        if not file.schema_arrow.equals(schema, check_metadata=False):
            raise ValueError(f"{where}: columns {file.schema_arrow}, not {schema}")
        if (found := _version(file.schema_arrow)) != (wanted := _version(schema)):
            raise ValueError(f"{where}: version {found}, not {wanted}: upgrade selftrain")
        if file.metadata.num_rows != num_rows:
            raise ValueError(f"{where}: {file.metadata.num_rows} rows, not {num_rows}")
        return file.read(columns=None if columns is None else list(columns))
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


def _version(schema: Any) -> dict[bytes, bytes]:
    metadata: dict[bytes, bytes] = dict(schema.metadata or {})
    return {name: value for name, value in metadata.items() if name.startswith(b"selftrain.")}


def column(table: Any, name: str) -> NDArray[Any]:
    """Return a column as an array; texts as objects."""
    return np.asarray(table.column(name).to_numpy())
