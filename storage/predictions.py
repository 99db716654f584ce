"""Predictions in the store: one Parquet file and one record per labeler and shard content.

They hold in-shard keys only, so that every corpus with this shard shares them; the stem is joined
from the corpus when they are read.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import crash_points, manifest
from storage.addresses import prediction_folder
from storage.array_text import from_text, to_text
from storage.manifest import (
    CorruptRecord,
    check_identity,
    check_schema,
    create_record,
    put_object,
    read_stored,
)
from storage.prediction_columns import (
    DamagedPredictions,
    PredictionReference,
    read_columns,
    telling_damage,
)
from storage.prediction_files import (
    SCHEMA_VERSION,
    TOP_K_VERSION,
    from_parquet,
    predictions_schema,
    to_parquet,
)
from storage.prediction_values import (
    UNKNOWN_LABEL,
    Form,
    Listed,
    Predictions,
    check_predictions,
)
from storage.store import Store

__all__ = [
    "SCHEMA_VERSION",
    "TOP_K_VERSION",
    "UNKNOWN_LABEL",
    "DamagedPredictions",
    "Form",
    "Listed",
    "Predictions",
    "check_predictions",
    "from_parquet",
    "prediction_record",
    "predictions_schema",
    "probability_sums",
    "read_columns",
    "read_predictions",
    "read_record",
    "record_path",
    "to_parquet",
    "write_predictions",
]

CRASH_KIND = "label"
# 1: the full form without optional columns, the only one at first. 2: any other.
_RECORD_SCHEMAS = (1, 2)


def record_path(labeler: str, shard_digest: str) -> str:
    """Return the path of the record of one labeler's predictions for one shard."""
    return f"{prediction_folder(labeler)}/{shard_digest}.json"


def write_predictions(
    store: Store,
    labeler: str,
    shard_digest: str,
    predictions: Predictions,
    record_facts: Mapping[str, Any],
    *,
    prob_sums: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Store the predictions of a shard and return the record that is there afterwards.

    Another worker's record, if it came first, is the truth: what is returned may name its object.

    Args:
        store: where to.
        labeler: fingerprint of what made the predictions.
        shard_digest: sha256 of the shard.
        predictions: of all its samples.
        record_facts: kept in the record under `facts`; JSON.
        prob_sums: (2, C) exact sum of the whole calibrated distributions over the shard, which the
            top_k form cannot give back and so must bring; None in the full form.
    """
    if (prob_sums is not None) != (predictions.form == "top_k"):
        raise ValueError(
            "prob_sums belong to predictions of the top_k form, and to no other: these are "
            f"{predictions.form}, and sums are {'missing' if prob_sums is None else 'given'}"
        )
    data = to_parquet(predictions)
    folder = prediction_folder(labeler)
    stored = put_object(store, folder, shard_digest, data, "parquet", crash_kind=CRASH_KIND)
    crash_points.reach(f"{CRASH_KIND}.between_data_and_record")
    body: dict[str, Any] = {
        "schema": _RECORD_SCHEMAS[0],
        "labeler": labeler,
        "shard": shard_digest,
        "num_samples": predictions.num_samples,
        "num_classes": predictions.num_classes,
        "object": asdict(stored),
        "facts": dict(record_facts),
    }
    if prob_sums is not None:
        body |= {"k": predictions.k, "prob_sums": _encoded(prob_sums, predictions.num_classes)}
    if predictions.optional:
        body["optional"] = list(predictions.optional)
    if "k" in body or "optional" in body:
        body["schema"] = _RECORD_SCHEMAS[1]
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


def prediction_record(store: Store, labeler: str, shard_digest: str) -> dict[str, Any]:
    """Return the record of a shard's predictions, which a finished labelling has of all its shards.

    Raises: DamagedPredictions if there is none, or if it is damaged.
    """
    try:
        record = read_record(store, labeler, shard_digest)
    except CorruptRecord as error:
        raise DamagedPredictions(str(error)) from error
    if record is None:
        raise DamagedPredictions(
            f"{store.url_of(record_path(labeler, shard_digest))}: no prediction of labeler"
            f" {labeler[:12]} for shard {shard_digest[:12]}; the labelling is not finished or was"
            " deleted: run the labelling again"
        )
    return record


def _checked_record(
    body: dict[str, Any], labeler: str, shard_digest: str, where: str
) -> dict[str, Any]:
    check_schema(body, _RECORD_SCHEMAS[-1], where=where)
    check_identity(body, {"labeler": labeler, "shard": shard_digest}, where=where)
    return body


def probability_sums(record: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """Return the (2, C) exact sum of the whole distributions of a shard; None in the full form."""
    if "prob_sums" not in record:
        return None
    return from_text(record["prob_sums"], (2, record["num_classes"]))


def _encoded(prob_sums: NDArray[np.int64], num_classes: int) -> str:
    if prob_sums.shape != (2, num_classes) or prob_sums.dtype != np.int64:
        raise ValueError(
            f"prob_sums must be (2, {num_classes}) int64, not {prob_sums.shape} {prob_sums.dtype}"
        )
    return to_text(prob_sums)


def read_predictions(store: Store, record: Mapping[str, Any]) -> Predictions:
    """Read and verify what a record names.

    Raises: DamagedPredictions for other bytes or none; ValueError for another schema, count or bad
        values.
    """
    found = PredictionReference.of(record)
    with telling_damage():
        data = read_stored(store, found.stored)
    return from_parquet(
        data,
        num_samples=found.num_samples,
        num_classes=found.num_classes,
        where=store.url_of(found.stored.path),
        k=found.k,
        optional=found.optional,
    )
