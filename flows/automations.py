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

FLOW_RUN = "prefect.flow-run"

LOST, RESTART = "lost", "restart"


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


def automation_name(name: str, kind: str) -> str:
    """Return how the automation of this kind of one config is called."""
    return f"selftrain {name}: {kind}"


def install(
    client: SyncPrefectClient, name: str, kinds: Sequence[str], wanted: Sequence[AutomationCore]
) -> list[dict[str, str]]:
    """Create the automations of a config, or bring those that are there up to date.

    Args:
        client: of the server.
        name: of the config.
        kinds: of all automations that a config may have.
        wanted: those that this one is to have; others of its are deleted.
    Returns: a list of `name`, `id`.
    """
    by_name = {one.name: one for one in wanted}
    names = [automation_name(name, kind) for kind in kinds]
    assert by_name.keys() <= set(names), "else it would never be deleted"
    installed: list[dict[str, str]] = []
    for one in names:
        there = [automation.id for automation in client.read_automations_by_name(one)]
        # Two of one name come of two deployments at the same time.
        for superfluous in there[1:] if one in by_name else there:
            client.delete_automation(superfluous)
        if one not in by_name:
            continue
        if there:
            automation_id = there[0]
            client.update_automation(automation_id, by_name[one])
        else:
            automation_id = client.create_automation(by_name[one])
        installed.append({"name": one, "id": str(automation_id)})
    return installed


def silence_of(
    resource: str, deployments: Sequence[UUID], *, after: set[str], seconds: float
) -> EventTrigger:
    """Return what fires once for each resource of which nothing is heard any more.

    Args:
        resource: what its id and the names of all its events begin with.
        deployments: whose runs it belongs to.
        after: events that promise another one.
        seconds: within which that must come.
    """
    return EventTrigger(
        after=after,
        expect={f"{resource}.*"},
        match=specification({"prefect.resource.id": f"{resource}.*"}),
        match_related=of_deployments(deployments),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _crash_the_silent(
    name: str, restart: RestartConfig, deployments: Sequence[UUID], *, starts_at_once: bool
) -> AutomationCore:
    """Have a flow run that gives no sign of life count as crashed.

    Every event of the flow run is a sign of life: a list of states would miss those that have names
    of their own, such as `Reused`. Only a sign that promises another one begins the wait, so a flow
    run that has ended or waits for somebody is left alone.
    """
    begins = {f"{FLOW_RUN}.heartbeat", f"{FLOW_RUN}.Running"}
    if starts_at_once:
        begins.add(f"{FLOW_RUN}.Pending")
    seconds = restart.lost_after_seconds
    crash = ChangeFlowRunState(
        name=None,
        state=StateType.CRASHED,
        message=f"no sign of life for {seconds:g} s: its process or machine is lost",
        force=False,  # the server refuses it where the flow run has ended meanwhile
    )
    return AutomationCore(
        name=automation_name(name, LOST),
        description=f"A flow run of {name} that gives no sign of life for {seconds:g} s has lost"
        " its process or its machine.",
        trigger=silence_of(FLOW_RUN, deployments, after=begins, seconds=seconds),
        actions=[crash],
    )


def _restart_the_crashed(name: str, deployments: Sequence[UUID], restarter: UUID) -> AutomationCore:
    see_to_it = RunDeployment(
        source="selected",
        deployment_id=restarter,
        parameters={"flow_run_id": {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}},
        job_variables=None,
    )
    return AutomationCore(
        name=automation_name(name, RESTART),
        description=f"A crashed flow run of {name} is looked at, and started again.",
        trigger=EventTrigger(
            expect={f"{FLOW_RUN}.Crashed"},
            match=specification({"prefect.resource.id": f"{FLOW_RUN}.*"}),
            match_related=of_deployments(deployments),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[see_to_it],
    )


def of_deployments(deployments: Sequence[UUID]) -> ResourceSpecification:
    """Return what matches events of flow runs of these deployments."""
    return specification(
        {
            "prefect.resource.role": "deployment",
            "prefect.resource.id": [f"prefect.deployment.{one}" for one in deployments],
        }
    )


def specification(labels: dict[str, Any]) -> ResourceSpecification:
    """Return what matches resources with these labels."""
    return ResourceSpecification.model_validate(labels)
