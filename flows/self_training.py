"""Noisy Student: reading `self_training` is reading the method (Xie et al. 2020, algorithm 1)."""

import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.approvals import WaitingForApproval
from flows.attempts import driving
from flows.config import SelfTrainingConfig
from flows.driving import RunDriver
from flows.latest_teachers import scheduled_name
from flows.opening import open_run
from flows.remedies import what_to_do
from flows.run_status import RunStatus, read_status
from flows.stopping import has_stalled
from storage.store import open_store


def run_name(config: SelfTrainingConfig) -> str:
    """Return the name in the store of the run that the present flow run carries out."""
    return resolved_name(config.name, flow_run.tags or [], flow_run.scheduled_start_time)


def resolved_name(name: str, tags: Sequence[str], start: datetime) -> str:
    """Return the config's name, with the UTC start behind it where a schedule started the run."""
    return scheduled_name(name, start) if "auto-scheduled" in tags else name


def _flow_run_name() -> str:
    return run_name(flow_run.parameters["config"])


@flow(name="self-training", flow_run_name=_flow_run_name, persist_result=False)
def self_training(config: SelfTrainingConfig) -> Any:
    """Train a teacher, then students on its pseudo-labels, each the next one's teacher.

    The store decides what is still to do: a run of the same name and config goes on where it was.

    Args:
        config: the whole run; its inputs are pinned when it starts for the first time.
    Returns: the run's status, as `selftrain status --json` prints it; Prefect unpacks the state.
    """
    url = config.store or os.environ.get("SELFTRAIN_STORE")
    if not url:
        raise ValueError("no store: set `store` in the config, --store, or SELFTRAIN_STORE")
    store = open_store(url, check_writable=True)
    config = config.model_copy(update={"name": run_name(config), "store": store.url})
    opened = None
    try:
        opened = open_run(store, config)
        with driving(opened) as run:
            status = _noisy_student(run, config)
    except WaitingForApproval as waiting:
        data = read_status(store, config.name).to_json()
        return Completed(name="WaitingForApproval", message=str(waiting), data=data)
    except Exception as error:
        get_run_logger().exception("the run has failed")
        return Failed(message=what_to_do(error, opened), data=error)
    return Completed(message=status.ending_in_words(), data=status.to_json())


def _noisy_student(run: RunDriver, config: SelfTrainingConfig) -> RunStatus:
    teacher = run.train_teacher()
    dev_accuracies = [run.validate(teacher)]
    run.test(teacher)
    run.conclude_round()
    stop_reason, last_round = "max_rounds", 0
    for round_index in range(1, config.rounds + 1):
        if not run.may_begin(round_index, teacher):
            stop_reason = "rejected"
            break
        last_round = round_index
        if run.reads_stored_labels(round_index):
            run.guard(round_index)
            run.label(teacher, round_index)
            run.select(teacher, round_index)
        student = run.train_student(teacher, round_index)
        dev_accuracies.append(run.validate(student))
        run.test(student)
        is_better = run.is_better(teacher, student)
        is_promoted = is_better and run.may_promote(student)
        run.conclude_round()
        if not is_promoted:
            stop_reason = "rejected" if is_better else "no_gain"
            break
        teacher = student
        if has_stalled(dev_accuracies, config.stop.patience_rounds):
            stop_reason = "no_dev_gain"
            break
    run.train_baseline(last_round)
    return run.finish(stop_reason, teacher)
