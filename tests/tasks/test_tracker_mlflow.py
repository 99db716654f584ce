"""Metrics in MLflow: its own REST application, on loopback, with a database of this test."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.tracked_metrics import Point, Series
from tasks.tracker_config import MlflowTracker
from tasks.tracker_mlflow import MlflowRun

mlflow = pytest.importorskip("mlflow", reason="the extra selftrain[mlflow] is not installed")
pytest.importorskip("flask", reason="MLflow's server needs flask (the extra selftrain[dev])")

pytestmark = pytest.mark.slow

LOSS = Series("round-1", "training/loss", (Point(10, 1.5, 1e9), Point(20, 0.75, 1e9)))
MORE = Series("round-1", "training/loss", (*LOSS.points, Point(30, 0.5, 1e9)))
DEV = Series("rounds", "dev/accuracy", (Point(0, 0.5, None), Point(1, 0.625, None)))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    command = [sys.executable, str(Path(__file__).parent / "mlflow_server.py"), str(folder)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, (folder / "log.txt").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a write sets in the environment ends with the test."""
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1" if name == "MAX_RETRIES" else "10")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def tracker(uri: str, run: str, **params: Any) -> MlflowRun:
    return MlflowRun(MlflowTracker(uri=uri), store="/store", run=run, params=params)


def the_run(uri: str, name: str) -> Any:
    """The one run of this name."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("selftrain")
    (found,) = [
        one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name == name
    ]
    return found


def history(uri: str, name: str, key: str) -> list[tuple[int, float]]:
    run_id = the_run(uri, name).info.run_id
    found = mlflow.MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((one.step, one.value) for one in found)


def test_metrics_params_tags_and_state_arrive(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    wrote = tracker(uri, "whole", seed=3, note="x" * 2000).write(
        [LOSS, DEV], state="done", tags={"selftrain.model": "/store/models/ab"}
    )
    assert wrote == 4
    assert capfd.readouterr().out == ""  # of `selftrain run --json`
    assert history(uri, "whole", "round-1/training/loss") == [(10, 1.5), (20, 0.75)]
    assert history(uri, "whole", "rounds/dev/accuracy") == [(0, 0.5), (1, 0.625)]
    found = the_run(uri, "whole")
    assert found.info.status == "FINISHED"
    assert found.data.params == {"seed": "3", "note": "x" * 500}
    assert found.data.tags["selftrain.run"] == "whole"
    assert found.data.tags["selftrain.model"] == "/store/models/ab"


def test_a_resumed_run_goes_on_in_its_run_and_sends_no_step_twice(uri: str) -> None:
    first = tracker(uri, "resumed", seed=3)
    assert first.write([LOSS], state="stopped", tags={}) == 2
    assert first.write([LOSS], state="stopped", tags={}) == 0
    assert the_run(uri, "resumed").info.status == "KILLED"
    again = tracker(uri, "resumed", seed=3, rounds=2)
    assert again.write([MORE, DEV], state="unfinished", tags={}) == 3
    assert the_run(uri, "resumed").info.status == "RUNNING"
    assert history(uri, "resumed", "round-1/training/loss") == [(10, 1.5), (20, 0.75), (30, 0.5)]
    assert the_run(uri, "resumed").data.params == {"seed": "3", "rounds": "2"}


def test_steps_of_a_series_that_is_known_only_later_are_not_sent_twice(uri: str) -> None:
    assert tracker(uri, "later").write([LOSS], state="stopped", tags={}) == 2
    again = tracker(uri, "later")
    assert again.write([DEV], state="unfinished", tags={}) == 2
    assert again.write([DEV, MORE], state="unfinished", tags={}) == 1
    assert history(uri, "later", "round-1/training/loss") == [(10, 1.5), (20, 0.75), (30, 0.5)]


def test_runs_of_one_name_in_two_stores_are_two(uri: str) -> None:
    for store in ("/one", "/two"):
        run = MlflowRun(MlflowTracker(uri=uri), store=store, run="twin", params={})
        assert run.write([LOSS], state="done", tags={}) == 2
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("selftrain")
    stores = [
        one.data.tags["selftrain.store"]
        for one in client.search_runs([experiment.experiment_id])
        if one.info.run_name == "twin"
    ]
    assert sorted(stores) == ["/one", "/two"]


def test_more_points_and_params_than_a_request_takes_are_sent_in_several(uri: str) -> None:
    many = Series("round-1", "training/loss", tuple(Point(i, i / 2, 1e9) for i in range(2500)))
    params = {f"key{i}": i for i in range(150)}
    assert tracker(uri, "long", **params).write([many], state="done", tags={}) == 2500
    assert len(history(uri, "long", "round-1/training/loss")) == 2500
    assert len(the_run(uri, "long").data.params) == 150


def test_points_that_arrived_before_a_failure_are_not_sent_again(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker(uri, "cut-off")

    def fail(*_: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.set_tag", fail)
        with pytest.raises(ConnectionError, match="gone"):
            run.write([LOSS], state="done", tags={"selftrain.report": "x"})
    assert run.write([MORE], state="done", tags={}) == 1
    assert [one[0] for one in history(uri, "cut-off", "round-1/training/loss")] == [10, 20, 30]


def test_a_server_that_is_not_there_is_an_error_of_seconds(tmp_path: Path) -> None:
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"127\.0\.0\.1"):
        tracker("http://127.0.0.1:9", "nowhere").write([LOSS], state="done", tags={})


def test_a_database_needs_no_server(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracker(uri, "local").write([LOSS], state="done", tags={}) == 2
    assert tracker(uri, "local").write([MORE], state="done", tags={}) == 1
    assert len(history(uri, "local", "round-1/training/loss")) == 3
