"""Listings with times, on every kind of store, and the units that garbage collection knows."""

import time

import pytest

from storage.garbage import Unit, in_order_of_deletion, list_units, listed_again, names_in
from storage.listings import ListedObject, list_with_times, time_of
from storage.store import Store

A, B = "a" * 64, "b" * 64


def test_objects_are_listed_with_size_and_the_time_they_were_written(store: Store) -> None:
    # S3 tells whole seconds.
    before = time.time() - 2
    store.put("models/b", b"12345")
    store.put("models/a/deep", b"123")
    store.put("modelsnot/c", b"1")

    found = list_with_times(store, "models")

    assert [(one.path, one.size) for one in found] == [("models/a/deep", 3), ("models/b", 5)]
    assert all(one.modified is not None for one in found)
    assert all(before <= (one.modified or 0) <= time.time() + 2 for one in found)
    assert list_with_times(store, "nothing") == []


def test_the_stores_clock_is_read_and_nothing_left(store: Store) -> None:
    assert abs(time_of(store) - time.time()) < 60
    assert store.list("probes") == []


def test_a_unit_is_as_old_as_its_newest_object_and_young_where_an_age_is_not_known() -> None:
    def unit(*times: float | None) -> Unit:
        found = [ListedObject(f"models/{A}/{i}", 1, time) for i, time in enumerate(times)]
        return Unit(f"models/{A}", frozenset({A}), tuple(found))

    assert unit(1.0, 2.0).is_older(3.0)
    assert not unit(1.0, 3.0).is_older(3.0)
    assert not unit(4.0, 1.0).is_older(3.0)
    assert not unit(1.0, None).is_older(3.0)
    assert [unit(1.0, 2.0).modified, unit(1.0, None).modified] == [2.0, None]


def test_units_are_folders_of_fingerprints_and_corpora_with_their_locations(store: Store) -> None:
    for path in (
        f"models/{A}/manifest.json",
        f"models/{A}/model-1.safetensors",
        f"models/{A}/attempts/x/000000000005/checkpoint.json",
        f"models/{B}/attempts/x/000000000005/checkpoint.json",
        f"corpora/{A}.json",
        f"corpora/{A}.locations.json",
        "corpora/index-0123456789abcdef.json",
        f"initial_weights/{B}.safetensors",
        "data/digits-0123456789ab/prepared.txt",
        "data/mine/train-000000.tar",
        "models/notes.txt",
        f"strange/{A}/file",
        "runs/mine/config.json",
    ):
        store.put(path, b"x")

    units = list_units(store)

    assert {unit.path: len(unit.objects) for unit in units} == {
        f"models/{A}": 2,
        f"models/{A}/attempts": 1,
        f"models/{B}": 1,
        f"corpora/{A}": 2,
        f"initial_weights/{B}": 1,
        "data/digits-0123456789ab": 1,
    }
    assert all(listed_again(store, unit) == unit for unit in units)


def test_what_is_gone_is_listed_again_without_objects(store: Store) -> None:
    store.put(f"models/{A}/manifest.json", b"x")
    (unit,) = list_units(store)
    store.delete(f"models/{A}/manifest.json")

    again = listed_again(store, unit)

    assert again.objects == ()
    assert again.modified is None
    assert again.is_older(0)


def test_commits_go_before_records_and_records_before_data(local_store: Store) -> None:
    for name in ("shards/1.json", "a.parquet", "manifest.json", "provenance.json"):
        local_store.put(f"selections/{A}/{name}", b"x")
    (unit,) = list_units(local_store)

    assert in_order_of_deletion(unit) == [
        [f"selections/{A}/manifest.json"],
        [f"selections/{A}/provenance.json", f"selections/{A}/shards/1.json"],
        [f"selections/{A}/a.parquet"],
    ]


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (f'{{"any": {{"key": ["{A}"]}}}}', {A}),
        (f'{{"teacher": {{"model": "s3://b/models/{B}"}}}}', {B}),
        (
            '{"locations": {"x": "/store/data/digits-0123456789ab/labeled/x.tar"}}',
            {"data/digits-0123456789ab"},
        ),
        ('{"id": "0123456789ab"}', set()),
    ],
)
def test_names_are_found_wherever_a_record_has_them(record: str, names: set[str]) -> None:
    assert names_in(record.encode()) == (
        names if names is not None else {"data/digits-0123456789ab"}
    )
