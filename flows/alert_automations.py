"""What the Prefect server alerts people of: automations on the events of deployed runs."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import ActionTypes, CallWebhook, DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from flows.automations import FLOW_RUN, automation_name, of_deployments, silence_of
from flows.operating_config import AlertConfig
from flows.run_events import COLLAPSE, GIVEN_UP, PROGRESS, RUN, STARTED, WORSE

_SUBJECT = "selftrain: {{ event.event }}"
_BODY = "{{ event.resource | tojson }}\n{{ event.payload | tojson }}"
_WEBHOOK_BODY = (
    '{"event": {{ event.event | tojson }}, "occurred": {{ event.occurred | string | tojson }},'
    ' "resource": {{ event.resource | tojson }}, "payload": {{ event.payload | tojson }}}'
)

ALERTS: dict[str, tuple[str, set[str]]] = {
    "failed": (
        "A run has failed or crashed.",
        {f"{FLOW_RUN}.{state}" for state in ("Failed", "Crashed", "TimedOut")},
    ),
    "given up": ("A run that crashes is not started again any more.", {GIVEN_UP}),
    "worse": ("A student is worse than its teacher, beyond the interval.", {WORSE}),
    "collapse": ("From one round to the next there are signs of a collapse.", {COLLAPSE}),
}
"""What is alerted of at once, by the last part of an automation's name."""

STALLED = "stalled"


class UnknownBlock(ValueError):
    """There is no such block on the Prefect server."""


def alerts_of(
    name: str, alert: AlertConfig, action: ActionTypes, deployments: Sequence[UUID]
) -> list[AutomationCore]:
    """Return the automations that alert people of the runs of one config.

    Args:
        name: of the config.
        alert: after which silence a run has stalled.
        action: what an alert does.
        deployments: of whole runs, and of the flow `restart`.
    """
    found = [
        AutomationCore(
            name=automation_name(name, kind),
            description=description,
            trigger=EventTrigger(
                expect=events,
                match_related=of_deployments(deployments),
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
                within=timedelta(0),
            ),
            actions=[action],
        )
        for kind, (description, events) in ALERTS.items()
    ]
    seconds = alert.stalled_after_seconds
    stalled = AutomationCore(
        name=automation_name(name, STALLED),
        description=f"A run has told of no progress for {seconds:g} s.",
        trigger=silence_of(RUN, deployments, after={STARTED, PROGRESS}, seconds=seconds),
        actions=[action],
    )
    return [*found, stalled]


def action_of(client: SyncPrefectClient, notify: str | None) -> ActionTypes:
    """Return what an alert does: a message through a block, or nothing beside being on record.

    Args:
        client: of the server, which has the block.
        notify: `<type>/<name>` of a notification or webhook block; None: nothing.
    Raises: UnknownBlock, with the command that shows which there are.
    """
    if notify is None:
        return DoNothing()
    block_type, _, block_name = notify.partition("/")
    try:
        block = client.read_block_document_by_name(block_name, block_type)
    except ObjectNotFound:
        raise UnknownBlock(
            f"alert.notify = {notify!r}: there is no such block on the Prefect server. Make it in"
            " the UI, under Blocks; `prefect block ls` shows type and name of those that are there"
        ) from None
    assert block.id is not None, "read from the server"
    if block_type == "webhook":
        return CallWebhook(block_document_id=block.id, payload=_WEBHOOK_BODY)
    return SendNotification(block_document_id=block.id, subject=_SUBJECT, body=_BODY)
