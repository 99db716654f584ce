"""Whether a crashed run is started again: counting by progress, delays, and what progress is."""

from typing import Any

import pytest

from flows.operating_config import RestartConfig
from flows.restart_policy import GiveUp, Restart, decide, has_progressed, progress_marks
from storage.addresses import model_folder, prediction_folder
from storage.checkpoints import save_checkpoint
from storage.runs import append_event
from storage.store import Store, open_store
from tasks.specifications import folder_of

POLICY = RestartConfig(max_restarts=3, delay_seconds=10, max_delay_seconds=35)
TEACHER = "a" * 64
LABELING = "b" * 64
LABELER = "c" * 64


def restarted(number: int, **progress: list[int]) -> dict[str, Any]:
    return {"type": "run_restarted", "number": number, "progress": progress}


def test_the_first_crash_is_followed_by_a_restart_after_the_delay() -> None:
    events = [{"type": "run_started"}, {"type": "stage_referenced"}]
    assert decide(events, {"train": [0, 0]}, POLICY) == Restart(1, 10.0)


@pytest.mark.parametrize(
    ("number", "decision"),
    [
        # 10 s, doubled for each in a row, and cut at 35.
        (1, Restart(2, 20.0)),
        (2, Restart(3, 35.0)),
        (3, GiveUp(3)),
    ],
)
def test_restarts_without_progress_come_later_and_end(
    number: int, decision: Restart | GiveUp
) -> None:
    # An attempt leaves events however short it was: they are no progress.
    events = [restarted(number, train=[0, 40]), {"type": "run_started"}]
    assert decide(events, {"train": [0, 40]}, POLICY) == decision


def test_progress_since_the_last_restart_begins_the_count_anew() -> None:
    events = [restarted(3, train=[0, 40])]
    assert decide(events, {"train": [0, 50]}, POLICY) == Restart(1, 10.0)
    assert decide(events, {"train": [1, 0]}, POLICY) == Restart(1, 10.0)
    assert decide(events, {"train": [0, 40], "label": [0, 1]}, POLICY) == Restart(1, 10.0)


def test_a_stage_that_was_only_begun_is_no_progress() -> None:
    assert not has_progressed({"train": [1, 0]}, {"train": [1, 0], "label": [0, 0]})
    # A checkpoint that turned out damaged is gone from the count.
    assert not has_progressed({"train": [0, 40]}, {"train": [0, 30]})


def test_a_run_that_was_given_up_and_started_by_somebody_is_counted_anew() -> None:
    events = [
        restarted(3, train=[0, 40]),
        {"type": "run_given_up", "restarts": 3},
        {"type": "run_started"},
    ]
    assert decide(events, {"train": [0, 40]}, POLICY) == Restart(1, 10.0)


def test_without_restarts_a_crash_ends_the_run() -> None:
    assert decide([], {}, RestartConfig(max_restarts=0)) == GiveUp(0)


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return open_store(str(tmp_path))


def refer(store: Store, kind: str, fingerprint: str, **facts: Any) -> None:
    append_event(store, "run", "stage_referenced", kind=kind, fingerprint=fingerprint, **facts)


def test_a_run_that_never_began_has_achieved_nothing(store: Store) -> None:
    assert progress_marks(store, "run") == {}


def test_a_training_counts_the_steps_of_its_newest_whole_checkpoint(store: Store) -> None:
    refer(store, "train", TEACHER)
    assert progress_marks(store, "run") == {TEACHER[:16]: [0, 0]}
    save_checkpoint(store, TEACHER, "first", 40, b"tensors", {})
    save_checkpoint(store, TEACHER, "second", 20, b"tensors", {})
    # The attempt that died while it wrote has left data without a record.
    store.put(f"{model_folder(TEACHER)}/attempts/second/{60:012d}/state.safetensors", b"half")
    assert progress_marks(store, "run") == {TEACHER[:16]: [0, 40]}


def test_a_labelling_counts_the_shards_that_its_labeler_has_recorded(store: Store) -> None:
    refer(store, "label", LABELING, labeler=LABELER)
    for name in ("one.json", "two.json", "two.parquet"):
        store.put(f"{prediction_folder(LABELER)}/{name}", b"{}")
    assert progress_marks(store, "run") == {LABELING[:16]: [0, 2]}


def test_a_selection_counts_the_groups_that_it_has_recorded(store: Store) -> None:
    refer(store, "select", TEACHER)
    store.put(f"{folder_of('select', TEACHER)}/shards/one.json", b"{}")
    store.put(f"{folder_of('select', TEACHER)}/one.parquet", b"rows")
    assert progress_marks(store, "run") == {TEACHER[:16]: [0, 1]}


def test_a_committed_stage_counts_as_such(pipeline: Any) -> None:
    store, teacher = pipeline.lab.store, pipeline.teacher
    append_event(store, "marks", "stage_done", kind="train", fingerprint=teacher.fingerprint)
    assert progress_marks(store, "marks") == {teacher.fingerprint[:16]: [1, 0]}
