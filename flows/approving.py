"""Answer what a run asks, and go on with it: a flow, whose form is what the Prefect UI shows."""

import os
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.approvals import Answer, Approval, answer
from flows.going_on import go_on_by_deployment
from flows.opening import reopen_run
from flows.self_training import self_training
from storage.store import open_store


class ApprovalForm(BaseModel):
    """The answer to what a run asks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(description="Name of the run that waits for approval.")
    answer: Answer = Field(
        description="accept: the run does what it asked for. reject: the student is not promoted,"
        " or no further round begins, and the loop ends."
    )
    by: str = Field(min_length=1, max_length=200, description="Who answers; kept in the store.")
    comment: str = Field(default="", max_length=2000, description="Why; kept in the store.")
    threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Confidence that later rounds select by; null: as before.",
    )
    round_index: int | None = Field(
        default=None,
        ge=0,
        description="The round that the answer is meant for; another one is refused. Null: any.",
    )
    resume: bool = Field(
        default=True,
        description="Go on with the run: by a new flow run of the deployment that it was started"
        " from; in this flow if it was not.",
    )
    store: str | None = Field(
        default=None, description="Folder or URL of the store; null: the worker's SELFTRAIN_STORE."
    )


def _flow_run_name() -> str:
    form: ApprovalForm = flow_run.parameters["form"]
    return f"{form.answer} {form.run}"


@flow(name="approve", flow_run_name=_flow_run_name, persist_result=False)
def approve(form: ApprovalForm) -> Any:
    """Record the answer to what a run asks, and have the run go on from where it was.

    The answer is in the store before anything else happens: if this flow is killed, run it again
    with the same answer, or `selftrain resume RUN`.

    Returns: the run's status, as `selftrain status --json` prints it, if it went on in this flow;
        else the answer, with the flow run that goes on, if any.
    Raises: as `answer` and `go_on_by_deployment`.
    """
    url = form.store or os.environ.get("SELFTRAIN_STORE")
    if not url:
        raise ValueError("no store: set `store` in the form, or SELFTRAIN_STORE of the worker")
    store = open_store(url, check_writable=True)
    approval, _ = answer(
        store,
        form.run,
        form.answer,
        by=form.by,
        threshold=form.threshold,
        comment=form.comment,
        round_index=form.round_index,
    )
    get_run_logger().info("%s: %s", form.run, approval.in_words())
    if not form.resume:
        message = f"{_recorded(form.run, approval)}; selftrain resume {form.run} goes on"
        return Completed(message=message, data=approval.to_json())
    goes_on = go_on_by_deployment(store, form.run)
    if goes_on is not None:
        message = f"{_recorded(form.run, approval)}; it {goes_on.in_words()}"
        return Completed(name="GoesOn", message=message, data=approval.to_json() | goes_on.ids())
    config = reopen_run(store, form.run).config.model_copy(update={"store": store.url})
    state = self_training(config, return_state=True)
    status = state.result()
    message = f"{_recorded(form.run, approval)}; {state.message}"
    return Completed(name=state.name, message=message, data=status)


def _recorded(run: str, approval: Approval) -> str:
    return f"round {approval.round_index} of {run} {approval.in_words()}"
