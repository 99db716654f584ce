"""What the Prefect UI shows of a run: read back from a real server."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)

import flows.artifacts
from flows.artifacts import artifact_key, results_page
from flows.config import SelfTrainingConfig
from flows.run_status import RoundStatus, RunStatus, read_status
from flows.self_training import self_training
from flows.server import wait_until_recorded
from storage.store import open_store
from tasks import live_progress

pytestmark = pytest.mark.usefixtures("prefect_api", "trained_here")

MakeConfig = Callable[..., SelfTrainingConfig]
NAME = "watched-20260101t020000z"


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def artifacts(client: SyncPrefectClient, key: str) -> list[Any]:
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    return client.read_artifacts(artifact_filter=wanted)


def test_keys_are_what_prefect_allows() -> None:
    assert artifact_key("progress", "Night_1", "rounds ü") == "progress-night-1-rounds--"


def status_of(**changes: Any) -> RunStatus:
    first = RoundStatus(0, architecture="small_cnn-4x1", dev_accuracy=0.8, dev_interval=[0.5, 0.9])
    second = RoundStatus(
        1,
        architecture="small_cnn-8x1",
        promoted=True,
        dev_accuracy=0.9,
        dev_interval=[0.6, 1.0],
        test_accuracy=0.85,
        pseudo_labels={"kept": 1200, "unique": 1000, "precision": 0.96},
        stages=[{"seconds": 12.4}],
    )
    values: dict[str, Any] = {
        "run": "mine",
        "state": "unfinished",
        "stop_reason": None,
        "store": "s3://bucket/store",
        "versions_mixed": False,
        "labels": {"labeled": 24, "dev": 15, "sum": 39},
        "rounds": (first, second),
        "baseline": None,
        "model_url": "s3://bucket/store/models/f00",
    }
    return RunStatus(**values | changes)


def test_results_are_a_table_of_few_columns_and_the_places_of_report_and_model() -> None:
    assert results_page(status_of(), None) == (
        "| round | dev accuracy | test accuracy | pseudo-labels | precision | promoted |\n"
        "|---|---|---|---|---|---|\n"
        "| **0**<br>small_cnn-4x1<br>0 s | 80.0 %<br>[50.0, 90.0] |  |  |  |  |\n"
        "| **1**<br>small_cnn-8x1<br>12 s | 90.0 %<br>[60.0, 100.0] | 85.0 %"
        " | 1,200<br>(1,000 images) | 96.0 % | yes |\n"
        "\n24 labels + 15 dev = 39 labelled images; accuracies with 95 % intervals."
        " Pseudo-labels are counted with their copies.\n"
        "\n**State:** running or interrupted; `selftrain resume mine` goes on\n"
        "\n```\nreport: s3://bucket/store/runs/mine/report.html\n"
        "model: s3://bucket/store/models/f00\n```"
    )


def test_results_link_to_where_browsers_find_the_store() -> None:
    page = results_page(status_of(), "https://store.example.org/selftrain/")

    assert (
        "**Open:** [report](https://store.example.org/selftrain/runs/mine/report.html),"
        " [model](https://store.example.org/selftrain/models/f00/manifest.json)"
    ) in page
    first = results_page(status_of(model_url=None), "http://127.0.0.1:8000")
    assert "**Open:** [report](http://127.0.0.1:8000/runs/mine/report.html)\n" in first
    assert "model" not in first


@pytest.mark.parametrize("url", ["file:///store", "/store", "https://", "https://me:secret@host"])
def test_an_address_that_no_link_can_have_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="SELFTRAIN_STORE_WEB_URL is ") as refused:
        results_page(status_of(), url)
    assert "secret" not in str(refused.value)


@pytest.mark.slow
def test_one_can_tell_what_runs_how_far_and_how_good(
    tiny_config: MakeConfig, client: SyncPrefectClient, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "store", "rounds=1", name=NAME)

    state = self_training(config, return_state=True)

    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id is not None
    assert wait_until_recorded(str(flow_run_id), at_least=12)
    flow_run = client.read_flow_run(flow_run_id)
    assert flow_run.name == NAME
    assert set(flow_run.tags) == {NAME, "watched", "baseline"}, "the last part that ran"
    children = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
    parts = client.read_flow_runs(flow_run_filter=children)
    assert {one.name for one in parts} == {"round 1 · label", "round 1 · select"}
    assert all({NAME, "watched", "round-1"} <= set(one.tags) for one in parts)
    of_parts = FlowRunFilter(id=FlowRunFilterId(any_=[one.id for one in parts]))
    names = {one.name for one in client.read_task_runs(flow_run_filter=of_parts)}
    assert "write-selections · unlabeled-0 + 4" in names

    (labeled,) = artifacts(client, f"progress-{NAME}-r1-label")
    assert labeled.data == 100
    assert labeled.description is not None
    assert "round 1 · label: 50 of 50 images" in labeled.description
    assert "img/s" in labeled.description
    assert "last dev accuracy" in labeled.description
    (student,) = artifacts(client, f"progress-{NAME}-r1-student")
    assert student.data == 100
    assert student.description is not None
    assert ": 12 of 12 steps, loss " in student.description
    assert "last dev accuracy" in student.description
    assert "(round 0)" in student.description

    table = max(artifacts(client, f"results-{NAME}"), key=lambda one: one.created)
    status = read_status(open_store(str(tmp_path / "store")), NAME)
    assert table.data == results_page(status, None)
    assert table.description == f"Run {NAME}: done (all rounds done)"
    for name, title in (("confidence", "Kept and"), ("classes", "Samples per class")):
        figure = artifacts(client, f"{name}-{NAME}")[-1]
        head, _, data = figure.data.partition(",")
        assert head.startswith(f"![{title}")
        assert head.endswith("](data:image/png;base64")
        assert base64.b64decode(data.removesuffix(")")).startswith(b"\x89PNG\r\n\x1a\n")


def test_a_failed_run_says_in_its_state_how_to_go_on(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    strict = "selection={threshold: {kind: fixed, confidence: 1.0}}"
    state = self_training(tiny_config(store, strict), return_state=True)

    assert state.type.value == "FAILED"
    assert state.message is not None
    assert f"selftrain resume tiny --store {store}" in state.message
    assert read_status(open_store(str(store)), "tiny").state == "failed"
    error = state.result(raise_on_failure=False)
    assert isinstance(error, Exception)
    assert state.message.startswith(f"{type(error).__name__}: {error}")
    with pytest.raises(type(error)):  # called plainly, a failed flow raises as ever
        self_training(tiny_config(store, strict))

    refused = self_training(tiny_config(store, "rounds=1"), return_state=True)

    assert refused.message is not None
    assert "RunExists" in refused.message
    assert "start the run again" in refused.message


def test_a_run_goes_on_without_any_view(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise ConnectionError("no artifacts today")

    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    for name in ("create_markdown_artifact", "get_client"):
        monkeypatch.setattr(flows.artifacts, name, refuse)
    monkeypatch.setattr(live_progress, "create_progress_artifact", refuse)

    self_training(tiny_config(tmp_path / "store", "rounds=1", "baseline=false"))

    assert read_status(open_store(str(tmp_path / "store")), "tiny").state == "done"
    for what in ("results of run tiny", "figures of run tiny", "tags of run tiny"):
        assert f"{what} could not be shown in Prefect: no artifacts today" in caplog.text
