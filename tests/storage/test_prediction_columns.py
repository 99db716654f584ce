"""Columns read without the rest of the file: from a folder, and in ranges from elsewhere."""

import uuid
from typing import Any, cast

import numpy as np
import pytest

from storage.array_text import from_text, to_text
from storage.key_columns import KeyColumn
from storage.objects import CorruptObject, open_object
from storage.parquet_files import arrow
from storage.prediction_columns import PredictionColumns, PredictionReference
from storage.predictions import Predictions, write_predictions
from storage.store import Store, open_store

LABELER, SHARD = "f" * 64, "a" * 64


def planted(store: Store) -> tuple[Predictions, PredictionReference]:
    """A shard of 500 rows over 64 classes."""
    n = 500
    logits = np.random.default_rng(0).normal(size=(n, 64)) * 3
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    top = np.sort(np.exp(log_probs), axis=1)
    predictions = Predictions(
        keys=tuple(f"k{i:04d}" for i in range(n)),
        label=log_probs.argmax(axis=1).astype(np.uint32),
        confidence=top[:, -1].astype(np.float32),
        margin=(top[:, -1] - top[:, -2]).astype(np.float32),
        entropy=-(np.exp(log_probs) * log_probs).sum(axis=1).astype(np.float32),
        log_probs=log_probs.astype(np.float16),
        logsumexp=np.zeros(n, np.float32),
        true_label=np.full(n, -1, np.int32),
    )
    record = write_predictions(store, LABELER, SHARD, predictions, {})
    return predictions, PredictionReference.of(record)


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_columns_are_those_that_were_written(tmp_path, is_local, verify):
    store = open_store(str(tmp_path) if is_local else f"memory://{uuid.uuid4().hex}")
    predictions, reference = planted(store)
    columns = PredictionColumns(store, reference, verify=verify)
    found = columns.read(["label", "key", "confidence"])
    np.testing.assert_array_equal(found["label"], predictions.label)
    np.testing.assert_array_equal(found["confidence"], predictions.confidence)
    assert list(found["key"]) == list(predictions.keys)
    log_probs, listed = columns.probabilities()
    np.testing.assert_array_equal(log_probs, predictions.log_probs)
    assert listed is None


def test_a_damaged_page_is_told_as_a_damaged_object(tmp_path):
    store = open_store(str(tmp_path))
    _, reference = planted(store)
    path = tmp_path / reference.stored.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # of the log-probabilities, which are most of the file
    path.chmod(0o644)
    path.write_bytes(data)
    columns = PredictionColumns(store, reference, verify=False)
    assert len(columns.read(["label"])["label"]) == 500  # not of what is damaged
    with pytest.raises(CorruptObject):
        columns.probabilities()
    with pytest.raises(CorruptObject):
        PredictionColumns(store, reference, verify=True)


def test_an_object_elsewhere_is_read_in_ranges():
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put("a/b", bytes(range(200)))
    with open_object(store.url_of("a/b"), size=200) as file:
        file.seek(-10, 2)
        assert file.read() == bytes(range(190, 200))
        file.seek(5)
        assert file.read(3) == b"\x05\x06\x07"
        assert file.read(0) == b""


def test_keys_become_strings_only_where_one_asks():
    keys = KeyColumn(arrow.chunked_array([["a", "ü"], ["c"]]))
    assert (len(keys), keys[1], list(keys), list(keys[1:])) == (3, "ü", ["a", "ü", "c"], ["ü", "c"])
    assert keys.of_rows(np.array([2, 0])) == ["c", "a"]
    assert keys.utf8_of_rows(np.array([1])) == ["ü".encode()]


@pytest.mark.parametrize(
    "names",
    [["00", "01", "ü", "03", "\x00\x00", "10"], ["0", "01", "ü", "003", "4", "10"], ["x"] * 6],
)
def test_keys_of_one_width_and_of_several_are_cut_alike(names: list[str]):
    keys = KeyColumn(arrow.array(["first", *names]))[1:]
    for rows in ([0, 1, 2, 3, 4, 5], [5, 0, 0], [2], [1, 5], []):
        wanted = [names[row].encode() for row in rows]
        assert keys.utf8_of_rows(np.array(rows, np.intp)) == wanted


def test_counts_read_back_from_their_text():
    values = np.array([[0, 1, -5], [2**62, 0, 7]], np.int64)
    assert from_text(to_text(values), (2, 3)).tolist() == values.tolist()
    with pytest.raises(ValueError, match="must be int64"):
        to_text(cast("Any", values.astype(np.int32)))
    with pytest.raises(ValueError, match="cannot reshape"):
        from_text(to_text(values), (4, 3))
