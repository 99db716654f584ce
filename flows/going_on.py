"""How a run that a person has answered goes on: as its deployment would start it, if it has one."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.deployed_runs import alive_flow_runs, schedule_again
from flows.prefect_checks import ServerOutOfReach, version_of_server
from flows.server import PrefectServer
from storage.runs import read_events
from storage.store import Store


class DeploymentOutOfReach(ValueError):
    """The run was started from a deployment that cannot be asked to go on with it."""


@dataclass(frozen=True)
class GoesOn:
    """The flow run that goes on with a run.

    Attributes:
        flow_run: its id.
        deployment: id of the deployment that it is of.
        url: where the Prefect UI shows it.
        is_new: whether it was made for this answer; else it was there already.
    """

    flow_run: str
    deployment: str
    url: str
    is_new: bool

    def ids(self) -> dict[str, str]:
        """Return `flow_run` and `deployment`."""
        return {"flow_run": self.flow_run, "deployment": self.deployment}

    def in_words(self) -> str:
        """Return that it goes on, and where, in one line."""
        verb = "goes on in a new flow run" if self.is_new else "goes on already, in flow run"
        return f"{verb} {self.flow_run} of deployment {self.deployment}: {self.url}"


def asking_flow_run() -> dict[str, str]:
    """Return what the event of a question says of the flow run that asks, if a deployment made it.

    The flow run itself counts: the parent of a subflow may be of a deployment of something else.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return {}
    return {
        "flow_run": str(context.flow_run.id),
        "deployment": str(context.flow_run.deployment_id),
    }


def go_on_by_deployment(store: Store, run: str) -> GoesOn | None:
    """Have the deployment of a run that was answered go on with it.

    The new flow run is carried out where the deployment's are, within its limits. One that goes on
    with the run already is left to it.

    Returns: None where the question was asked by a run that no deployment made.
    Raises: DeploymentOutOfReach, naming what to do; the answer is recorded by then.
    """
    questions = [event for event in read_events(store, run) if event["type"] == "run_waiting"]
    if not questions or "flow_run" not in questions[-1]:  # as are those of earlier versions
        return None
    last = questions[-1]
    # Its process may not have ended yet, but it does not read the answer any more.
    asked = {UUID(one["flow_run"]) for one in questions if "flow_run" in one}
    api_url = PREFECT_API_URL.value()
    if not api_url:
        raise _out_of_reach(store, run, last, "no Prefect server is set: set PREFECT_API_URL")
    try:
        version_of_server(api_url)
    except ServerOutOfReach as error:
        raise _out_of_reach(store, run, last, f"{error.found}. {error.remedy}") from error
    with get_client(sync_client=True) as client:
        if others := alive_flow_runs(client, run, except_for=asked):
            return _goes_on(others[0], last, api_url, is_new=False)
        try:
            earlier = client.read_flow_run(UUID(last["flow_run"]))
            client.read_deployment(UUID(last["deployment"]))
        except ObjectNotFound as error:
            raise _out_of_reach(store, run, last, f"{api_url} does not have both") from error
        new = schedule_again(client, earlier, run)
    return _goes_on(new, last, api_url, is_new=True)


def _goes_on(flow_run: FlowRun, asked: dict[str, Any], api_url: str, *, is_new: bool) -> GoesOn:
    ui_url = PrefectServer(api_url, is_ours=False).ui_url
    return GoesOn(
        flow_run=str(flow_run.id),
        deployment=str(flow_run.deployment_id or asked["deployment"]),
        url=f"{ui_url}/runs/flow-run/{flow_run.id}",
        is_new=is_new,
    )


def _out_of_reach(
    store: Store, run: str, asked: dict[str, Any], reason: str
) -> DeploymentOutOfReach:
    return DeploymentOutOfReach(
        f"the answer is recorded, but run {run!r} was not gone on with: flow run"
        f" {asked['flow_run']} of deployment {asked['deployment']} asked, and {reason}. Give the"
        " same answer again where its server is reached, or go on here and now with: selftrain"
        f" resume {run} --store {store.url}"
    )
