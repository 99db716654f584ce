"""Predictions and selections as people take them away: Parquet with whole keys and class names.

The stored files hold in-shard keys and class numbers, because corpora share them; these hold what a
reader without a store needs. All other columns are passed on as they are stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as _parquet  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from storage.parquet_files import arrow, write_table
from storage.samples import sample_key
from storage.selections import Reason, Selection, selection_columns

SCHEMA_VERSION = 1

_pq: Any = _parquet
_METADATA = {"selftrain.published": str(SCHEMA_VERSION)}
_TARGET_COLUMNS = ("target_ids", "target_log_probs", "rest_mass")


def published_predictions(
    data: bytes, *, stem: str, class_names: Sequence[str], has_log_probs: bool = True
) -> bytes:
    """Return a shard's stored predictions as a file to give away.

    Args:
        data: the stored Parquet file, already checked.
        stem: of the shard, which goes before every key.
        class_names: by class number; they become the column `label`, the numbers `label_id`.
        has_log_probs: keep the columns that hold lists, and `logsumexp`; else a row is some 40
            bytes.
    """
    table = _read(data)
    columns = _named({n: table.column(n) for n in ("key", "label")}, stem, class_names)
    for name in table.column_names:
        # What is known of the truth is for diagnosis; these files are trained on.
        if name in ("key", "label", "true_label"):
            continue
        values = table.column(name)
        is_list = arrow.types.is_list(values.type) or arrow.types.is_fixed_size_list(values.type)
        if has_log_probs or not (is_list or name == "logsumexp"):
            columns[name] = values
    return _written(columns)


def published_selection(
    selection: Selection,
    *,
    stem: str,
    class_names: Sequence[str],
    confidences: NDArray[np.float32],
    has_rejected: bool = False,
) -> bytes:
    """Return the selection of a shard as a file to give away.

    Args:
        selection: of the shard.
        stem: of the shard, which goes before every key.
        class_names: by class number.
        confidences: (N,) in the selection's order, as the threshold saw them.
        has_rejected: keep the rejected rows, too, with the columns `kept` and `reason` (a name).
    """
    stored = selection_columns(selection)
    columns = _named(stored, stem, class_names)
    columns["confidence"] = arrow.array(confidences, type=arrow.float32())
    columns["copies"] = stored["copies"]
    columns["weight"] = arrow.array(selection.weight)
    columns |= {name: stored[name] for name in _TARGET_COLUMNS if name in stored}
    kept = arrow.array(selection.kept)
    if has_rejected:
        reasons = {int(reason): reason.name.lower() for reason in Reason}
        columns["kept"] = kept
        columns["reason"] = arrow.array([reasons[n] for n in selection.reason.tolist()])
        return _written(columns)
    return _written(columns, kept)


def _read(data: bytes) -> Any:
    return _pq.ParquetFile(arrow.BufferReader(data), page_checksum_verification=True).read()


def _named(stored: Mapping[str, Any], stem: str, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the columns that every published file begins with, made of stored ones."""
    label = stored["label"]
    return {
        "key": arrow.array([sample_key(stem, key) for key in stored["key"].to_pylist()]),
        "label": arrow.array([class_names[number] for number in label.to_pylist()]),
        "label_id": label,
    }


def _written(columns: dict[str, Any], mask: Any = None) -> bytes:
    table = arrow.table(columns)
    if mask is not None:
        table = table.filter(mask)
    return write_table(table.replace_schema_metadata(_METADATA))
