"""Run a flow from the command line: server, live progress, and an honest exit code."""

import os
import signal
from collections.abc import Callable
from typing import Any

# Before Prefect is imported: its console log would break up the progress display. The log of a run
# is in the Prefect UI; PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL=INFO shows it here as well.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# A run outlives a restart of the server: 2 + 4 + ... + 256 s of retries.
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "8")

from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal

from flows.approvals import WaitingForApproval
from flows.cli_options import print_json
from flows.config import SelfTrainingConfig
from flows.run_status import read_status
from flows.self_training import self_training
from flows.server import PrefectServer, prefect_server, wait_until_recorded
from flows.terminal import err, print_status, showing_progress
from storage.runs import read_events
from storage.store import open_store
from tasks.guarding import GuardStopped
from tasks.labeling import LabelingStopped
from tasks.training import TrainingStopped


class StoppedOnRequest(Exception):
    """Ctrl-C or SIGTERM; the run can be resumed."""


def run_to_end(config: SelfTrainingConfig) -> str:
    """Run the self-training flow in this process and return where the Prefect UI shows it.

    It has come to its end then, or to a question that a person must answer.

    Raises: StoppedOnRequest; whatever made the run fail.
    """
    assert config.store is not None
    _, hint = run_flow(
        lambda: self_training(config, return_state=True),
        go_on=resume_command(config),
        num_tasks=lambda: _num_stages(config),
    )
    state = read_status(open_store(config.store), config.name).state
    assert state in ("done", "waiting_for_approval"), state
    return hint


def run_and_show(config: SelfTrainingConfig, as_json: bool) -> None:
    """Run the flow and print the run's status, as a table or as JSON.

    Raises: as `run_to_end`; WaitingForApproval, after all is printed, if the run asks something.
    """
    hint = run_to_end(config)
    assert config.store is not None
    status = read_status(open_store(config.store), config.name)
    if as_json:
        print_json(status.to_json())
    else:
        print_status(status)
        err.print(f"Prefect UI of this run: {hint}", highlight=False, soft_wrap=True)
    if status.waiting_for is not None:
        raise WaitingForApproval(status.question_in_words())


def run_flow(
    call: Callable[[], State], *, go_on: str, num_tasks: Callable[[], int] = lambda: 0
) -> tuple[Any, str]:
    """Call a flow in this process, on a server, with progress on stderr.

    Args:
        call: the flow, with return_state=True.
        go_on: the command that goes on with it after a stop.
        num_tasks: after the flow has ended, how many task runs of it the server must have seen.
    Returns: its result, and where the Prefect UI shows the run.
    Raises: StoppedOnRequest; whatever made the flow fail.
    """
    signal.signal(signal.SIGTERM, _raise_stopped)
    with prefect_server() as server:
        err.print(f"Prefect UI while it runs: {server.ui_url}", highlight=False, soft_wrap=True)
        try:
            with showing_progress():
                state = call()
        except (KeyboardInterrupt, TerminationSignal, StoppedOnRequest):
            raise StoppedOnRequest(f"stopped; go on with: {go_on}") from None
        flow_run_id = str(state.state_details.flow_run_id)
        if server.is_ours and not wait_until_recorded(flow_run_id, at_least=num_tasks()):
            err.print("[yellow]the Prefect server did not record every state of this run")
        return _result_of(state, go_on), ui_hint(server, flow_run_id)


def resume_command(config: SelfTrainingConfig) -> str:
    """Return the command that goes on with a run."""
    return f"selftrain resume {config.name} --store {config.store}"


def ui_hint(server: PrefectServer, flow_run_id: str) -> str:
    """Return how to look at a flow run in the Prefect UI."""
    if server.is_ours:
        return f"selftrain ui --run-id {flow_run_id}"
    return f"{server.ui_url}/runs/flow-run/{flow_run_id}"


def _result_of(state: State, go_on: str) -> Any:
    """Return what a flow returned, or raise what made it fail."""
    try:
        return state.result()
    except (TrainingStopped, LabelingStopped, GuardStopped) as error:
        # A worker or a group of shards was stopped by somebody else, such as a batch system.
        raise StoppedOnRequest(f"{error}; go on with: {go_on}") from error


def _num_stages(config: SelfTrainingConfig) -> int:
    """Return how many stages the last attempt at the run has begun; 0 if it did not get there."""
    assert config.store is not None
    types = [event["type"] for event in read_events(open_store(config.store), config.name)]
    started = len(types) - types[::-1].index("run_started") if "run_started" in types else 0
    return types[started:].count("stage_referenced")


def _raise_stopped(signum: int, frame: object) -> None:
    raise StoppedOnRequest("stopped by SIGTERM")
