"""infra/prefect.yaml: what it deploys can be imported, is valid, and runs on a schedule."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from flows.config import SelfTrainingConfig
from flows.loading import parse_config
from flows.run_status import read_status
from storage.runs import list_runs
from storage.store import open_store

ROOT = Path(__file__).parents[2]
PREFECT_FILE = ROOT / "infra" / "prefect.yaml"
SHORT = [
    *["rounds=1", "baseline=false", "data.dev=40", "data.test=40"],
    *["teacher.duration.steps=10", "teacher.warmup=null"],
    *["student.duration.steps=10", "student.warmup=null"],
    *["selection.threshold.confidence=0.1", "selection.allow_collapse=true"],
]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]


@pytest.mark.parametrize("entrypoint", [one["entrypoint"] for one in DEPLOYMENTS])
def test_every_entrypoint_is_a_flow_that_can_be_imported(entrypoint: str) -> None:
    flow: Any = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)

    assert isinstance(flow, Flow)
    assert entrypoint == f"{flow.fn.__module__}.{flow.fn.__name__}"
    assert flow.description, "the UI shows it"


def test_deployed_config_is_valid_and_has_no_store_of_its_own() -> None:
    nightly = DEPLOYMENTS[0]

    config = parse_config(nightly["parameters"]["config"], where="infra/prefect.yaml")

    assert isinstance(config, SelfTrainingConfig)
    assert config.store is None
    assert nightly["schedules"][0]["timezone"] == "Europe/Berlin"
    assert nightly["schedules"][0]["active"] is False, "deploying must not start trainings"


@pytest.mark.slow
def test_prefect_file_is_deployed_as_written(prefect_api: str) -> None:
    _prefect("work-pool", "create", "selftrain", "--type", "process", cwd=ROOT)
    _prefect("--no-prompt", "deploy", "--prefect-file", str(PREFECT_FILE), "--all", cwd=ROOT)
    with _client(prefect_api) as api:
        written = {one["name"] for one in DEPLOYMENTS}
        wanted = {"deployments": {"name": {"any_": sorted(written)}}}
        deployments = {one["entrypoint"]: one for one in _post(api, "/deployments/filter", wanted)}
    assert deployments.keys() == {one["entrypoint"] for one in DEPLOYMENTS}
    for one in deployments.values():
        assert one["work_pool_name"] == "selftrain"
        assert not one["pull_steps"]
        assert str(ROOT) not in str(one), "no path of the deploying machine"
    nightly = deployments["flows.self_training.self_training"]
    schedule = nightly["schedules"][0]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert schedule["schedule"]["timezone"] == "Europe/Berlin"
    assert schedule["active"] is False
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_deployed_config_runs_on_its_schedule_in_a_worker_under_a_name_of_its_own(
    prefect_api: str, tmp_path: Path
) -> None:
    # Every minute, so that a tick is near whenever the scheduler comes to look.
    schedule = ["schedule.cron='* * * * *'", "schedule.overlap=cancel"]
    deployed = _deploy(*schedule, pool="minutes")
    assert deployed["work_pools"] == [{"name": "minutes", "type": "process", "created": True}]
    names = [one["name"] for one in deployed["deployments"]]
    flows = ["self-training", "label", "select", "train", "evaluate", "restart"]
    assert names == [f"{flow}/minutely" for flow in flows]
    with _client(prefect_api) as api:
        for one in deployed["deployments"]:
            there = api.get(f"/deployments/{one['id']}").raise_for_status().json()
            assert there["work_pool_name"] == "minutes"
            assert not there["pull_steps"]
            assert str(ROOT) not in str(there), "no path of the deploying machine"
        run = api.get(f"/deployments/{deployed['deployments'][0]['id']}").json()
        assert run["global_concurrency_limit"]["limit"] == 1
        assert run["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        assert [one["schedule"]["cron"] for one in run["schedules"]] == ["* * * * *"]

        flow_run_id, due = _wait_for_scheduled_run(api, run["id"])
        time.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()))
        # Not from the repository: the packages are installed, and that is what a node has.
        store = tmp_path / "store"
        worker = ("worker", "start", "--pool", "minutes", "--type", "process", "--run-once")
        log = _prefect(*worker, cwd=tmp_path, SELFTRAIN_STORE=str(store))
        flow_run = _wait_until_final(api, flow_run_id)
        # Deployed again: the same deployments, and no run of the schedule before.
        again = _deploy("schedule.interval_seconds=86400", "schedule.active=false", pool="minutes")
        assert again["deployments"][0]["id"] == run["id"]
        assert again["work_pools"][0]["created"] is False
        run = api.get(f"/deployments/{run['id']}").json()
        assert [one["schedule"]["interval"] for one in run["schedules"]] == [86400]
        assert run["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        left = _post(api, "/flow_runs/filter", _runs_of(run["id"]) | scheduled)
        # Runs that are due already are late and will be made up for; none is to come.
        now = datetime.now(UTC)
        assert all(datetime.fromisoformat(one["expected_start_time"]) <= now for one in left)
        # They would take the one place from the run that is to be retried.
        for one in left:
            api.delete(f"/flow_runs/{one['id']}").raise_for_status()

    assert flow_run["state"]["name"] == "Completed", f"{flow_run['state']}\n{log}"
    assert re.fullmatch(r"minutely-\d{8}t\d{6}z", flow_run["name"])
    started = datetime.strptime(flow_run["name"], "minutely-%Y%m%dt%H%M%Sz").replace(tzinfo=UTC)
    assert started == due, "the time it was scheduled for"
    opened = open_store(str(store))
    names = list_runs(opened)
    assert flow_run["name"] in names
    status = read_status(opened, flow_run["name"])
    assert (status.state, status.store) == ("done", str(store))
    assert [one.promoted for one in status.rounds] == [None, True]

    # Run again as after a crash, by hand in the UI: the same run of the store, and nothing anew.
    _prefect("flow-run", "retry", flow_run_id, cwd=tmp_path)
    _prefect(*worker, cwd=tmp_path, SELFTRAIN_STORE=str(store))
    with _client(prefect_api) as api:
        retried = _wait_until_final(api, flow_run_id)
    assert (retried["state"]["name"], retried["run_count"]) == ("Completed", 2)
    assert list_runs(opened) == names
    rounds = read_status(opened, flow_run["name"]).rounds
    assert {stage["state"] for one in rounds for stage in one.stages} == {"reused"}


@pytest.mark.slow
def test_gpus_of_a_pool_are_a_limit_that_is_kept_up_to_date(prefect_api: str) -> None:
    with _client(prefect_api) as api:
        for gpus in (2, 8):
            done = _selftrain("deploy", "demo", "--name=gpus", "--pool=p", f"--gpus={gpus}")
            assert done.returncode == 0, done.stderr
            assert f"concurrency limit gpu: {gpus}" in done.stdout
            limit = api.get("/v2/concurrency_limits/gpu").raise_for_status().json()
            assert (limit["limit"], limit["active"]) == (gpus, True)
        # Nobody else's tests are to wait for these slots.
        api.delete("/v2/concurrency_limits/gpu").raise_for_status()


def test_a_pool_of_a_cluster_is_not_made_but_its_command_is_named(prefect_api: str) -> None:
    done = _selftrain("deploy", "demo", "--pool", "gpus", "--pool-type", "kubernetes")

    assert done.returncode == 2
    assert "prefect work-pool create gpus --type kubernetes --base-job-template" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_serve_starts_a_run_at_the_tick_of_its_own_server(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with _serving(store, tmp_path, SHORT) as process:
        name = _wait_for_a_finished_run(store, process)
    assert re.fullmatch(r"minutely-\d{8}t\d{4}00z", name), "the tick, not the time of the start"
    assert process.returncode == 0, "SIGTERM and Ctrl-C are how it ends"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_serve_that_is_stopped_leaves_its_run_with_a_checkpoint(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with _serving(store, tmp_path, [*SHORT, "teacher.duration.steps=100000"]) as process:
        deadline = time.monotonic() + 300
        while not list(store.glob("models/*/specification.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline, "no training has begun"
            time.sleep(0.5)
        time.sleep(10)  # for the worker's imports and first steps
    assert process.returncode == 0
    (name,) = list_runs(open_store(str(store)))
    assert read_status(open_store(str(store)), name).state == "stopped"
    assert list(store.glob("models/*/attempts/*/*/checkpoint.json"))


@contextmanager
def _serving(store: Path, folder: Path, settings: list[str]) -> "Iterator[subprocess.Popen[bytes]]":
    """Serve the demo every minute, and stop that by SIGTERM at the end."""
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.cli", "serve", "demo", "--cron", "* * * * *"]
    command += [f"--store={store}", "--name=minutely", *(f"--set={one}" for one in settings)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=120)
        finally:
            process.kill()


def _wait_for_a_finished_run(store: Path, process: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None
        opened = open_store(str(store))
        for name in list_runs(opened):
            if read_status(opened, name).state == "done":
                return name
        time.sleep(1)
    raise AssertionError("no run has come to its end")


def _wait_for_scheduled_run(api: httpx.Client, deployment_id: str) -> tuple[str, datetime]:
    """Return id and time of the first run that the server's own scheduler has made and tagged."""
    deadline = time.monotonic() + 120
    wanted = {
        "deployments": {"id": {"any_": [deployment_id]}},
        "flow_runs": {"tags": {"all_": ["auto-scheduled"]}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    while time.monotonic() < deadline:
        runs = _post(api, "/flow_runs/filter", wanted)
        if runs:
            return runs[0]["id"], datetime.fromisoformat(runs[0]["expected_start_time"])
        time.sleep(0.5)
    raise AssertionError("the scheduler made no run within two minutes")


def _runs_of(deployment_id: str) -> dict[str, Any]:
    return {"deployments": {"id": {"any_": [deployment_id]}}}


def _wait_until_final(api: httpx.Client, flow_run_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        flow_run = api.get(f"/flow_runs/{flow_run_id}").raise_for_status().json()
        if flow_run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return flow_run
        assert time.monotonic() < deadline, flow_run["state"]
        time.sleep(0.5)


class _Patient(httpx.HTTPTransport):
    """Asks again where the server's SQLite was busy (503), as Prefect's own clients do."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + 120
        while True:
            response = super().handle_request(request)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return response
            if time.monotonic() > deadline:
                return response
            response.close()
            time.sleep(1)


def _deploy(*overrides: str, pool: str) -> dict[str, Any]:
    """Deploy the demo in a short form as `minutely` and return what --json says."""
    settings = [argument for one in (*SHORT, *overrides) for argument in ("--set", one)]
    done = _selftrain("deploy", "demo", "--name", "minutely", "--pool", pool, "--json", *settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _selftrain(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "SELFTRAIN_STORE"}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _client(api_url: str) -> httpx.Client:
    return httpx.Client(base_url=api_url, timeout=60, transport=_Patient())


def _post(api: httpx.Client, path: str, body: Any) -> Any:
    return api.post(path, json=body).raise_for_status().json()


def _prefect(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run Prefect's command line against the server that PREFECT_API_URL names."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output
