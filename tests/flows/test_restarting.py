"""Crashed and lost runs are started again: the flow that does it, and real kills end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import Event
from prefect.logging import disable_run_logger
from prefect.states import Crashed, Running, Scheduled
from pydantic import SecretStr

import flows.restarting
from flows.alert_automations import UnknownBlock
from flows.deploying import Deployed, Pools, deploy
from flows.loading import load_config
from flows.operating_config import AlertConfig, RestartConfig
from flows.restarting import restart_run
from flows.run_status import read_status
from storage.runs import append_event, read_events
from storage.store import open_store

POLICY = RestartConfig(max_restarts=2, delay_seconds=3600)


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


@pytest.fixture
def deployed(prefect_api: str, tmp_path: Path, request: pytest.FixtureRequest) -> Deployed:
    """The deployments of a config that bears the test's name."""
    name = request.node.name.replace("_", "-")[-40:].strip("-")
    config = load_config("supervised", name=name, overrides=[f"store={tmp_path / 'store'}"])
    # Without automations: what the flow does is called here, and by nobody else.
    return deploy(config, Pools("unattended", "unattended"), with_automations=False)


@pytest.fixture
def deployment(deployed: Deployed) -> UUID:
    """The deployment of whole runs."""
    return _id_of(deployed, "self-training")


def _id_of(deployed: Deployed, flow: str) -> UUID:
    return UUID(next(d["id"] for d in deployed.deployments if d["name"].startswith(f"{flow}/")))


def crashed_run(
    client: SyncPrefectClient, deployment: UUID, *, state: State | None = None, **options: Any
) -> FlowRun:
    flow_run = client.create_flow_run_from_deployment(deployment, **options)
    client.set_flow_run_state(flow_run.id, state or Crashed(message="killed"), force=True)
    return client.read_flow_run(flow_run.id)


def restart(flow_run_id: UUID, policy: RestartConfig = POLICY) -> State:
    with disable_run_logger():
        return restart_run.fn(flow_run_id, policy)


def runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return client.read_flow_runs(deployment_filter=chosen, sort=FlowRunSort.EXPECTED_START_TIME_ASC)


def test_a_crashed_run_is_scheduled_anew_once(
    client: SyncPrefectClient, deployment: UUID, tmp_path: Path
) -> None:
    crashed = crashed_run(client, deployment)
    name = crashed.parameters["config"]["name"]

    first, again = restart(crashed.id), restart(crashed.id)

    assert (first.name, again.name) == ("Restarted", "Skipped")
    assert str(again.message).endswith("is seen to already")
    _, new = sorted(runs_of(client, deployment), key=lambda run: run.id != crashed.id)
    assert new.state is not None
    assert new.state.is_scheduled()
    assert new.name == name
    assert new.expected_start_time is not None
    assert crashed.end_time is not None
    delay = (new.expected_start_time - crashed.end_time).total_seconds()
    assert 3600 <= delay < 3700
    assert new.parameters["config"] == crashed.parameters["config"]
    (event,) = read_events(open_store(str(tmp_path / "store")), name)
    assert (event["type"], event["number"], event["flow_run"]) == (
        "run_restarted",
        1,
        str(new.id),
    )


def test_a_scheduled_run_keeps_its_name_when_it_is_started_again(
    client: SyncPrefectClient, deployment: UUID
) -> None:
    crashed = crashed_run(client, deployment, tags=["auto-scheduled"])
    assert crashed.expected_start_time is not None
    plain = crashed.parameters["config"]["name"]

    restart(crashed.id)

    (new,) = [run for run in runs_of(client, deployment) if run.id != crashed.id]
    name = f"{plain}-{crashed.expected_start_time:%Y%m%dt%H%M%S}z"
    # Not the time of the restart, which a name made anew would have.
    assert new.parameters["config"]["name"] == new.name == name
    assert "auto-scheduled" not in new.tags


def test_a_run_without_progress_is_given_up_with_an_event(
    client: SyncPrefectClient, deployment: UUID, tmp_path: Path, emitted: list[Event]
) -> None:
    outcomes: list[str] = []
    name = ""
    for _ in range(3):
        crashed = crashed_run(client, deployment)
        name = crashed.parameters["config"]["name"]
        outcomes.append(str(restart(crashed.id).name))
        for run in runs_of(client, deployment):
            if run.state is not None and run.state.is_scheduled():
                client.delete_flow_run(run.id)  # as if it had been the one that crashed

    assert outcomes == ["Restarted", "Restarted", "GivenUp"]
    store = str(tmp_path / "store")
    events = read_events(open_store(store), name)
    assert [event["type"] for event in events] == ["run_restarted", "run_restarted", "run_given_up"]
    assert [event.get("delay_seconds") for event in events] == [3600, 3600, None]  # the longest
    (alert,) = emitted
    assert alert.event == "selftrain.run.given-up"
    assert alert.resource["prefect.resource.id"] == f"selftrain.run.{name}"
    assert alert.payload == {"run": name, "store": store, "restarts": 2, "max_restarts": 2}
    related = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in alert.related}
    assert related["deployment"] == f"prefect.deployment.{deployment}"


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The events that are emitted, in the place of being sent."""
    events: list[Event] = []

    def keep(**facts: Any) -> None:
        events.append(Event.model_validate(facts))

    monkeypatch.setattr("flows.run_events.emit_event", keep)
    return events


def test_a_run_that_goes_on_or_is_done_is_left_alone(
    client: SyncPrefectClient, deployment: UUID, tmp_path: Path
) -> None:
    crashed = crashed_run(client, deployment)
    name = crashed.parameters["config"]["name"]
    other = crashed_run(client, deployment, state=Running(), name=name)
    assert f"goes on already: {other.id}" in str(restart(crashed.id).message)
    client.set_flow_run_state(other.id, Crashed(), force=True)

    store = open_store(str(tmp_path / "store"))
    append_event(store, name, "run_started")
    append_event(store, name, "run_done")
    assert "is done" in str(restart(crashed.id).message)
    append_event(store, name, "run_started")  # somebody ran it again, and that crashed
    assert restart(crashed.id).name == "Restarted"


def test_a_flow_run_that_somebody_retries_is_left_alone(
    client: SyncPrefectClient, deployment: UUID
) -> None:
    retried = crashed_run(client, deployment, state=Scheduled())
    assert restart(retried.id).name == "Skipped"


def test_a_restart_that_was_lost_before_its_record_is_recorded_and_not_repeated(
    client: SyncPrefectClient, deployment: UUID, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = crashed_run(client, deployment)

    def lost(*where: Any, **facts: Any) -> None:
        raise ConnectionError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(flows.restarting, "append_event", lost)
        with pytest.raises(ConnectionError):
            restart(crashed.id)
    assert restart(crashed.id).name == "Restarted"

    (new,) = [run for run in runs_of(client, deployment) if run.id != crashed.id]
    (event,) = read_events(open_store(str(tmp_path / "store")), new.name)
    assert (event["number"], event["flow_run"]) == (1, str(new.id))


def test_a_restart_that_was_lost_itself_is_made_up_for(
    client: SyncPrefectClient, deployed: Deployed, tmp_path: Path
) -> None:
    crashed = crashed_run(client, _id_of(deployed, "self-training"))
    lost = crashed_run(
        client, _id_of(deployed, "restart"), parameters={"flow_run_id": str(crashed.id)}
    )

    assert restart(lost.id).name == "Restarted"

    name = crashed.parameters["config"]["name"]
    (event,) = read_events(open_store(str(tmp_path / "store")), name)
    assert event["occasion"] == f"{crashed.id}-{crashed.run_count}"


def test_restarts_that_are_lost_one_after_the_other_come_to_an_end(
    client: SyncPrefectClient, deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.restarting, "MAX_CHAIN", 0)
    crashed = crashed_run(client, _id_of(deployed, "self-training"))
    lost = crashed_run(
        client, _id_of(deployed, "restart"), parameters={"flow_run_id": str(crashed.id)}
    )

    assert restart(lost.id).name == "GivenUp"


@pytest.mark.slow
def test_automations_are_brought_up_to_date_and_taken_away(client: SyncPrefectClient) -> None:
    pools = Pools("unattended", "unattended")

    def names(*overrides: str, with_automations: bool = True) -> dict[str, str]:
        config = load_config("supervised", name="automated", overrides=["store=/s", *overrides])
        deployed = deploy(config, pools, with_automations=with_automations)
        return {one["name"]: one["id"] for one in deployed.automations}

    first, again = names(), names("restart.lost_after_seconds=120")
    assert first == again
    kinds = ["failed", "given up", "worse", "collapse", "stalled"]
    assert list(first) == [f"selftrain automated: {kind}" for kind in ("lost", "restart", *kinds)]
    lost = client.read_automation(first["selftrain automated: lost"])
    assert lost is not None
    assert lost.trigger.model_dump()["within"].total_seconds() == 120
    assert "selftrain automated: restart" not in names("restart.max_restarts=0")
    assert names(with_automations=False) == {}
    assert client.read_automations_by_name("selftrain automated: lost") == []


@pytest.mark.slow
def test_alerts_go_through_the_block_that_is_named(client: SyncPrefectClient) -> None:
    pools = Pools("unattended", "unattended")
    config = load_config("supervised", name="alerted", overrides=["store=/s"])
    named = config.model_copy(update={"alert": AlertConfig(notify="webhook/pager")})
    with pytest.raises(UnknownBlock, match="prefect block ls"):
        deploy(named, pools)
    Webhook(url=SecretStr("http://127.0.0.1:9/hook")).save("pager")

    deployed = deploy(named, pools)

    ids = {one["name"].rpartition(": ")[2]: one["id"] for one in deployed.automations}
    actions: dict[str, list[str]] = {}
    for kind, automation_id in ids.items():
        automation = client.read_automation(automation_id)
        assert automation is not None
        actions[kind] = [action.type for action in automation.actions]
    assert actions["lost"] == ["change-flow-run-state"]
    assert actions["restart"] == ["run-deployment"]
    alerts = {"failed", "given up", "worse", "collapse", "stalled"}
    assert {kind for kind, types in actions.items() if types == ["call-webhook"]} == alerts
    # Without a block an alert is on record in the UI and goes nowhere.
    (quiet,) = [a for a in deploy(config, pools).automations if a["name"].endswith("worse")]
    automation = client.read_automation(quiet["id"])
    assert automation is not None
    assert [action.type for action in automation.actions] == ["do-nothing"]


# Real kills: a worker in a process of its own, a training that is killed after a checkpoint.

KILLED = [
    *["data.dev=40", "data.test=40", "teacher.batch_size=50", "device=cpu"],
    "teacher.architecture={kind: small_cnn, width: 8, depth: 1}",
    *["teacher.duration.steps=300", "teacher.checkpoint_every_steps=20"],
    *["restart.lost_after_seconds=90", "restart.delay_seconds=1"],
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_flow_is_started_again_and_goes_on_from_its_checkpoint(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    with _begun(client, tmp_path, "killed-flow") as (store, flow_run, worker):
        for process in _children(worker.pid):
            os.kill(process, signal.SIGKILL)
        _wait_until_done(store, "killed-flow")
        _assert_ended_well(client, store, flow_run, "killed-flow")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_of_a_terminated_worker_is_started_again_by_the_next_worker(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    with _begun(client, tmp_path, "lost-worker") as (store, flow_run, worker):
        worker.terminate()
        worker.wait(timeout=120)
        assert _state_of(client, flow_run) == "Running", "nobody has told the server"
        # As a service manager would; it knows nothing of the run.
        with _worker("lost-worker", tmp_path):
            _wait_until_done(store, "lost-worker")
            _assert_ended_well(client, store, flow_run, "lost-worker")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_of_a_killed_worker_comes_to_its_end_by_itself_or_by_the_next_worker(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    with _begun(client, tmp_path, "killed-worker") as (store, _, worker):
        worker.kill()
        worker.wait()
        with _worker("killed-worker", tmp_path):
            _wait_until_done(store, "killed-worker")
            *before, last = _named(client, "killed-worker")
            _wait_for_state(client, last.id, "Completed")
    # Its output went through the worker: the next line of its log is its end, if there is one.
    assert [_state_of(client, run.id) for run in before] == ["Crashed"] * len(before)
    events = [event["type"] for event in read_events(open_store(str(store)), "killed-worker")]
    assert events.count("run_restarted") == len(before) <= 1


@contextmanager
def _begun(
    client: SyncPrefectClient, folder: Path, name: str
) -> "Iterator[tuple[Path, UUID, subprocess.Popen[bytes]]]":
    """Yield store, flow run and worker of a run whose training has written a checkpoint."""
    store = folder / "store"
    config = load_config("supervised", name=name, overrides=[f"store={store}", *KILLED])
    deployed = deploy(config, Pools(name, name))
    flow_run = client.create_flow_run_from_deployment(_id_of(deployed, "self-training"))
    with _worker(name, folder) as worker:
        deadline = time.monotonic() + 300
        while not list(store.glob("models/*/attempts/*/*/checkpoint.json")):
            assert worker.poll() is None
            assert time.monotonic() < deadline, _state_of(client, flow_run.id)
            time.sleep(0.1)
        assert read_status(open_store(str(store)), name).state == "unfinished", "killed too late"
        yield store, flow_run.id, worker


@contextmanager
def _worker(pool: str, folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    command = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "1"]
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            cwd=folder,
            env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "2"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # As a service manager does: a worker turns SIGTERM into SIGINT, which whatever runs
            # in the background of a script ignores.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        children = _children(process.pid)
        process.kill()
        process.wait()
        for child in children:  # a killed worker leaves its run behind
            _kill(child)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _children(pid: int) -> list[int]:
    """Return the processes that any thread of a process has started and that live."""
    return [
        int(child)
        for children in Path("/proc").glob(f"{pid}/task/*/children")
        for child in children.read_text().split()
    ]


def _wait_until_done(store: Path, name: str) -> None:
    deadline = time.monotonic() + 600
    while read_status(open_store(str(store)), name).state != "done":
        assert time.monotonic() < deadline, json.dumps(read_events(open_store(str(store)), name))
        time.sleep(1)


def _assert_ended_well(client: SyncPrefectClient, store: Path, flow_run: UUID, name: str) -> None:
    second = next(run for run in _named(client, name) if run.id != flow_run)
    _wait_for_state(client, second.id, "Completed")
    assert _state_of(client, flow_run) == "Crashed"
    assert len(_named(client, name)) == 2, "a new flow run of the same run, and one only"
    events = read_events(open_store(str(store)), name)
    kinds = [event["type"] for event in events]
    assert kinds.count("run_started") == 2
    (restarted,) = [event for event in events if event["type"] == "run_restarted"]
    assert restarted["number"] == 1
    assert restarted["flow_run"] == str(second.id)
    (provenance,) = store.glob("models/*/provenance.json")
    assert json.loads(provenance.read_bytes())["resumed_at_step"] >= 20


def _named(client: SyncPrefectClient, name: str) -> list[FlowRun]:
    """Return the flow runs of a run, in the order of their start."""
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )


def _state_of(client: SyncPrefectClient, flow_run: UUID) -> str | None:
    state = client.read_flow_run(flow_run).state
    return None if state is None else state.name


def _wait_for_state(client: SyncPrefectClient, flow_run: UUID, name: str) -> None:
    deadline = time.monotonic() + 60
    while _state_of(client, flow_run) != name:
        assert time.monotonic() < deadline, client.read_flow_run(flow_run).state
        time.sleep(0.5)
