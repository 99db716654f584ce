"""Deployments of a config on Prefect work pools: the whole run, and its stages alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ActionTypes
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType

from flows.alert_automations import ALERTS, STALLED, action_of, alerts_of
from flows.approving import approve
from flows.automations import LOST, RESTART, automations_of, install
from flows.config import SelfTrainingConfig
from flows.data_config import ShardsData
from flows.evaluation import evaluate_model
from flows.labeling import label_corpus
from flows.loading import ConfigError
from flows.opening import OPERATING_SECTIONS
from flows.operating_config import RestartConfig
from flows.prefect_checks import version_of_server
from flows.restarting import restart_run
from flows.schedules import in_words, one_at_a_time, prefect_schedule
from flows.selection import select_pseudo_labels
from flows.self_training import self_training
from flows.training import train_model
from storage.patterns import below_root
from storage.store import open_store
from tasks.policies import GPU_LIMIT

DEPLOY_SCHEMA = 1
PROCESS = "process"


class NoServer(ValueError):
    """There is no Prefect server to deploy to."""


class UnknownWorkPool(ValueError):
    """There is no work pool of this name, and it cannot be made without more being known."""


@dataclass(frozen=True)
class Pools:
    """Where runs are carried out.

    Attributes:
        name: of the work pool of whole runs, labelling, training and evaluation.
        cpu: of the work pool of what needs no accelerator: selection, and starting runs again.
        type: what both are expected to be; only a `process` pool is made where there is none.
        gpus: of all machines together, for the concurrency limit that labellings take turns by;
            None: it stays as it is.
    """

    name: str
    cpu: str
    type: str = PROCESS
    gpus: int | None = None


@dataclass(frozen=True)
class Deployed:
    """What a config was deployed as.

    Attributes:
        api_url: of the Prefect server.
        deployments: `name` (flow/deployment), `id`, `work_pool`, `entrypoint`, `schedule` in words.
        work_pools: `name`, `type`, `created`.
        automations: `name`, `id`.
        limits: concurrency limits, `name` and `limit`.
    """

    api_url: str
    deployments: tuple[dict[str, Any], ...]
    work_pools: tuple[dict[str, Any], ...]
    automations: tuple[dict[str, Any], ...]
    limits: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the documented form, schema 1."""
        return {
            "schema": DEPLOY_SCHEMA,
            "api_url": self.api_url,
            "deployments": list(self.deployments),
            "work_pools": list(self.work_pools),
            "automations": list(self.automations),
            "limits": list(self.limits),
        }


def deploy(config: SelfTrainingConfig, pools: Pools, *, with_automations: bool = True) -> Deployed:
    """Create the deployments of a config, or bring those that are there up to date.

    All bear the config's name. A schedule starts runs of the whole loop; the stages alone are
    started by hand, with the config's settings as defaults. Flows are named by their modules, so
    that workers import what is installed where they run.

    Args:
        config: which.
        pools: where to.
        with_automations: have the server watch the runs, start crashed ones again, alert people.
    Raises: NoServer; ServerOutOfReach; UnknownWorkPool, naming the command that makes it;
        UnknownBlock for alerts through a block that is not there; ConfigError for a schedule that
        cannot be read, and for data that a worker would look for in its temporary folder.
    """
    api_url = PREFECT_API_URL.value()
    if not api_url:
        raise NoServer(
            "no Prefect server to deploy to: start one with `prefect server start`, and set"
            " PREFECT_API_URL, for example to http://127.0.0.1:4200/api"
        )
    config = _for_workers(config)
    wanted = deployments_of(config, pools)
    version_of_server(api_url)
    with get_client(sync_client=True) as client:
        # What may be refused comes before what is made.
        action = action_of(client, config.alert.notify) if with_automations else None
        made = [_ensure_pool(client, name, pools.type) for name in _distinct(wanted)]
    deployed: list[dict[str, Any]] = []
    for one in wanted:
        deployment_id = one.apply()
        is_run = one.flow_name == self_training.name
        deployed.append(
            {
                "name": one.full_name,
                "id": str(deployment_id),
                "work_pool": one.work_pool_name,
                "entrypoint": one.entrypoint,
                "schedule": in_words(config.schedule) if is_run else "none",
            }
        )
    run_id = UUID(deployed[0]["id"])
    automations = [] if action is None else _automations(config, action, deployed, made)
    with get_client(sync_client=True) as client:
        installed = install(client, config.name, [LOST, RESTART, *ALERTS, STALLED], automations)
        limits: list[dict[str, Any]] = []
        if pools.gpus is not None:
            client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, pools.gpus)
            limits.append({"name": GPU_LIMIT, "limit": pools.gpus})
        _forget_old_schedules(client, run_id)
    return Deployed(api_url, tuple(deployed), tuple(made), tuple(installed), tuple(limits))


def _automations(
    config: SelfTrainingConfig,
    action: ActionTypes,
    deployed: Sequence[dict[str, Any]],
    pools: Sequence[dict[str, Any]],
) -> list[AutomationCore]:
    ids = {one["name"].partition("/")[0]: UUID(one["id"]) for one in deployed}
    run, restarter = ids[self_training.name], ids[restart_run.name]
    recovery = automations_of(
        config.name,
        config.restart,
        deployments=list(ids.values()),
        run=run,
        restarter=restarter,
        starts_at_once=all(pool["type"] == PROCESS for pool in pools),
    )
    return [*recovery, *alerts_of(config.name, config.alert, action, [run, restarter])]


def run_parameters(config: SelfTrainingConfig) -> dict[str, Any]:
    """Return the parameters of a deployed run: the whole config, defaults filled in.

    What is of the deployment and not of a run is left out: a form that shows it would promise that
    changing it has an effect.
    """
    dumped = config.model_dump(mode="json", by_alias=True)
    return {"config": {key: dumped[key] for key in dumped if key not in OPERATING_SECTIONS}}


def deployments_of(config: SelfTrainingConfig, pools: Pools) -> list[RunnerDeployment]:
    """Return the deployments of a config, not yet sent to a server."""
    dumped = config.model_dump(mode="json", by_alias=True)
    settings = {key: dumped[key] for key in ("store", "device", "max_bad_samples")}
    if config.store is None:
        del settings["store"]  # asked for by the form, since a stage has no other way to know
    trains = {key: value for key, value in settings.items() if key != "max_bad_samples"}
    labels = {**settings, "config": dumped["labeling"], "engine": dumped["engine"]}
    selects = {name: dumped[name] for name in ("seed", "engine")} | {"config": dumped["selection"]}
    if config.store is not None:
        selects["store"] = config.store
    schedule = prefect_schedule(config.schedule)
    stages: list[tuple[Flow[..., Any], str, Mapping[str, Any]]] = [
        (label_corpus, pools.name, labels),
        (select_pseudo_labels, pools.cpu, selects),
        (train_model, pools.name, trains),
        (evaluate_model, pools.name, settings),
        (restart_run, pools.cpu, {"restart": dumped["restart"]}),
    ]
    if config.approve != "none":
        # It goes on with the run, so it is where runs are.
        form = {"run": config.name, "store": config.store}
        stages.append((approve, pools.name, {"form": form}))
    return [
        _deployment(
            self_training,
            config,
            pools.name,
            run_parameters(config),
            schedules=[] if schedule is None else [schedule],
            concurrency_limit=one_at_a_time(config.schedule),
        ),
        *(_deployment(flow, config, pool, given, schedules=[]) for flow, pool, given in stages),
    ]


def _deployment(
    flow: Flow[..., Any],
    config: SelfTrainingConfig,
    pool: str,
    parameters: Mapping[str, Any],
    **options: Any,
) -> RunnerDeployment:
    return RunnerDeployment.from_flow(
        flow,
        name=config.name,
        work_pool_name=pool,
        parameters=dict(parameters),
        job_variables={"env": worker_environment(config.restart)},
        tags=["selftrain"],
        entrypoint_type=EntrypointType.MODULE_PATH,
        **options,
    )


def worker_environment(restart: RestartConfig) -> dict[str, str]:
    """Return what a worker puts into the environment of a run."""
    return {
        # A node without a server of its own must not start one unnoticed.
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        # A run outlives a restart of the server: 2 + 4 + ... + 256 s of retries.
        "PREFECT_CLIENT_MAX_RETRIES": "8",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(restart.heartbeat_seconds),
        # After a crash or a cancellation Prefect (3.8.8) imports the flow once more, in a script
        # whose folder, first on the path, has a storage.py: it would be taken for our package.
        "PYTHONSAFEPATH": "1",
    }


def _for_workers(config: SelfTrainingConfig) -> SelfTrainingConfig:
    """Return the config as a worker can use it, whose folder is a temporary one.

    Raises: ConfigError for relative paths of data. That of a store is made absolute, as by a run.
    """
    if config.store is not None:
        config = config.model_copy(update={"store": open_store(config.store).url})
    data = config.data
    if isinstance(data, ShardsData):
        for key in ("labeled", "dev", "test", "unlabeled", "exclude"):
            value = getattr(data, key)
            located = None if value is None else below_root(value, data.root)
            if located is not None and not (located.startswith("/") or "://" in located):
                raise ConfigError(
                    f"data.{key} = {located!r}: a worker gives each run a temporary folder, where"
                    " this path leads nowhere: give a URL or an absolute path, or data.root one"
                )
    return config


def _forget_old_schedules(client: SyncPrefectClient, deployment_id: UUID) -> None:
    """Delete the runs to come that a schedule has planned which is no more.

    Prefect (3.8.8) deletes them when the deployment is changed, but a round of its scheduler that
    was under way puts those of the old schedule back.
    """
    schedules = {one.id for one in client.read_deployment(deployment_id).schedules}
    planned = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        )
    )
    now = datetime.now(UTC)
    for one in planned:
        is_to_come = one.expected_start_time is not None and one.expected_start_time > now
        is_stale = one.created_by is not None and one.created_by.id not in schedules
        if one.auto_scheduled and is_stale and is_to_come:
            client.delete_flow_run(one.id)


def _distinct(deployments: Sequence[RunnerDeployment]) -> list[str]:
    return list(dict.fromkeys(str(one.work_pool_name) for one in deployments))


def _ensure_pool(client: SyncPrefectClient, name: str, type: str) -> dict[str, Any]:
    created = False
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        if type != PROCESS:
            raise UnknownWorkPool(
                f"there is no work pool {name!r}, and one of type {type} needs a job template that"
                f" knows your cluster: prefect work-pool create {name} --type {type}"
                " --base-job-template FILE"
            ) from None
        try:
            pool = client.create_work_pool(WorkPoolCreate(name=name, type=PROCESS))
            created = True
        except ObjectAlreadyExists:  # by somebody else, just now
            pool = client.read_work_pool(name)
    return {"name": name, "type": pool.type, "created": created}
