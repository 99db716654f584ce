"""The flow runs of a deployed run on the Prefect server: which are alive, and one that goes on."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Scheduled

IS_ALIVE = FlowRunFilterState(
    type=FlowRunFilterStateType(
        any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
    )
)


def alive_flow_runs(
    client: SyncPrefectClient, name: str, *, except_for: Collection[UUID] = ()
) -> list[FlowRun]:
    """Return the flow runs of a run that are going on or will, without those that are named."""
    wanted = FlowRunFilter(name=FlowRunFilterName(any_=[name]), state=IS_ALIVE)
    return [
        one for one in client.read_flow_runs(flow_run_filter=wanted) if one.id not in except_for
    ]


def schedule_again(
    client: SyncPrefectClient,
    earlier: FlowRun,
    name: str,
    *,
    delay_seconds: float = 0.0,
    key: str | None = None,
) -> FlowRun:
    """Create a flow run of a flow run's deployment that goes on with the same run.

    It has the parameters of the earlier one, and the limits, tags and work pool of the deployment.

    Args:
        client: of the server that has both.
        earlier: a flow run of the run, of a deployment.
        name: that the run has in the store. A scheduled run has it from the time it was due, which
            that of the new flow run is not.
        delay_seconds: before it may start.
        key: that makes it once; the flow run that was made with it before is returned.
    """
    assert earlier.deployment_id is not None, "callers have seen to it"
    config = {**earlier.parameters["config"], "name": name}
    return client.create_flow_run_from_deployment(
        earlier.deployment_id,
        parameters={**earlier.parameters, "config": config},
        state=Scheduled(scheduled_time=datetime.now(UTC) + timedelta(seconds=delay_seconds)),
        name=name,
        idempotency_key=key,
    )
