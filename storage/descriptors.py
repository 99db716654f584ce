"""Descriptors: what the images of a shard look like; one Parquet file and one record a shard.

They are addressed by what made them and by the shard's content, and hold in-shard keys only, so
every corpus with this shard, every round and every threshold shares them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from storage import crash_points, manifest
from storage.addresses import descriptor_folder
from storage.manifest import (
    StoredObject,
    check_identity,
    check_schema,
    create_record,
    put_object,
    read_stored,
)
from storage.parquet_files import arrow, fixed_lists, matrix, read_table, write_table
from storage.store import Store

SCHEMA_VERSION = 1
CRASH_KIND = "describe"


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Descriptors of the decodable samples of one shard, in the shard's order.

    Attributes:
        keys: N in-shard keys, unique.
        values: (N, D) float16, finite.
    """

    keys: tuple[str, ...]
    values: NDArray[np.float16]


def descriptors_schema(num_values: int) -> Any:
    """Return the Parquet schema for D values."""
    values = arrow.field("element", arrow.float16(), nullable=False)
    return arrow.schema(
        [
            arrow.field("key", arrow.string(), nullable=False),
            arrow.field("descriptor", arrow.list_(values, num_values), nullable=False),
        ],
        metadata={"selftrain.descriptors": str(SCHEMA_VERSION)},
    )


def to_parquet(descriptors: Descriptors) -> bytes:
    """Return the file's bytes, the same for the same descriptors; raises ValueError if refused."""
    _check(descriptors)
    schema = descriptors_schema(descriptors.values.shape[1])
    columns = [
        arrow.array(descriptors.keys, type=arrow.string()),
        fixed_lists(descriptors.values, schema.field("descriptor").type),
    ]
    return write_table(arrow.Table.from_arrays(columns, schema=schema))


def from_parquet(data: bytes, *, num_samples: int, num_values: int, where: str) -> Descriptors:
    """Read a file of that many rows and values, and check it; raises ValueError naming `where`."""
    schema = descriptors_schema(num_values)
    table = read_table(data, schema=schema, num_rows=num_samples, where=where)
    keys = tuple(cast("list[str]", table.column("key").to_pylist()))
    descriptors = Descriptors(keys, matrix(table, "descriptor"))
    try:
        _check(descriptors)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return descriptors


def record_path(descriptor: str, shard_digest: str) -> str:
    """Return the path of the record of one shard's descriptors."""
    return f"{descriptor_folder(descriptor)}/{shard_digest}.json"


def write_descriptors(
    store: Store,
    descriptor: str,
    shard_digest: str,
    descriptors: Descriptors,
    *,
    bad_samples: Mapping[str, str],
) -> dict[str, Any]:
    """Store the descriptors of a shard and return the record that is there afterwards.

    Another worker's record, if it came first, is the truth: what is returned may name its object.

    Args:
        store: where to.
        descriptor: fingerprint of how images are described.
        shard_digest: sha256 of the shard.
        descriptors: of all its samples that could be decoded.
        bad_samples: in-shard key -> reason of the others.
    """
    data = to_parquet(descriptors)
    folder = descriptor_folder(descriptor)
    stored = put_object(store, folder, shard_digest, data, "parquet", crash_kind=CRASH_KIND)
    crash_points.reach(f"{CRASH_KIND}.between_data_and_record")
    body = {
        "schema": SCHEMA_VERSION,
        "descriptor": descriptor,
        "shard": shard_digest,
        "num_samples": len(descriptors.keys),
        "num_values": descriptors.values.shape[1],
        "object": asdict(stored),
        "bad_samples": dict(bad_samples),
    }
    path = record_path(descriptor, shard_digest)
    there = create_record(store, path, body)
    return _checked_record(there, descriptor, shard_digest, store.url_of(path))


def read_record(store: Store, descriptor: str, shard_digest: str) -> dict[str, Any] | None:
    """Return the record of a shard's descriptors; None if the shard is not described yet."""
    path = record_path(descriptor, shard_digest)
    body = manifest.read_record(store, path)
    if body is None:
        return None
    return _checked_record(body, descriptor, shard_digest, store.url_of(path))


def read_descriptors(store: Store, record: Mapping[str, Any]) -> Descriptors:
    """Read and verify what a record names.

    Raises: CorruptObject for other bytes; ValueError for another schema, count or bad values.
    """
    stored = StoredObject(**record["object"])
    return from_parquet(
        read_stored(store, stored),
        num_samples=record["num_samples"],
        num_values=record["num_values"],
        where=store.url_of(stored.path),
    )


def _checked_record(
    body: dict[str, Any], descriptor: str, shard_digest: str, where: str
) -> dict[str, Any]:
    check_schema(body, SCHEMA_VERSION, where=where)
    check_identity(body, {"descriptor": descriptor, "shard": shard_digest}, where=where)
    return body


def _check(descriptors: Descriptors) -> None:
    keys, values = descriptors.keys, descriptors.values
    if values.ndim != 2 or len(values) != len(keys) or values.dtype != np.float16:
        raise ValueError(
            f"descriptors must be ({len(keys)}, D) float16, not {values.shape} {values.dtype}"
        )
    if len(set(keys)) != len(keys) or "" in keys:
        raise ValueError("keys must be unique and not empty")
    is_bad = ~np.isfinite(values).all(axis=1)
    if is_bad.any():
        raise ValueError(
            f"{int(is_bad.sum())} of {len(keys)} descriptors are NaN or infinite; first key"
            f" {keys[int(is_bad.argmax())]!r}"
        )
