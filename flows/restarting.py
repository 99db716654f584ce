"""Start a deployed run again whose process or machine was lost; an automation calls this flow."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Crashed

from flows.deployed_runs import IS_ALIVE, alive_flow_runs, schedule_again
from flows.operating_config import RestartConfig
from flows.restart_policy import GiveUp, decide, progress_marks
from flows.run_events import GIVEN_UP, emit_run_event, related_to
from flows.self_training import resolved_name
from storage.runs import append_event, read_events
from storage.store import open_store

# A restart whose own machine is lost is started again likewise; so often, then a person must look.
MAX_CHAIN = 5


# Retried, because it must outlive the trouble that it is there for: a store or server out of reach.
@flow(name="restart", persist_result=False, retries=5, retry_delay_seconds=60)
def restart_run(flow_run_id: UUID, restart: RestartConfig | None = None) -> State:
    """Start the selftrain run of a crashed flow run again, as a new flow run that resumes it.

    Nothing waits: the new flow run is scheduled for after the delay. A run that crashes again and
    again without progress in its store is given up, with the event `selftrain.run.given-up`.

    Args:
        flow_run_id: the flow run that crashed, of a deployed run; or a flow run of this flow.
        restart: how often, and how far apart.
    Returns: `Restarted`, `GivenUp`, or `Skipped` where there is nothing to do.
    """
    policy = restart or RestartConfig()
    with get_client(sync_client=True) as client:
        crashed, num_links = _crashed_run(client, flow_run_id)
        if crashed.state is None or not crashed.state.is_crashed():
            found = None if crashed.state is None else crashed.state.name
            return Completed(name="Skipped", message=f"flow run {crashed.name} is {found}")
        name = _run_name(crashed)
        store = open_store(_store_url(crashed))
        events = read_events(store, name)
        # A flow run that is retried in the UI keeps its id, and may crash once more.
        occasion = f"{crashed.id}-{crashed.run_count}"
        if any(event.get("occasion") == occasion for event in events):
            return Completed(name="Skipped", message=f"the crash of {name} is seen to already")
        if _is_done(events):
            return Completed(name="Skipped", message=f"run {name} is done")
        _close_subflows(client, crashed)
        key = f"restart-{occasion}"
        # One with this key is what an invocation made that was lost before it could record it.
        alive = alive_flow_runs(client, name)
        if others := [one for one in alive if one.idempotency_key != key]:
            ids = ", ".join(str(one.id) for one in others)
            return Completed(name="Skipped", message=f"run {name} goes on already: {ids}")
        marks = progress_marks(store, name)
        decision = decide(events, marks, policy)
        if isinstance(decision, GiveUp) or num_links > MAX_CHAIN:
            restarts = decision.restarts if isinstance(decision, GiveUp) else num_links
            # Told before it is recorded: an alert that comes twice is better than none.
            emit_run_event(
                GIVEN_UP,
                run=name,
                store=store.url,
                payload={"restarts": restarts, "max_restarts": policy.max_restarts},
                related=related_to(str(crashed.id), crashed.name, str(crashed.deployment_id)),
            )
            append_event(store, name, "run_given_up", occasion=occasion, restarts=restarts)
            return Completed(
                name="GivenUp",
                message=f"run {name} was started again {restarts} times without progress in the"
                " store: look at the logs of its flow runs; once the cause is gone, retry the last"
                " of them, or `selftrain resume`",
            )
        new = schedule_again(client, crashed, name, delay_seconds=decision.delay_seconds, key=key)
        # After it, so that a loss in between leaves a run and not only the record of one.
        append_event(
            store,
            name,
            "run_restarted",
            occasion=occasion,
            number=decision.number,
            delay_seconds=decision.delay_seconds,
            flow_run=str(new.id),
            progress=marks,
        )
    return Completed(
        name="Restarted",
        message=f"run {name} starts again at {new.expected_start_time:%H:%M:%S} UTC, flow run"
        f" {new.id}, restart {decision.number} of {policy.max_restarts} without progress",
    )


def _crashed_run(client: SyncPrefectClient, flow_run_id: UUID) -> tuple[FlowRun, int]:
    """Return the crashed flow run of a deployed run, through restarts that crashed themselves.

    Raises: ValueError for a flow run of anything else.
    """
    num_links = 0
    flow_run = client.read_flow_run(flow_run_id)
    while "flow_run_id" in flow_run.parameters:
        flow_run = client.read_flow_run(UUID(str(flow_run.parameters["flow_run_id"])))
        num_links += 1
    if "config" not in flow_run.parameters or flow_run.deployment_id is None:
        raise ValueError(
            f"flow run {flow_run.id} ({flow_run.name}) is not one of a deployed run: only those of"
            " self-training/... can be started again"
        )
    return flow_run, num_links


def _is_done(events: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the last attempt at the run came to its end before its process did."""
    attempts = [event["type"] for event in events if event["type"] in ("run_started", "run_done")]
    return attempts[-1:] == ["run_done"]


def _run_name(crashed: FlowRun) -> str:
    start = crashed.expected_start_time
    assert start is not None, "the server sets it with the first state"
    return resolved_name(crashed.parameters["config"]["name"], crashed.tags, start)


def _store_url(crashed: FlowRun) -> str:
    url = crashed.parameters["config"].get("store") or os.environ.get("SELFTRAIN_STORE")
    if not url:
        raise ValueError("no store: deploy with --store, or set SELFTRAIN_STORE on this worker")
    return url


def _close_subflows(client: SyncPrefectClient, crashed: FlowRun) -> None:
    """Have what ran within the flow run crash with it; nobody else would ever say so."""
    parents = FlowRunFilterParentFlowRunId(any_=[crashed.id])
    running = FlowRunFilter(parent_flow_run_id=parents, state=IS_ALIVE)
    for one in client.read_flow_runs(flow_run_filter=running):
        message = f"flow run {crashed.name}, of which it is a part, has crashed"
        client.set_flow_run_state(one.id, Crashed(message=message), force=True)
