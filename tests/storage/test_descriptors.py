"""Descriptors on their way to Parquet and back."""

from typing import Any, cast

import numpy as np
import pytest

from storage.descriptors import (
    Descriptors,
    from_parquet,
    read_descriptors,
    read_record,
    to_parquet,
    write_descriptors,
)
from storage.manifest import ManifestMismatch
from storage.store import open_store

WHAT, SHARD = "d" * 64, "5" * 64


def descriptors(n=3, size=4):
    values = np.arange(n * size).reshape(n, size) / 4
    return Descriptors(tuple(f"k{i}" for i in range(n)), values.astype(np.float16))


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def test_descriptors_come_back_as_they_were_written(store):
    assert read_record(store, WHAT, SHARD) is None
    record = write_descriptors(store, WHAT, SHARD, descriptors(), bad_samples={"x": "cut off"})
    assert record == read_record(store, WHAT, SHARD)
    assert (record["num_samples"], record["num_values"]) == (3, 4)
    assert record["bad_samples"] == {"x": "cut off"}
    found = read_descriptors(store, record)
    assert found.keys == ("k0", "k1", "k2")
    assert found.values.dtype == np.float16
    assert found.values.tolist() == descriptors().values.tolist()


def test_the_first_record_of_a_shard_stays(store):
    first = write_descriptors(store, WHAT, SHARD, descriptors(3), bad_samples={})
    assert write_descriptors(store, WHAT, SHARD, descriptors(2), bad_samples={}) == first


def test_a_record_at_another_address_is_refused(store):
    write_descriptors(store, WHAT, SHARD, descriptors(), bad_samples={})
    path = f"descriptors/{WHAT}"
    data = store.read(f"{path}/{SHARD}.json")
    store.put(f"{path}/{'6' * 64}.json", data)
    with pytest.raises(ManifestMismatch, match="shard is '5555"):
        read_record(store, WHAT, "6" * 64)


def test_a_shard_without_decodable_images_has_no_rows():
    empty = Descriptors((), np.zeros((0, 4), np.float16))
    found = from_parquet(to_parquet(empty), num_samples=0, num_values=4, where="here")
    assert found.values.shape == (0, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Descriptors(("a",), cast("Any", np.zeros((1, 4), np.float32))),
            r"must be \(1, D\) float16",
        ),
        (Descriptors(("a",), np.zeros((2, 4), np.float16)), r"must be \(1, D\) float16"),
        (Descriptors(("a", "a"), np.zeros((2, 4), np.float16)), "keys must be unique"),
        (
            Descriptors(("a", "b"), np.array([[0, 1], [0, np.inf]], np.float16)),
            "1 of 2 descriptors are NaN or infinite; first key 'b'",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        to_parquet(bad)


def test_another_width_is_refused_when_read():
    with pytest.raises(ValueError, match="here: columns"):
        from_parquet(to_parquet(descriptors()), num_samples=3, num_values=5, where="here")
