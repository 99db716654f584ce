"""Predictions: one Parquet file and one record per labeler and shard content.

They hold in-shard keys only, so that every corpus with this shard shares them; the stem is joined
from the corpus when they are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from storage import crash_points, manifest
from storage.addresses import prediction_folder
from storage.manifest import StoredObject, check_schema, create_record, put_object, read_stored
from storage.parquet_files import arrow, column, read_table, write_table
from storage.store import Store

SCHEMA_VERSION = 1
CRASH_KIND = "label"
UNKNOWN_LABEL = -1

SCHEMA: Any = arrow.schema(
    [
        arrow.field("key", arrow.string(), nullable=False),
        arrow.field("label", arrow.uint32(), nullable=False),
        arrow.field("confidence", arrow.float32(), nullable=False),
        arrow.field("margin", arrow.float32(), nullable=False),
        arrow.field("entropy", arrow.float32(), nullable=False),
        arrow.field("logsumexp", arrow.float32(), nullable=False),
        arrow.field("true_label", arrow.int32(), nullable=False),
    ],
    metadata={"selftrain.predictions": str(SCHEMA_VERSION)},
)
"""The columns but `log_probs`, a list of C half floats, whose type depends on the classes."""

# Half floats of log-probabilities near 0 to -8 are off by at most 2**-9, so a row's sum by 0.2 %.
_SUM_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions for the samples of one shard, in the shard's order.

    Attributes:
        keys: N in-shard keys, unique.
        label: (N,) uint32, class of the largest probability.
        confidence: (N,) float32 in [0, 1], its probability.
        margin: (N,) float32 in [0, 1], over the second largest.
        entropy: (N,) float32, nats, at least 0.
        log_probs: (N, C) float16, natural logarithm; rows of exp sum to 1.
        logsumexp: (N,) float32 of the logits, so that logits = log_probs + logsumexp.
        true_label: (N,) int32, -1 where unknown. For diagnosis: never given to a selection rule.
    """

    keys: tuple[str, ...]
    label: NDArray[np.uint32]
    confidence: NDArray[np.float32]
    margin: NDArray[np.float32]
    entropy: NDArray[np.float32]
    log_probs: NDArray[np.float16]
    logsumexp: NDArray[np.float32]
    true_label: NDArray[np.int32]

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.keys)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.log_probs.shape[1]


def predictions_schema(num_classes: int) -> Any:
    """Return the Parquet schema for C classes."""
    values = arrow.field("element", arrow.float16(), nullable=False)
    field = arrow.field("log_probs", arrow.list_(values, num_classes), nullable=False)
    return SCHEMA.insert(5, field)


def check_predictions(predictions: Predictions) -> None:
    """Refuse what no labeler can have meant.

    Raises: ValueError, naming the first key, for NaN, infinities, a wrong shape or type, a class
        or a probability out of range, rows that do not sum to 1, empty or repeated keys.
    """
    p = predictions
    n = len(p.keys)
    if p.log_probs.ndim != 2 or p.log_probs.shape[0] != n or p.log_probs.dtype != np.float16:
        raise ValueError(
            f"log_probs must be ({n}, C) float16, not {p.log_probs.shape} {p.log_probs.dtype}"
        )
    for field in SCHEMA:
        if field.name == "key":
            continue
        values = cast("NDArray[Any]", getattr(p, field.name))
        if values.shape != (n,) or values.dtype != field.type.to_pandas_dtype():
            raise ValueError(
                f"{field.name} must be ({n},) {field.type}, not {values.shape} {values.dtype}"
            )
    if len(set(p.keys)) != n or "" in p.keys:
        repeated = next((k for i, k in enumerate(p.keys) if k in p.keys[:i]), "")
        raise ValueError(f"keys must be unique and not empty; {repeated!r} is not")
    log_probs = p.log_probs.astype(np.float32)
    sums = np.exp(np.where(np.isnan(log_probs), -np.inf, log_probs)).sum(axis=1)
    for what, bad in (
        ("a value is NaN or infinite", ~_finite_rows(p)),
        (f"the label is not below {p.num_classes}", p.label >= p.num_classes),
        ("the true label is not a class", (p.true_label < -1) | (p.true_label >= p.num_classes)),
        ("the confidence is not in [0, 1]", (p.confidence < 0) | (p.confidence > 1.0001)),
        ("the margin is not in [0, 1]", (p.margin < 0) | (p.margin > 1.0001)),
        ("the entropy is negative", p.entropy < -0.0001),
        ("the probabilities do not sum to 1", np.abs(sums - 1) > _SUM_TOLERANCE),
    ):
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {n} predictions are refused: {what}; first key "
                f"{p.keys[int(bad.argmax())]!r}"
            )


def _finite_rows(p: Predictions) -> NDArray[np.bool_]:
    finite = np.isfinite(p.log_probs).all(axis=1)
    for values in (p.confidence, p.margin, p.entropy, p.logsumexp):
        finite &= np.isfinite(values)
    return finite


def to_parquet(predictions: Predictions) -> bytes:
    """Return the file's bytes, the same for the same predictions."""
    check_predictions(predictions)
    schema = predictions_schema(predictions.num_classes)
    flat = arrow.array(np.ascontiguousarray(predictions.log_probs).reshape(-1))
    columns: list[Any] = []
    for field in schema:
        if field.name == "key":
            columns.append(arrow.array(predictions.keys, type=field.type))
        elif field.name == "log_probs":
            columns.append(arrow.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            columns.append(arrow.array(getattr(predictions, field.name), type=field.type))
    return write_table(arrow.Table.from_arrays(columns, schema=schema))


def from_parquet(data: bytes, *, num_samples: int, num_classes: int, where: str) -> Predictions:
    """Read a file of that many rows and classes, and check it.

    Raises: ValueError, naming `where`, for another schema or count and for refused values.
    """
    schema = predictions_schema(num_classes)
    table = read_table(data, schema=schema, num_rows=num_samples, where=where)
    values = table.column("log_probs").combine_chunks().flatten()
    predictions = Predictions(
        keys=tuple(cast("list[str]", table.column("key").to_pylist())),
        label=column(table, "label"),
        confidence=column(table, "confidence"),
        margin=column(table, "margin"),
        entropy=column(table, "entropy"),
        log_probs=values.to_numpy(zero_copy_only=False).reshape(num_samples, num_classes),
        logsumexp=column(table, "logsumexp"),
        true_label=column(table, "true_label"),
    )
    try:
        check_predictions(predictions)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return predictions


def record_path(labeler: str, shard_digest: str) -> str:
    """Return the path of the record of one labeler's predictions for one shard."""
    return f"{prediction_folder(labeler)}/{shard_digest}.json"


def write_predictions(
    store: Store,
    labeler: str,
    shard_digest: str,
    predictions: Predictions,
    record_facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Store the predictions of a shard and return the record that is there afterwards.

    Another worker's record, if it came first, is the truth: what is returned may name its object.

    Args:
        store: where to.
        labeler: fingerprint of what made the predictions.
        shard_digest: sha256 of the shard.
        predictions: of all its samples.
        record_facts: kept in the record under `facts`; JSON.
    """
    data = to_parquet(predictions)
    folder = prediction_folder(labeler)
    stored = put_object(store, folder, shard_digest, data, "parquet", crash_kind=CRASH_KIND)
    crash_points.reach(f"{CRASH_KIND}.between_data_and_record")
    body = {
        "schema": SCHEMA_VERSION,
        "labeler": labeler,
        "shard": shard_digest,
        "num_samples": predictions.num_samples,
        "num_classes": predictions.num_classes,
        "object": asdict(stored),
        "facts": dict(record_facts),
    }
    path = record_path(labeler, shard_digest)
    there = create_record(store, path, body)
    return _checked_record(there, labeler, shard_digest, store.url_of(path))


def read_record(store: Store, labeler: str, shard_digest: str) -> dict[str, Any] | None:
    """Return the record of a shard's predictions; None if the labeler has not done the shard."""
    path = record_path(labeler, shard_digest)
    body = manifest.read_record(store, path)
    if body is None:
        return None
    return _checked_record(body, labeler, shard_digest, store.url_of(path))


def _checked_record(
    body: dict[str, Any], labeler: str, shard_digest: str, where: str
) -> dict[str, Any]:
    check_schema(body, SCHEMA_VERSION, where=where)
    for name, wanted in (("labeler", labeler), ("shard", shard_digest)):
        if body.get(name) != wanted:
            raise manifest.ManifestMismatch(
                f"{where}: {name} is {body.get(name)!r}, but {wanted!r} is asked for"
            )
    return body


def read_predictions(store: Store, record: Mapping[str, Any]) -> Predictions:
    """Read and verify what a record names.

    Raises: CorruptObject for other bytes; ValueError for another schema, count or bad values.
    """
    stored = StoredObject(**record["object"])
    return from_parquet(
        read_stored(store, stored),
        num_samples=record["num_samples"],
        num_classes=record["num_classes"],
        where=store.url_of(stored.path),
    )


def read_columns(
    store: Store, record: Mapping[str, Any], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Read some columns only, each (N,): what the passes of selection need of a large corpus.

    `key` is an array of str objects. `log_probs` is refused: use `read_predictions`.
    """
    known = [field.name for field in SCHEMA]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown columns {unknown}; there are {known}")
    stored = StoredObject(**record["object"])
    table = read_table(
        read_stored(store, stored),
        schema=predictions_schema(record["num_classes"]),
        num_rows=record["num_samples"],
        where=store.url_of(stored.path),
        columns=names,
    )
    return {name: column(table, name) for name in names}
