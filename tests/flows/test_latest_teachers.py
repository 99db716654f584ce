"""The teacher that another run promoted: which one, when it is looked up, and what if none is."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.config import SelfTrainingConfig
from flows.graph import RunGraph
from flows.latest_teachers import newest_finished, scheduled_name, series_of
from flows.opening import Pins, open_run
from flows.trained_models import GivenTeacher, LatestTeacher, TrainedTeacher
from storage.runs import UnknownRun, append_event
from storage.store import Store, open_store
from tasks.classifiers import ClassesMismatch
from tasks.teacher_views import Shown

TRAINING = {
    "architecture": {"kind": "small_cnn", "width": 4, "depth": 1},
    "image_size": 8,
    "batch_size": 6,
    "duration": {"steps": 12},
}
FIX = {"duration": {"steps": 1}, "optimizer": {"kind": "sgd"}, "batch_size": 6}
FIRST, SECOND = "nightly-20260101t020000z", "nightly-20260102t020000z"


def config_of(folder: Path, **changes: Any) -> SelfTrainingConfig:
    document: dict[str, Any] = {
        "name": "nightly",
        "rounds": 1,
        "data": {
            "root": str(folder),
            "labeled": "labeled",
            "dev": "dev",
            "test": "test",
            "unlabeled": "unlabeled",
        },
        "teacher": {"kind": "latest_promoted", "of": "weekly"},
        "student": TRAINING,
    }
    return SelfTrainingConfig.model_validate(document | changes)


@pytest.fixture
def store(pipeline: Any, tmp_path: Path) -> Store:
    """A store that holds two models and no run."""
    shutil.copytree(Path(pipeline.lab.store.url) / "models", tmp_path / "own" / "models")
    return open_store(str(tmp_path / "own"))


@pytest.fixture
def data(lab: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(lab.folder, folder)
    return folder


def finish(store: Store, name: str, model: str) -> None:
    append_event(store, name, "run_started")
    append_event(store, name, "run_done", stop_reason="max_rounds", model=model, round_index=1)


def test_a_scheduled_run_bears_its_start_behind_the_name_of_its_config() -> None:
    name = scheduled_name("nightly", datetime(2026, 1, 31, 2, 0, 5, tzinfo=UTC))
    assert name == "nightly-20260131t020005z"
    assert series_of(name) == "nightly"
    assert series_of("nightly-2") == "nightly-2"


def test_the_newest_scheduled_run_that_has_finished_counts(store: Store) -> None:
    assert newest_finished(store, "nightly") is None
    finish(store, SECOND, "b" * 64)
    finish(store, FIRST, "a" * 64)  # it took longer than a day
    append_event(store, "nightly-20260103t020000z", "run_started")
    finish(store, "nightly-2", "c" * 64)  # another config's

    found = newest_finished(store, "nightly")

    assert found is not None
    assert (found.name, found.model) == (SECOND, "b" * 64)


def test_a_run_that_is_named_like_the_series_counts_by_the_time_of_its_end(store: Store) -> None:
    finish(store, "nightly", "a" * 64)
    finish(store, FIRST, "b" * 64)
    found = newest_finished(store, "nightly")
    assert found is not None
    assert found.name == FIRST
    finish(store, "nightly", "c" * 64)  # gone through again
    found = newest_finished(store, "nightly")
    assert found is not None
    assert (found.name, found.model) == ("nightly", "c" * 64)


def test_the_teacher_is_looked_up_when_the_run_is_opened_and_kept(
    store: Store, data: Path, pipeline: Any
) -> None:
    finish(store, "weekly", pipeline.teacher.fingerprint)
    config = config_of(data, name=FIRST)
    assert open_run(store, config).pins.given_teacher == pipeline.teacher.fingerprint

    finish(store, "weekly", pipeline.student.fingerprint)

    assert open_run(store, config).pins.given_teacher == pipeline.teacher.fingerprint
    tomorrow = open_run(store, config_of(data, name=SECOND))
    assert tomorrow.pins.given_teacher == pipeline.student.fingerprint


def test_without_a_finished_run_the_config_is_refused_before_a_run_is_recorded(
    store: Store, data: Path
) -> None:
    append_event(store, "weekly", "run_started")

    with pytest.raises(UnknownRun) as refused:
        open_run(store, config_of(data))

    message = str(refused.value)
    assert "teacher.of = 'weekly'" in message
    assert "weekly-<UTC start>" in message
    assert "teacher.otherwise" in message
    assert not (Path(store.url) / "runs" / "nightly").exists()


def test_without_a_finished_run_the_fallback_holds(store: Store, data: Path, pipeline: Any) -> None:
    trained = {"kind": "latest_promoted", "of": "weekly", "otherwise": TRAINING}
    pins = open_run(store, config_of(data, name=FIRST, teacher=trained)).pins
    assert (pins.given_teacher, pins.teacher_init) == (None, None)

    model = f"models/{pipeline.teacher.fingerprint}"
    given = trained | {"otherwise": {"kind": "given", "model": model}}
    pins = open_run(store, config_of(data, name=SECOND, teacher=given)).pins
    assert pins.given_teacher == pipeline.teacher.fingerprint


def test_a_model_of_other_classes_is_refused_and_its_run_named(
    store: Store, data: Path, pipeline: Any
) -> None:
    finish(store, "weekly", pipeline.teacher.fingerprint)
    for split in ("labeled", "dev", "test", "unlabeled"):
        names = '{"schema": 1, "class_names": ["cyan", "green", "blue"]}'
        (data / split / "classes.json").write_text(names)

    with pytest.raises(ClassesMismatch, match=r"teacher\.of, run weekly = models/"):
        open_run(store, config_of(data))


def test_a_series_of_its_own_goes_on_only_where_data_or_config_have_changed(
    store: Store, data: Path, pipeline: Any, lab: Any
) -> None:
    own = {"kind": "latest_promoted", "of": "nightly", "otherwise": TRAINING}
    first = open_run(store, config_of(data, name=FIRST, teacher=own))
    finish(store, FIRST, pipeline.student.fingerprint)

    again = open_run(store, config_of(data, name=SECOND, teacher=own, device="cpu"))
    assert again.pins == first.pins, "every stage is there"
    other_seed = open_run(store, config_of(data, name="nightly", teacher=own, seed=1))
    assert other_seed.pins.given_teacher == pipeline.student.fingerprint
    new = data / "unlabeled" / "unlabeled-new.tar"
    lab.write_shard(new, lab.images_of("n", 10, start=8000, labeled=False))
    grown = open_run(store, config_of(data, name="nightly-20260103t020000z", teacher=own))
    assert grown.pins.given_teacher == pipeline.student.fingerprint
    assert grown.pins.unlabeled != first.pins.unlabeled


def test_the_fallback_is_trained_only_while_nothing_was_found() -> None:
    teacher = {"kind": "latest_promoted", "of": "weekly", "otherwise": TRAINING}
    config = config_of(Path("data"), teacher=teacher)
    plain = config_of(Path("data"), teacher=TRAINING)
    pins = Pins("1" * 64, "2" * 64, "3" * 64, "4" * 64, ("a", "b", "c"))
    graph = RunGraph(config, pins)
    assert graph.first_model() == RunGraph(plain, pins).first_model(), "the very same training"
    found = RunGraph(config, replace(pins, given_teacher="7" * 64), Shown(8, 0, "bilinear"))
    assert found.teacher() == ()
    assert found.first_model().fingerprint == "7" * 64


def test_the_fallback_is_checked_like_a_teacher() -> None:
    untagged = config_of(Path("data"), teacher={"kind": "latest_promoted", "of": "weekly"})
    assert untagged.teacher == LatestTeacher(of="weekly")
    warm = TRAINING | {"image_size": 16, "resolution_fix": {**FIX, "image_size": 8}}
    teacher = {"kind": "latest_promoted", "of": "weekly", "otherwise": warm}
    with pytest.raises(ValueError, match=r"teacher\.otherwise\.resolution_fix\.image_size"):
        config_of(Path("data"), teacher=teacher)
    tagged = config_of(Path("data"), teacher=teacher | {"otherwise": TRAINING}).teacher
    assert isinstance(tagged, LatestTeacher)
    assert isinstance(tagged.otherwise, TrainedTeacher)
    given = {"kind": "given", "model": "models/a"}
    tagged = config_of(Path("data"), teacher=teacher | {"otherwise": given}).teacher
    assert isinstance(tagged, LatestTeacher)
    assert tagged.otherwise == GivenTeacher(model="models/a")
