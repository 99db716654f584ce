"""Trackers of a run: what they are told, that a resume repeats nothing, and one that is down."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tasks.stages
from flows.config import SelfTrainingConfig
from flows.loading import ConfigError
from flows.opening import open_run, reopen_run, reopened_config
from flows.run_status import RunStatus, read_status
from flows.self_training import self_training
from flows.tracking import TrackerMissing, refuse_trackers_without_effect, without_credentials
from models.training import StepReport
from storage.runs import read_events
from storage.store import Store, open_store
from tasks.devices import DeviceChoice, resolve_device
from tasks.report_facts import finished_stage
from tasks.tracked_metrics import Series, tracked_series
from tasks.training import TrainingStopped, read_curve, run_training
from tasks.training_orders import read_order

MakeConfig = Callable[..., SelfTrainingConfig]

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the extra selftrain[tensorboard] is not installed",
)
pytestmark = pytest.mark.usefixtures("prefect_api", "trained_here")


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)


@pytest.fixture(scope="module")
def tracked(
    tmp_path_factory: pytest.TempPathFactory,
    prefect_api: str,
    trained_here: list[str],
    tiny_config: MakeConfig,
) -> Path:
    """A folder with a run of one round in `store`, and its event files in `board`."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.views.write_report", lambda store, status, inputs: None)
        self_training(config_of(folder, tiny_config, folder / "board"))
    return folder


def config_of(folder: Path, tiny_config: MakeConfig, board: Path) -> SelfTrainingConfig:
    trackers = f"trackers=[{{kind: tensorboard, folder: '{board}'}}]"
    return tiny_config(folder / "store", "rounds=1", trackers)


def store_of(folder: Path) -> Store:
    return open_store(str(folder / "store"))


def scalars(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(group, name) -> steps and values, in the order in which they were written."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for group in sorted(folder.iterdir()):
        files = event_accumulator.EventAccumulator(str(group), size_guidance={"scalars": 0})
        files.Reload()
        for name in files.Tags()["scalars"]:
            events = files.Scalars(name)
            found[group.name, name] = [(one.step, one.value) for one in events]
    return found


def expected(series: list[Series]) -> dict[tuple[str, str], list[tuple[int, Any]]]:
    return {
        (one.group, one.name): [(point.step, pytest.approx(point.value)) for point in one.points]
        for one in series
    }


def test_event_files_hold_the_curves_and_the_rounds_as_the_store_does(tracked: Path) -> None:
    store = store_of(tracked)
    status = read_status(store, "tiny").to_json()
    assert scalars(tracked / "board" / "tiny") == expected(tracked_series(store, status))
    assert status["tracker_failures"] == 0


def test_metrics_are_those_of_status_curves_and_reports(tracked: Path) -> None:
    store = store_of(tracked)
    status = read_status(store, "tiny").to_json()
    series = {(one.group, one.name): one for one in tracked_series(store, status)}

    def values(group: str, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in series[group, name].points]

    for split in ("dev", "test"):
        accuracies = [(i, one[f"{split}_accuracy"]) for i, one in enumerate(status["rounds"])]
        assert values("rounds", f"{split}/accuracy") == accuracies
        baseline = status["baseline"][f"{split}_accuracy"]
        assert values("baseline", f"{split}/accuracy") == [(0, baseline), (1, baseline)]
    pseudo = status["rounds"][1]["pseudo_labels"]
    assert values("rounds", "pseudo_labels/coverage") == [(1, pseudo["coverage"])]
    assert values("rounds", "pseudo_labels/precision") == [(1, pseudo["precision"])]
    assert values("rounds", "promoted") == [(1, float(status["rounds"][1]["promoted"]))]
    assert len(values("rounds", "dev/ece")) == 2
    teacher = finished_stage(store, status["rounds"][0], "train")
    assert teacher is not None
    curve = read_curve(store, teacher)
    assert values("round-0-teacher", "training/loss") == [(p["step"], p["loss"]) for p in curve]
    assert {group for group, _ in series} == {"rounds", "baseline", "round-0-teacher", "round-1"}
    # Derived again, times included: MLflow knows a point by them.
    assert list(series.values()) == tracked_series(store, status)


def test_a_resumed_run_writes_no_step_twice(tracked: Path, tiny_config: MakeConfig) -> None:
    before = scalars(tracked / "board" / "tiny")
    files = sorted((tracked / "board").rglob("*tfevents*"))
    self_training(config_of(tracked, tiny_config, tracked / "board"))
    assert sorted((tracked / "board").rglob("*tfevents*")) == files
    assert scalars(tracked / "board" / "tiny") == before
    for name, points in before.items():
        assert max(Counter(step for step, _ in points).values()) == 1, name


def test_a_tracker_that_is_down_stops_nothing_and_is_counted_and_caught_up_with(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    self_training(config_of(tmp_path, tiny_config, tmp_path / "file"))
    store = store_of(tmp_path)
    status = read_status(store, "tiny")
    assert status.state == "done"
    # After the teacher, after the round, and at the end.
    assert status.tracker_failures == 3
    failed = [event for event in read_events(store, "tiny") if event["type"] == "tracker_failed"]
    assert {event["tracker"] for event in failed} == {"tensorboard"}
    assert all(str(tmp_path / "file") in event["message"] for event in failed)

    # Where a run is tracked is a machine setting: a resume may change it.
    board = f"trackers=[{{kind: tensorboard, folder: '{tmp_path / 'board'}'}}]"
    config = reopened_config(store, "tiny", [board])
    self_training(config.model_copy(update={"store": store.url}))
    series = tracked_series(store, read_status(store, "tiny").to_json())
    assert scalars(tmp_path / "board" / "tiny") == expected(series)


def teacher_alone(config: SelfTrainingConfig, *, checkpoint_every_steps: int) -> SelfTrainingConfig:
    dumped = config.model_dump(mode="json", by_alias=True)
    del dumped["selection"]
    dumped |= {"rounds": 0, "student": None, "baseline": False}
    dumped["teacher"]["checkpoint_every_steps"] = checkpoint_every_steps
    return SelfTrainingConfig.model_validate(dumped)


def training_that_waits(
    at_step: int, until: Callable[[], bool], *, then_stops: bool = False
) -> Callable[..., None]:
    """Return a launcher whose training goes no further than a step until something has happened."""

    def launch(store: Store, fingerprint: str, *, device: DeviceChoice, **_: Any) -> None:
        has_waited = False

        def on_report(report: StepReport, total: int) -> None:
            nonlocal has_waited
            if report.step == at_step:
                deadline = time.monotonic() + 120
                while not until():
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                has_waited = True

        run_training(
            store,
            read_order(store, fingerprint),
            device=resolve_device(device),
            on_report=on_report,
            should_stop=lambda: has_waited and then_stops,
        )

    return launch


def test_trackers_get_the_curve_while_a_training_runs_and_no_step_twice_when_it_is_resumed(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tracking._SECONDS_BETWEEN_LOOKS", 0.02)
    board = tmp_path / "board"
    config = teacher_alone(config_of(tmp_path, tiny_config, board), checkpoint_every_steps=4)
    live: list[tuple[int, float]] = []

    def has_live_points() -> bool:
        if (board / "tiny" / "round-0-teacher").is_dir():
            live[:] = scalars(board / "tiny").get(("round-0-teacher", "training/loss"), [])
        return len(live) >= 4  # the files are read while they are written

    stopping = training_that_waits(8, has_live_points, then_stops=True)
    monkeypatch.setattr(tasks.stages, "launch_worker", stopping)
    with pytest.raises(TrainingStopped):
        self_training(config)
    assert [step for step, _ in live] == [1, 2, 3, 4], "as far as the checkpoint, before the end"

    monkeypatch.setattr(tasks.stages, "launch_worker", training_that_waits(13, lambda: True))
    self_training(config)

    store = store_of(tmp_path)
    written = scalars(board / "tiny")
    assert [step for step, _ in written["round-0-teacher", "training/loss"]] == [*range(1, 13)]
    assert written == expected(tracked_series(store, read_status(store, "tiny").to_json()))


def test_a_tracker_that_fails_while_a_training_runs_is_left_alone_until_its_end(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tracking._SECONDS_BETWEEN_LOOKS", 0.02)
    calls: list[str] = []

    def fail(series: list[Series], status: RunStatus) -> None:
        calls.append(threading.current_thread().name)
        raise ConnectionError("down")

    monkeypatch.setattr("flows.tracking._writer", lambda run, tracker: fail)
    config = config_of(tmp_path, tiny_config, tmp_path / "board")
    config = teacher_alone(config, checkpoint_every_steps=2)
    waiting = training_that_waits(8, lambda: "trackers" in calls)
    monkeypatch.setattr(tasks.stages, "launch_worker", waiting)

    self_training(config)

    status = read_status(store_of(tmp_path), "tiny")
    assert status.state == "done"
    assert calls.count("trackers") == 1, "later checkpoints were not tried"
    # After the teacher and at the end, as without what came between.
    assert status.tracker_failures == len(calls) - 1 == 2


def test_a_failed_run_tells_its_trackers_what_it_has(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    board = f"trackers=[{{kind: tensorboard, folder: '{tmp_path / 'board'}'}}]"
    config = tiny_config(
        tmp_path / "store",
        *("rounds=1", "selection={threshold: {kind: fixed, confidence: 1.0}}", board),
    )
    with pytest.raises(Exception, match="keeps none"):
        self_training(config)
    found = scalars(tmp_path / "board" / "tiny")
    assert ("round-0-teacher", "training/loss") in found
    assert [step for step, _ in found["rounds", "dev/accuracy"]] == [0]


def test_messages_lose_user_names_and_passwords() -> None:
    text = "API request to http://me:secret@host:5000/api failed; see https://host/a@b"
    assert without_credentials(text) == (
        "API request to http://host:5000/api failed; see https://host/a@b"
    )


@pytest.fixture
def opened(tmp_path: Path, tiny_config: MakeConfig) -> Callable[..., Any]:
    def make(tracker: str) -> Any:
        config = tiny_config(tmp_path / "store", "rounds=1", f"trackers=[{tracker}]")
        return replace(open_run(store_of(tmp_path), config), config=config)

    return make


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_computed(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened("{kind: tensorboard, folder: board}")
    refuse_trackers_without_effect(run)
    monkeypatch.setattr("flows.tracking.find_spec", lambda name: None)
    with pytest.raises(TrackerMissing, match=r"pip install 'selftrain\[tensorboard\]'"):
        refuse_trackers_without_effect(run)


def test_mlflow_without_any_address_is_refused(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.tracking.find_spec", lambda name: object())
    run = opened("{kind: mlflow}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        refuse_trackers_without_effect(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    refuse_trackers_without_effect(run)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("{kind: tensorboard, folder: 's3://bucket/board'}", "is a URL"),
        ("{kind: mlflow, uri: 'http://me:secret@host:5000'}", "uri holds credentials"),
        ("{kind: wandb}", "tensorboard"),
        ("{kind: mlflow}, {kind: mlflow}", "twice"),
    ],
)
def test_trackers_that_cannot_be_are_refused_without_showing_a_password(
    tmp_path: Path, tiny_config: MakeConfig, tracker: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        tiny_config(tmp_path / "store", f"trackers=[{tracker}]")
    assert "secret" not in str(refused.value)


def test_trackers_change_no_fingerprint_and_do_not_make_another_run(
    tracked: Path, tiny_config: MakeConfig
) -> None:
    elsewhere = config_of(tracked, tiny_config, tracked / "elsewhere")
    run = open_run(store_of(tracked), elsewhere)
    assert run.config.trackers == elsewhere.trackers
    assert reopen_run(store_of(tracked), "tiny").config.trackers != elsewhere.trackers
