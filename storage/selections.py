"""Selections: which samples of a shard are kept, why not, how often, and with what target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from storage.key_columns import KeyColumn
from storage.parquet_files import arrow, column, column_names, read_table, write_table

SCHEMA_VERSION = 2
"""Columns that say nothing of any row are left out; 1 had all of them, and `kept`."""

MAX_COPIES = 2**16 - 1


class Reason(IntEnum):
    """Why a sample is not kept: the first rule, in the order of selection, that turned it down.

    The numbers are stored; a new reason gets a new number.
    """

    KEPT = 0
    BELOW_THRESHOLD = 1
    OVER_QUOTA = 2
    LEAKED = 3
    OUT_OF_DOMAIN = 4
    QUARANTINED = 5


_FIELDS: dict[str, Any] = {
    "key": arrow.string(),
    "reason": arrow.int8(),
    "copies": arrow.uint16(),
    "label": arrow.uint32(),
    "weight": arrow.float32(),
    "target_ids": arrow.list_(arrow.field("element", arrow.uint32(), nullable=False)),
    "target_log_probs": arrow.list_(arrow.field("element", arrow.float16(), nullable=False)),
    "rest_mass": arrow.float32(),
}
_ALWAYS = ("key", "reason", "copies", "label")
_TARGETS = ("target_ids", "target_log_probs", "rest_mass")
_SCALARS = ("kept", "reason", "copies", "weight", "label", "rest_mass")
_TYPES_OF_SCALARS = {name: _FIELDS.get(name, arrow.bool_()) for name in _SCALARS}
# Of version 1, which is read as before: all columns, and one more that follows from `reason`.
_FIELDS_OF_1 = ("key", "kept", "reason", "copies", "weight", "label", *_TARGETS)
# Small numbers are packed in a few bits each, which is shorter than compressing them and takes a
# third of its time. Classes and weights of rows are no shorter compressed, soft targets most of
# their file. For the rest LZ4 takes half the time of zstd.
_ENCODINGS: dict[str, str] = dict.fromkeys(("reason", "copies"), "DELTA_BINARY_PACKED")
_COMPRESSION = {
    "key": "lz4",
    "reason": "none",
    "copies": "none",
    "label": "none",
    "weight": "none",
    "target_ids.list.element": "zstd",
    "target_log_probs.list.element": "zstd",
    "rest_mass": "lz4",
}
_LEVELS = {"target_ids.list.element": 1, "target_log_probs.list.element": 1}


def _schema(names: Sequence[str], version: int = SCHEMA_VERSION) -> Any:
    fields = [arrow.field(n, _FIELDS.get(n, arrow.bool_()), nullable=False) for n in names]
    return arrow.schema(fields, metadata={"selftrain.selection": str(version)})


@dataclass(frozen=True, slots=True)
class Selection:
    """The selection of one shard, in the shard's order; every sample has a row.

    Soft targets are sparse: row i owns `target_ids[target_offsets[i]:target_offsets[i + 1]]`, and
    hard ones own none; a sample with several hard labels owns these, in equal parts.

    Attributes:
        keys: N in-shard keys, unique; a `KeyColumn` is written as it is.
        kept: (N,) bool.
        reason: (N,) int8 of `Reason`; KEPT where kept, another where not.
        copies: (N,) uint16, at least 1 where kept, 0 where not.
        weight: (N,) float32, at least 0, of the sample in the loss.
        label: (N,) uint32, the hard target.
        target_offsets: (N + 1,) int64, ascending from 0.
        target_ids: (M,) uint32 classes.
        target_log_probs: (M,) float16, natural logarithm, at most 0.
        rest_mass: (N,) float32 in [0, 1], probability of the classes that are not in target_ids.
    """

    keys: Sequence[str]
    kept: NDArray[np.bool_]
    reason: NDArray[np.int8]
    copies: NDArray[np.uint16]
    weight: NDArray[np.float32]
    label: NDArray[np.uint32]
    target_offsets: NDArray[np.int64]
    target_ids: NDArray[np.uint32]
    target_log_probs: NDArray[np.float16]
    rest_mass: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        keys: Sequence[str],
        *,
        reason: NDArray[np.integer[Any]],
        copies: NDArray[np.integer[Any]],
        weight: NDArray[np.floating[Any]],
        label: NDArray[np.integer[Any]],
        log_probs: NDArray[np.floating[Any]] | None = None,
        class_ids: NDArray[np.integer[Any]] | None = None,
        rest_mass: NDArray[np.floating[Any]] | None = None,
    ) -> "Selection":
        """Make a selection with hard targets or, from log_probs, soft ones.

        Soft targets are kept for kept samples only. `kept` follows from `reason`, and where not
        kept, copies and weight become 0.

        Args:
            keys: N in-shard keys.
            reason: (N,) of `Reason`.
            copies: (N,).
            weight: (N,), finite.
            label: (N,).
            log_probs: (N, C) of all classes, or (N, k) of those in `class_ids`.
            class_ids: (N, k); None where all classes are there in their order.
            rest_mass: (N,) of the classes that are not in `class_ids`; None for none.
        """
        n = len(keys)
        kept = reason == Reason.KEPT
        rest, offsets = np.zeros(n, np.float32), np.zeros(n + 1, np.int64)
        if log_probs is None:
            ids, values = np.zeros(0, np.uint32), np.zeros(0, np.float16)
        else:
            width = log_probs.shape[1]
            np.cumsum(np.where(kept, width, 0), out=offsets[1:])
            if class_ids is None:
                ids = np.tile(np.arange(width, dtype=np.uint32), int(kept.sum()))
            else:
                ids = class_ids[kept].astype(np.uint32).reshape(-1)
            values = log_probs[kept].astype(np.float16).reshape(-1)
            if rest_mass is not None:
                rest = np.where(kept, rest_mass, 0).astype(np.float32)
        return cls(
            keys=keys if isinstance(keys, KeyColumn) else tuple(keys),
            kept=kept,
            reason=reason.astype(np.int8, copy=False),
            copies=(copies * kept).astype(np.uint16, copy=False),
            weight=(weight * kept).astype(np.float32, copy=False),  # a tenth of the time of `where`
            label=label.astype(np.uint32, copy=False),
            target_offsets=offsets,
            target_ids=ids,
            target_log_probs=values,
            rest_mass=rest,
        )

    @classmethod
    def of_several(
        cls,
        keys: Sequence[str],
        *,
        reason: NDArray[np.integer[Any]],
        weight: NDArray[np.floating[Any]],
        label: NDArray[np.integer[Any]],
        rows: NDArray[np.integer[Any]],
        classes: NDArray[np.integer[Any]],
    ) -> "Selection":
        """Make a selection in which a sample may have several classes, and a copy for each.

        The target of every copy is uniform over the sample's classes, so that the loss of all
        copies is the sum of the classes' losses. Of one class it is hard.

        Args:
            keys: N in-shard keys.
            reason: (N,) of `Reason`, KEPT for the samples in `rows` and no others.
            weight: (N,).
            label: (N,) of the samples that are not kept.
            rows: (M,) ascending, the sample that each class is of.
            classes: (M,) of falling probability within a sample, the first becomes its label.
        """
        copies = np.bincount(rows, minlength=len(keys))
        made = cls.of(keys, reason=reason, copies=copies, weight=weight, label=label)
        labels = made.label.copy()
        found, first = np.unique(rows, return_index=True)
        labels[found] = classes[first]
        lengths = np.where(copies > 1, copies, 0)
        of_several = copies[rows] > 1
        return replace(
            made,
            label=labels,
            target_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            target_ids=classes[of_several].astype(np.uint32),
            target_log_probs=-np.log(copies[rows][of_several]).astype(np.float16),
        )

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.keys)

    @property
    def num_listed(self) -> int:
        """Probabilities that the targets of all copies list; a hard target lists one."""
        if not len(self.target_ids):
            return int(self.copies.sum())
        listed = np.maximum(np.diff(self.target_offsets), 1)
        return int((listed * self.copies).sum())

    def dense_targets(self, num_classes: int) -> NDArray[np.float32]:
        """Return (N, C) probabilities, rows summing to 1, for hard and soft targets alike.

        The rest mass is spread evenly over the classes that are not in target_ids.
        """
        n = self.num_samples
        lengths = np.diff(self.target_offsets)
        soft = lengths > 0
        listed = np.zeros((n, num_classes), np.bool_)
        targets = np.zeros((n, num_classes), np.float32)
        rows = np.repeat(np.arange(n), lengths)
        listed[rows, self.target_ids] = True
        targets[rows, self.target_ids] = np.exp(self.target_log_probs.astype(np.float32))
        share = self.rest_mass / np.maximum(num_classes - lengths, 1)
        targets += np.where(listed, 0, share[:, None]) * soft[:, None]
        targets[~soft, self.label[~soft]] = 1.0
        return (targets / targets.sum(axis=1, keepdims=True)).astype(np.float32)

    def reason_counts(self) -> dict[str, int]:
        """Return reason's name in lower case -> samples, those that occur."""
        counts = np.bincount(self.reason, minlength=len(Reason))
        return {one.name.lower(): int(counts[one]) for one in Reason if counts[one]}


def check_selection(selection: Selection) -> None:
    """Refuse a selection that contradicts itself.

    Raises: ValueError, naming the first key.
    """
    s = selection
    n = s.num_samples
    for name, kind in _TYPES_OF_SCALARS.items():
        values = cast("NDArray[Any]", getattr(s, name))
        if values.shape != (n,) or values.dtype != np.dtype(kind.to_pandas_dtype()):
            raise ValueError(f"{name} must be ({n},) {kind}, not {values.shape} {values.dtype}")
    if s.target_offsets.shape != (n + 1,) or s.target_offsets[0] != 0:
        raise ValueError(f"target_offsets must be ({n + 1},) from 0, not {s.target_offsets.shape}")
    num_values = int(s.target_offsets[-1])
    if len(s.target_ids) != num_values or len(s.target_log_probs) != num_values:
        raise ValueError(
            f"targets must have {num_values} ids and values, not {len(s.target_ids)} and "
            f"{len(s.target_log_probs)}"
        )
    if s.target_offsets.any() and (np.diff(s.target_offsets) < 0).any():
        raise ValueError("target_offsets must not decrease")
    if not (s.target_log_probs <= 0).all():
        raise ValueError("target_log_probs must be at most 0 and not NaN")
    # A column comes from a verified file of predictions, whose writer has looked at its keys.
    if not isinstance(s.keys, KeyColumn) and (len(set(s.keys)) != n or "" in s.keys):
        raise ValueError("keys must be unique and not empty")
    for what, bad in (
        ("the reason is unknown", (s.reason < 0) | (s.reason >= len(Reason))),
        ("kept contradicts the reason", s.kept != (s.reason == Reason.KEPT)),
        ("copies must be at least 1 where kept and 0 elsewhere", s.kept != (s.copies > 0)),
        ("the weight is negative or not finite", ~(np.isfinite(s.weight) & (s.weight >= 0))),
        ("the rest mass is not in [0, 1]", ~((s.rest_mass >= 0) & (s.rest_mass <= 1.001))),
    ):
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {n} rows are refused: {what}; first key "
                f"{s.keys[int(bad.argmax())]!r}"
            )


def selection_columns(selection: Selection) -> dict[str, Any]:
    """Return name -> arrow array of what a selection says of its rows, in the order of the schema.

    `weight` is left out where it is 1 for all that are kept, and targets where all are hard.
    """
    names: list[str] = [*_ALWAYS]
    if not np.array_equal(selection.weight, selection.kept):
        names.append("weight")
    if len(selection.target_ids) or selection.rest_mass.any():
        names += _TARGETS
    offsets = arrow.array(selection.target_offsets.astype(np.int32)) if "rest_mass" in names else 0
    columns: dict[str, Any] = {}
    for name in names:
        kind, values = _FIELDS[name], getattr(selection, "keys" if name == "key" else name)
        if arrow.types.is_list(kind):
            values = arrow.array(values, type=kind.value_type)
            columns[name] = arrow.ListArray.from_arrays(offsets, values, type=kind)
        elif isinstance(values, KeyColumn):
            columns[name] = values.values
        else:
            columns[name] = arrow.array(values, type=kind)
    return columns


def to_parquet(selection: Selection) -> bytes:
    """Return the file's bytes, the same for the same selection."""
    check_selection(selection)
    columns = selection_columns(selection)
    table = arrow.Table.from_arrays(list(columns.values()), schema=_schema(list(columns)))
    paths = {n for n in _COMPRESSION if n.split(".")[0] in columns}
    # Read whole, by the sha256, and by nobody who would skip rows by their statistics.
    return write_table(
        table,
        compression={path: _COMPRESSION[path] for path in paths},
        compression_level={path: _LEVELS[path] for path in paths if path in _LEVELS},
        encodings=_ENCODINGS,
        has_statistics=False,
        has_checksums=False,
    )


def from_parquet(data: bytes, *, num_samples: int, where: str = "selection") -> Selection:
    """Read a selection of that many samples, and check it.

    Raises: ValueError, naming `where`, for another schema or count and for contradictions.
    """
    table = read_table(
        data, schema=_schema_of(column_names(data, where=where)), num_rows=num_samples, where=where
    )
    n = num_samples
    there = [name for name in table.column_names if name in _SCALARS]
    found: dict[str, Any] = {name: column(table, name) for name in there}
    kept = found["reason"] == Reason.KEPT
    absent: dict[str, Any] = {
        "kept": kept,
        "weight": kept.astype(np.float32),
        "rest_mass": np.zeros(n, np.float32),
    }
    offsets, ids, values = (
        np.zeros(n + 1, np.int64),
        np.zeros(0, np.uint32),
        np.zeros(0, np.float16),
    )
    if "rest_mass" in found:
        lists, of_values = (table.column(name).combine_chunks() for name in _TARGETS[:2])
        lengths = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), np.int64)
        if not np.array_equal(lengths, of_values.value_lengths().to_numpy(zero_copy_only=False)):
            raise ValueError(f"{where}: target_ids and target_log_probs differ in length")
        np.cumsum(lengths, out=offsets[1:])
        ids = lists.flatten().to_numpy(zero_copy_only=False)
        values = of_values.flatten().to_numpy(zero_copy_only=False)
    selection = Selection(
        keys=tuple(cast("list[str]", table.column("key").to_pylist())),
        target_offsets=offsets,
        target_ids=ids,
        target_log_probs=values,
        **absent | found,
    )
    try:
        check_selection(selection)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return selection


def _schema_of(names: Sequence[str]) -> Any:
    """Return what a file with these columns must have as its schema."""
    if "kept" in names:
        return _schema(_FIELDS_OF_1, version=1)
    has_targets = any(name in names for name in _TARGETS)
    wanted = [*_ALWAYS, *(["weight"] if "weight" in names else []), *(_TARGETS * has_targets)]
    return _schema(wanted)
