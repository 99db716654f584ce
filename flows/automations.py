"""What the Prefect server does by itself when a deployed run crashes or falls silent."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.operating_config import RestartConfig

_FLOW_RUN = "prefect.flow-run"


def automations_of(
    name: str,
    restart: RestartConfig,
    *,
    deployments: Sequence[UUID],
    run: UUID,
    restarter: UUID,
    starts_at_once: bool,
) -> list[AutomationCore]:
    """Return the automations that see to crashed and lost runs of one config.

    Args:
        name: of the config.
        restart: after which silence a run is lost, and whether it is started again.
        deployments: whose flow runs are watched.
        run: the deployment of whole runs, which are started again.
        restarter: the deployment of the flow `restart`.
        starts_at_once: whether what a worker has taken up must begin within the same time, as a
            process does; a pod may wait for its node for hours.
    """
    found = [_crash_the_silent(name, restart, deployments, starts_at_once=starts_at_once)]
    if restart.max_restarts > 0:
        found.append(_restart_the_crashed(name, [run, restarter], restarter))
    return found


def names_of(name: str) -> list[str]:
    """Return the names of all automations that a config may have."""
    return [f"selftrain {name}: {what}" for what in ("lost", "restart")]


def install(client: SyncPrefectClient, name: str, wanted: Sequence[AutomationCore]) -> list[Any]:
    """Create the automations of a config, or bring those that are there up to date.

    Args:
        client: of the server.
        name: of the config.
        wanted: all that it is to have; others of its are deleted.
    Returns: a list of `name`, `id`.
    """
    by_name = {one.name: one for one in wanted}
    assert by_name.keys() <= set(names_of(name)), "else it would never be deleted"
    installed: list[dict[str, str]] = []
    for one in names_of(name):
        first, *others = [*client.read_automations_by_name(one), None]
        for other in (first, *others):
            if other is not None and (other is not first or one not in by_name):
                client.delete_automation(other.id)
        if one not in by_name:
            continue
        if first is None:
            automation_id = client.create_automation(by_name[one])
        else:
            automation_id = first.id
            client.update_automation(automation_id, by_name[one])
        installed.append({"name": one, "id": str(automation_id)})
    return installed


def _crash_the_silent(
    name: str, restart: RestartConfig, deployments: Sequence[UUID], *, starts_at_once: bool
) -> AutomationCore:
    """Have a flow run that gives no sign of life count as crashed.

    Every event of the flow run is a sign of life: a list of states would miss those that have names
    of their own, such as `Reused`. Only a sign that promises another one begins the wait, so a flow
    run that has ended or waits for somebody is left alone.
    """
    begins = {f"{_FLOW_RUN}.heartbeat", f"{_FLOW_RUN}.Running"}
    if starts_at_once:
        begins.add(f"{_FLOW_RUN}.Pending")
    seconds = restart.lost_after_seconds
    return AutomationCore(
        name=f"selftrain {name}: lost",
        description=f"A flow run of {name} that gives no sign of life for {seconds:g} s has lost"
        " its process or its machine.",
        trigger=EventTrigger(
            after=begins,
            expect={f"{_FLOW_RUN}.*"},
            match=_specification({"prefect.resource.id": f"{_FLOW_RUN}.*"}),
            match_related=_of_deployments(deployments),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no sign of life for {seconds:g} s: its process or machine is lost",
            )
        ],
    )


def _restart_the_crashed(name: str, deployments: Sequence[UUID], restarter: UUID) -> AutomationCore:
    return AutomationCore(
        name=f"selftrain {name}: restart",
        description=f"A crashed flow run of {name} is looked at, and started again.",
        trigger=EventTrigger(
            expect={f"{_FLOW_RUN}.Crashed"},
            match=_specification({"prefect.resource.id": f"{_FLOW_RUN}.*"}),
            match_related=_of_deployments(deployments),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=restarter,
                parameters={
                    "flow_run_id": {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}
                },
            )
        ],
    )


def _of_deployments(deployments: Sequence[UUID]) -> ResourceSpecification:
    return _specification(
        {
            "prefect.resource.role": "deployment",
            "prefect.resource.id": [f"prefect.deployment.{one}" for one in deployments],
        }
    )


def _specification(labels: dict[str, Any]) -> ResourceSpecification:
    return ResourceSpecification.model_validate(labels)
