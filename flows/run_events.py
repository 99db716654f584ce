"""Events of a run that Prefect's automations can act on; docs/interfaces.md lists them."""

from typing import Any

from prefect.events import emit_event

RUN = "selftrain.run"
STARTED = f"{RUN}.started"
PROGRESS = f"{RUN}.progress"
DONE = f"{RUN}.done"
STOPPED = f"{RUN}.stopped"
FAILED = f"{RUN}.failed"
GIVEN_UP = f"{RUN}.given-up"
WORSE = "selftrain.round.worse"
COLLAPSE = "selftrain.round.collapse"

Related = list[dict[str, str]]


def emit_run_event(
    event: str, *, run: str, store: str, payload: dict[str, Any], related: Related
) -> None:
    """Emit an event about a run; it is sent by a thread, and costs the run nothing if it is lost.

    Args:
        event: its name, `selftrain.run.*` or `selftrain.round.*`.
        run: name of the run; the event's resource is `selftrain.run.<name>`.
        store: URL.
        payload: what happened, JSON.
        related: the flow run that it is about, from `related_to`.
    """
    emit_event(
        event=event,
        resource={"prefect.resource.id": f"{RUN}.{run}", "prefect.resource.name": run},
        related=related,
        payload={"run": run, "store": store, **payload},
    )


def related_to(flow_run_id: str | None, name: str | None, deployment_id: str | None) -> Related:
    """Return how an event names a flow run and its deployment, by which automations choose."""
    related: Related = []
    if flow_run_id is not None:
        one = {
            "prefect.resource.id": f"prefect.flow-run.{flow_run_id}",
            "prefect.resource.role": "flow-run",
        }
        related.append(one | ({} if name is None else {"prefect.resource.name": name}))
    if deployment_id is not None:
        related.append(
            {
                "prefect.resource.id": f"prefect.deployment.{deployment_id}",
                "prefect.resource.role": "deployment",
            }
        )
    return related
