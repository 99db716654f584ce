"""From a config to deployments: schedules, pools, parameters, and what is refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint
from prefect.runner import _workspace_runtime_bootstrap
from prefect.runner._workspace_runtime import PreparedWorkspaceManifest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from flows.config import SelfTrainingConfig
from flows.deploying import (
    NoServer,
    Pools,
    deploy,
    deployments_of,
    run_parameters,
)
from flows.loading import ConfigError, load_config, parse_config
from flows.opening import open_run, reopened_config
from flows.operating_config import RestartConfig, ScheduleConfig
from flows.schedules import in_words, one_at_a_time, prefect_schedule
from flows.serving import serve_on_schedule
from storage.runs import RunExists, read_run_config
from storage.store import open_store

POOLS = Pools("gpu", "cpu")


def demo(*overrides: str) -> SelfTrainingConfig:
    return load_config("demo", overrides=["store=/store", *overrides])


def deployed(*overrides: str) -> dict[str, RunnerDeployment]:
    return {str(one.flow_name): one for one in deployments_of(demo(*overrides), POOLS)}


@pytest.mark.parametrize(
    ("section", "rule", "words"),
    [
        (
            {"cron": "0 2 * * *", "timezone": "Europe/Berlin"},
            {"cron": "0 2 * * *", "interval": None, "rrule": None, "timezone": "Europe/Berlin"},
            "cron 0 2 * * * (Europe/Berlin)",
        ),
        (
            {"interval_seconds": 5400, "active": False},
            {"cron": None, "interval": timedelta(minutes=90), "rrule": None, "timezone": "UTC"},
            "every 5400 s (UTC), switched off",
        ),
        (
            {"rrule": "FREQ=DAILY;BYHOUR=3"},
            {"cron": None, "interval": None, "rrule": "FREQ=DAILY;BYHOUR=3", "timezone": "UTC"},
            "rrule FREQ=DAILY;BYHOUR=3 (UTC)",
        ),
    ],
)
def test_a_schedule_is_prefects_with_its_time_zone(
    section: dict[str, Any], rule: dict[str, Any], words: str
) -> None:
    config = ScheduleConfig(**section)

    schedule = prefect_schedule(config)

    assert schedule is not None
    assert {name: getattr(schedule, name) for name in rule} == rule
    assert schedule.active is section.get("active", True)
    assert in_words(config) == words


def test_an_interval_is_counted_from_the_same_moment_whenever_it_is_deployed() -> None:
    schedule = prefect_schedule(ScheduleConfig(interval_seconds=60, timezone="Asia/Tokyo"))

    assert schedule is not None
    # Midnight in Tokyo is 15:00 UTC of the day before.
    assert schedule.anchor_date.timestamp() == 1577804400


def test_without_a_rule_nothing_starts_by_itself() -> None:
    assert prefect_schedule(ScheduleConfig()) is None
    assert in_words(ScheduleConfig()) == "none"
    assert deployed()["self-training"].schedules == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule={cron: '* * * * *', rrule: 'FREQ=DAILY'}", "cron and rrule are both set"),
        ("schedule.timezone=Mars/Olympus", "no IANA time zone"),
        ("schedule.timezone=''", "no IANA time zone"),
        ("schedule.interval_seconds=0", "greater than 0"),
        ("schedule.overlap=skip", "'wait' or 'cancel'"),
        ("restart.max_restarts=-1", "greater than or equal to 0"),
        ("restart.lost_after_seconds=60", "greater than or equal to 90"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo(override)


@pytest.mark.parametrize("rule", ["cron: '0 2 * *'", "cron: 'at two'", "rrule: 'FREQ=SOMETIMES'"])
def test_a_rule_that_cannot_be_read_is_refused_when_it_is_deployed(rule: str) -> None:
    key = rule.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"schedule\.{key} = .* cannot be read"):
        deployed(f"schedule={{{rule}}}")


def test_runs_of_one_config_wait_for_each_other_or_are_cancelled() -> None:
    waiting, cancelled = (one_at_a_time(ScheduleConfig(overlap=o)) for o in ("wait", "cancel"))

    assert (waiting.limit, waiting.collision_strategy) == (1, "ENQUEUE")
    assert (cancelled.limit, cancelled.collision_strategy) == (1, "CANCEL_NEW")
    run = deployed("schedule.overlap=cancel")["self-training"]
    assert run.concurrency_limit == 1
    assert run.concurrency_options is not None
    assert run.concurrency_options.collision_strategy == "CANCEL_NEW"


def test_stages_have_the_pools_that_fit_them_and_the_settings_of_the_config() -> None:
    stages = deployed("device=cpu", "max_bad_samples=3", "seed=7", "labeling.batch_size=5")

    assert {name: one.work_pool_name for name, one in stages.items()} == {
        "self-training": "gpu",
        "label": "gpu",
        "select": "cpu",
        "train": "gpu",
        "evaluate": "gpu",
        "restart": "cpu",
    }
    assert {one.name for one in stages.values()} == {"demo"}
    assert stages["label"].parameters["config"]["batch_size"] == 5
    assert stages["select"].parameters["seed"] == 7
    assert stages["train"].parameters == {"store": "/store", "device": "cpu"}
    assert stages["evaluate"].parameters == {
        "store": "/store",
        "device": "cpu",
        "max_bad_samples": 3,
    }
    assert stages["label"].job_variables["env"]["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"


@pytest.mark.parametrize("choice", ["promotion", "round"])
def test_a_config_that_asks_a_person_brings_the_form_of_the_answer(choice: str) -> None:
    asked = deployed(f"approve={choice}")["approve"]

    assert (asked.name, asked.work_pool_name) == ("demo", "gpu"), "it goes on with the run"
    assert asked.parameters == {"form": {"run": "demo", "store": "/store"}}
    assert "approve" not in deployed(), "a form whose every answer is refused"


def test_a_run_gives_a_sign_of_life_often_enough_to_lose_three_of_them() -> None:
    def heartbeat(lost_after: int) -> str:
        run = deployed(f"restart.lost_after_seconds={lost_after}")["self-training"]
        return run.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]

    assert heartbeat(600) == "150"
    assert heartbeat(90) == "30", "Prefect sends none more often"


def test_every_parameter_and_entrypoint_that_is_deployed_is_a_flows_own() -> None:
    for one in deployed().values():
        flow: Any = load_flow_from_entrypoint(str(one.entrypoint), use_placeholder_flow=False)

        assert isinstance(flow, Flow)
        assert one.entrypoint == f"{flow.fn.__module__}.{flow.fn.__name__}"
        assert set(one.parameters) <= set(flow.parameters.properties)
        assert not one._path, "no path of the deploying machine"


def test_a_store_that_only_workers_know_stays_open() -> None:
    config = load_config("demo")
    assert run_parameters(config)["config"]["store"] is None
    for one in deployments_of(config, POOLS):
        assert "store" not in one.parameters


def test_parameters_of_a_run_are_its_whole_config_without_what_starts_it() -> None:
    config = demo("schedule.cron='0 2 * * *'", "restart.max_restarts=9")

    parameters = run_parameters(config)["config"]

    assert not {"schedule", "restart", "alert"} & parameters.keys()
    assert parameters["rounds"] == config.rounds
    assert parse_config(parameters, where="deployment") == config.model_copy(
        update={"schedule": ScheduleConfig(), "restart": RestartConfig()}
    )


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("labeled: l, dev: /d, unlabeled: s3://b/u", "data.labeled"),
        ("root: shards, labeled: l, dev: /d, unlabeled: /u", "data.labeled"),
        ("root: /shards, labeled: l, dev: d, unlabeled: u, exclude: keys.txt", None),
        ("labeled: /l, dev: /d, unlabeled: /u, exclude: keys.txt", "data.exclude"),
    ],
)
def test_data_that_a_workers_folder_does_not_hold_is_refused(
    data: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a server that is not there: what is refused must be refused before it is asked.
    monkeypatch.setattr("flows.deploying.version_of_server", _unreachable)
    config = demo(f"data={{kind: shards, {data}}}")
    error, message = (ConfigError, rf"{key} = .* a worker gives each run a temporary folder")
    if key is None:
        error, message = ConnectionError, "asked the server"
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(error, match=message),
    ):
        deploy(config, POOLS)


def _unreachable(url: str) -> None:
    raise ConnectionError("asked the server")


@pytest.mark.parametrize("hook", ["crashed", "cancellation"])
def test_flow_is_imported_where_prefect_looks_for_hooks_after_its_end(
    hook: str, tmp_path: Path
) -> None:
    # What a worker starts then is a file of prefect/runner, beside which there is a storage.py.
    run = deployed()["self-training"]
    manifest = PreparedWorkspaceManifest(
        working_directory=tmp_path,
        runtime_entrypoint=str(run.entrypoint),
        hook_command=None,
        environment={},
    )
    written = {"manifest": manifest, "run": FlowRun(flow_id=uuid4()), "state": Crashed()}
    for name, model in written.items():
        (tmp_path / name).write_text(model.model_dump_json())

    done = subprocess.run(
        [sys.executable, _workspace_runtime_bootstrap.__file__, "hook", hook, *written],
        cwd=tmp_path,
        env={**os.environ, **run.job_variables["env"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_deploying_to_no_server_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(NoServer, match="PREFECT_API_URL"),
    ):
        deploy(demo(), POOLS)


def test_serving_without_a_schedule_is_refused() -> None:
    for overrides in ([], ["schedule.cron='0 2 * * *'", "schedule.active=false"]):
        with pytest.raises(ConfigError, match="no schedule that is active"):
            serve_on_schedule(demo(*overrides))


def test_a_run_is_pinned_to_no_schedule(
    tmp_path: Path, tiny_config: Callable[..., SelfTrainingConfig]
) -> None:
    store = open_store(str(tmp_path / "store"))
    open_run(store, tiny_config(store.url))

    again = tiny_config(store.url, "schedule.cron='0 2 * * *'", "restart.max_restarts=1")

    assert open_run(store, again).name == "tiny"
    assert not {"schedule", "restart", "alert"} & read_run_config(store, "tiny")["config"].keys()
    with pytest.raises(ConfigError, match="a run keeps its config"):
        reopened_config(store, "tiny", ["schedule.cron=null"])
    with pytest.raises(RunExists, match="seed"):
        open_run(store, tiny_config(store.url, "seed=5"))
