"""The newest whole checkpoint of any attempt is found; damaged ones are skipped and counted."""

import logging
from typing import Any

import pytest

from storage.checkpoints import (
    delete_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from storage.manifest import UnknownSchema, read_record, sealed
from storage.store import CorruptObject, Store

FP = "f" * 64
BASE = f"models/{FP}/attempts"


def save(store: Store, attempt: str, step: int) -> None:
    save_checkpoint(store, FP, attempt, step, b"tensors of %d" % step, {"position": step * 8})


def paths_of(store: Store, attempt: str) -> list[int]:
    steps = {path.split("/")[4] for path in store.list(f"{BASE}/{attempt}")}
    return sorted(int(step) for step in steps)


def test_a_checkpoint_comes_back_as_it_was_saved(store: Store):
    assert newest_checkpoint(store, FP) is None
    save(store, "a1", 20)
    found = newest_checkpoint(store, FP)
    assert found is not None
    assert (found.step, found.attempt, found.scalars) == (20, "a1", {"position": 160})
    assert found.read() == b"tensors of 20"
    assert found.num_damaged == 0
    assert len(store.list(f"{BASE}/a1/000000000020")) == 2
    assert store.exists(f"{BASE}/a1/000000000020/checkpoint.json")


def test_the_newest_is_taken_over_all_attempts(store: Store):
    save(store, "a1", 20)
    save(store, "a1", 40)
    save(store, "b2", 30)
    found = newest_checkpoint(store, FP)
    assert found is not None
    assert (found.step, found.attempt) == (40, "a1")
    # Of equal steps one is chosen, always the same.
    save(store, "b2", 40)
    found = newest_checkpoint(store, FP)
    assert found is not None
    assert found.attempt == "b2"


def test_data_without_a_record_is_no_checkpoint(store: Store):
    save(store, "a1", 20)
    save(store, "a1", 40)
    store.delete(f"{BASE}/a1/000000000040/checkpoint.json")
    found = newest_checkpoint(store, FP)
    assert found is not None
    assert found.step == 20
    assert found.num_damaged == 0


def test_damaged_checkpoints_are_skipped_warned_of_and_counted(
    store: Store, caplog: pytest.LogCaptureFixture
):
    for step in (10, 20, 30, 40):
        save(store, "a1", step)
    # 40: flipped tensors; 30: an edited record; 20: its tensors are gone.
    record = read_record(store, f"{BASE}/a1/000000000040/checkpoint.json")
    assert record is not None
    store.replace(record["state"]["path"], b"tensors of 41")
    store.replace(f"{BASE}/a1/000000000030/checkpoint.json", b'{"step":30}')
    record = read_record(store, f"{BASE}/a1/000000000020/checkpoint.json")
    assert record is not None
    store.delete(record["state"]["path"])
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(store, FP)
    assert found is not None
    assert (found.step, found.num_damaged) == (10, 3)
    skipped = [r for r in caplog.records if "checkpoint skipped" in r.getMessage()]
    assert len(skipped) == 3


def test_without_verification_only_sizes_are_looked_at_and_reading_verifies(local_store: Store):
    save(local_store, "a1", 10)
    save(local_store, "a1", 20)
    save(local_store, "a1", 30)
    for step, data in ((30, b"short"), (20, b"tensors of 21")):
        record = read_record(local_store, f"{BASE}/a1/{step:012d}/checkpoint.json")
        assert record is not None
        local_store.replace(record["state"]["path"], data)
    found = newest_checkpoint(local_store, FP, verify=False)
    assert found is not None
    assert (found.step, found.num_damaged) == (20, 1)
    with pytest.raises(CorruptObject):
        found.read()


def test_a_record_under_another_place_is_not_believed(local_store: Store):
    save(local_store, "a1", 10)
    record = local_store.read(f"{BASE}/a1/000000000010/checkpoint.json")
    local_store.put(f"{BASE}/a1/000000000099/checkpoint.json", record)
    found = newest_checkpoint(local_store, FP)
    assert found is not None
    assert (found.step, found.num_damaged) == (10, 1)


def test_a_checkpoint_of_a_newer_version_is_not_silently_ignored(local_store: Store):
    local_store.put(f"{BASE}/a1/000000000010/checkpoint.json", sealed({"schema": 2}))
    with pytest.raises(UnknownSchema, match="update selftrain"):
        newest_checkpoint(local_store, FP)


def test_pruning_keeps_the_newest_complete_ones_of_all_attempts(store: Store):
    for step in (10, 20, 30, 40):
        save(store, "a1", step)
    save(store, "b2", 5)
    save(store, "b2", 25)
    # 40 is not complete, and may be being written: 25 and 30 are the newest two.
    store.delete(f"{BASE}/a1/000000000040/checkpoint.json")
    prune_checkpoints(store, FP, keep=2)
    assert paths_of(store, "a1") == [30, 40]
    assert paths_of(store, "b2") == [25]
    prune_checkpoints(store, FP, keep=1)
    assert (paths_of(store, "a1"), paths_of(store, "b2")) == ([30, 40], [])


def test_what_a_killed_attempt_left_half_written_goes_with_the_older_ones(store: Store):
    save(store, "a1", 10)
    store.delete(f"{BASE}/a1/000000000010/checkpoint.json")
    save(store, "b2", 20)
    prune_checkpoints(store, FP, keep=2)
    assert paths_of(store, "a1") == [10]  # fewer than two complete ones: nothing goes
    save(store, "b2", 30)
    save(store, "b2", 40)
    prune_checkpoints(store, FP, keep=2)
    assert (paths_of(store, "a1"), paths_of(store, "b2")) == ([], [30, 40])


def test_a_damaged_newer_checkpoint_costs_no_other_one(store: Store):
    for step in (10, 90):
        save(store, "a1", step)
    damaged = newest_checkpoint(store, FP)
    assert damaged is not None
    store.replace(damaged.state.path, b"damaged")
    for step in (20, 30):  # gone on from 10
        save(store, "b2", step)
        # Known-broken variant: 90 is the one that stays, and each new one goes at once.
        prune_checkpoints(store, FP, keep=1, step=step)
        found = newest_checkpoint(store, FP)
        assert found is not None
        assert found.step == step
    assert (paths_of(store, "a1"), paths_of(store, "b2")) == ([90], [30])
    save(store, "b2", 100)
    prune_checkpoints(store, FP, keep=1, step=100)
    assert (paths_of(store, "a1"), paths_of(store, "b2")) == ([], [100])


def test_pruning_all_is_refused(local_store: Store):
    with pytest.raises(ValueError, match="keep=0"):
        prune_checkpoints(local_store, FP, keep=0)


def test_deleting_leaves_the_models_other_objects(store: Store):
    save(store, "a1", 10)
    save(store, "b2", 10)
    store.put(f"models/{FP}/model-x.safetensors", b"x")
    delete_checkpoints(store, FP)
    assert store.list() == [f"models/{FP}/model-x.safetensors"]
    assert newest_checkpoint(store, FP) is None


def test_records_are_deleted_before_data(local_store: Store, monkeypatch: pytest.MonkeyPatch):
    save(local_store, "a1", 10)
    save(local_store, "a1", 20)
    deleted: list[str] = []
    monkeypatch.setattr(Store, "delete", lambda _, path: deleted.append(path))
    delete_checkpoints(local_store, FP)
    assert [path.rpartition("/")[2].partition("-")[0] for path in deleted] == [
        "checkpoint.json",
        "checkpoint.json",
        "state",
        "state",
    ]


@pytest.mark.parametrize(
    ("attempt", "step"), [("", 1), ("a/b", 1), ("..", 1), ("a", -1), ("a", 10**12)]
)
def test_places_that_cannot_be_found_again_are_refused(local_store: Store, attempt: str, step: Any):
    with pytest.raises(ValueError, match=r"attempt|step"):
        save_checkpoint(local_store, FP, attempt, step, b"x", {})
