"""Train what a store specifies: `python -m tasks.worker STORE FINGERPRINT`; imports no Prefect.

On several devices or machines: `torchrun ... -m tasks.worker STORE FINGERPRINT`, one process each.

Exit codes: 0 the model is committed, 1 failed, 2 refused (input or settings are at fault, another
try would fail alike), 3 stopped on request with a checkpoint written. torchrun itself ends with 1
for all but the first; --endings says more.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.ranks import parts_of_step
from models.training import StepReport
from storage.checkpoints import delete_checkpoints
from storage.store import Store, open_store
from tasks.checkpointing import VersionsChanged
from tasks.children import die_with_parent
from tasks.process_group import joined_group, world_size
from tasks.progress_records import ProgressRecords
from tasks.training import TrainingDiverged, TrainingStopped, run_training
from tasks.training_orders import TrainingOrder, read_order

REFUSED, STOPPED = 2, 3

_REFUSALS = (ValueError, FileNotFoundError, PermissionError, TrainingDiverged, VersionsChanged)


def main(arguments: list[str] | None = None) -> int:
    """Train to the end, or until SIGTERM, and return the exit code."""
    options = _parser().parse_args(arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # An agent that is killed cannot end its ranks. One killed before this line took the
        # rendezvous with it, without which no rank gets to its first step.
        die_with_parent()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    is_stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal is_stopping
        is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    try:
        code, message = _train(options, lambda: is_stopping)
    except Exception as error:
        _record_ending(options.endings, 1, f"{type(error).__name__}: {error}")
        raise
    if message:
        # One line: the launcher takes the last one for the reason.
        print(" ".join(message.split()), file=sys.stderr)
    _record_ending(options.endings, code, message)
    return code


def _train(options: argparse.Namespace, should_stop: Callable[[], bool]) -> tuple[int, str]:
    """Train as one of the ranks; return the exit code and why it is not 0."""
    records: ProgressRecords | None = None
    is_first = True
    try:
        store = open_store(options.store)
        if options.progress is None:
            records = ProgressRecords(store, options.fingerprint)
        order = read_order(store, options.fingerprint)
        parts_of_step(order.config, world_size())  # refused before all ranks wait for each other
        with joined_group(options.device) as (group, device):
            is_first = group.is_first
            # Rank 0's answer: all must go on, or none.
            if group.share(is_first and _is_committed(store, order)):
                return 0, ""
            run_training(
                store,
                order,
                device=device,
                on_report=_listener(options.progress, records) if is_first else _ignore,
                should_stop=should_stop,
                group=group,
            )
    except TrainingStopped as stopped:
        code, message, ending = STOPPED, str(stopped), "stopped"
    except _REFUSALS as refusal:
        code, message, ending = REFUSED, str(refusal), "refused"
    else:
        code, message, ending = 0, "", "committed"
    # What one rank refuses, the others only see as a lost connection.
    if records is not None and (is_first or code == REFUSED):
        records.close(ending, message)
    return code, message


def _is_committed(store: Store, order: TrainingOrder) -> bool:
    there = order.specification.result(store) is not None
    if there:
        delete_checkpoints(store, order.specification.fingerprint)  # of a run killed at its commit
    return there


def _listener(
    path: str | None, records: ProgressRecords | None
) -> Callable[[StepReport, int], None]:
    """Return what hands reports on: to the file that the launcher reads, else to the store."""
    if records is None:
        return _ProgressFile(path).write
    records.write({})
    return lambda report, total_steps: records.write(_figures(report, total_steps))


def _ignore(report: StepReport, total_steps: int) -> None:
    """Rank 0 reports for all."""


def _figures(report: StepReport, total_steps: int) -> dict[str, Any]:
    return {
        "step": report.step,
        "total_steps": total_steps,
        "loss": report.loss,
        "learning_rate": report.learning_rate,
    }


def _record_ending(path: str | None, code: int, message: str) -> None:
    if path is None:
        return
    line = {"rank": int(os.environ.get("RANK", "0")), "exit_code": code, "message": message}
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


class _ProgressFile:
    """Progress as JSON lines for whoever launched the worker."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._last_write = 0.0

    def write(self, report: StepReport, total_steps: int) -> None:
        if self._path is None or (
            time.monotonic() - self._last_write < 0.5 and report.step < total_steps
        ):
            return
        self._last_write = time.monotonic()
        with self._path.open("a") as file:
            file.write(json.dumps(_figures(report, total_steps)) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.worker", description=__doc__)
    parser.add_argument("store", help="URL of the store")
    parser.add_argument("fingerprint", help="fingerprint of a training specified in the store")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--threads", type=int, help="CPU threads; default: OMP_NUM_THREADS, else one a core"
    )
    parser.add_argument(
        "--progress",
        help="file to append progress to, one JSON object a line; default: a record in the store",
    )
    parser.add_argument("--endings", help="file to append to how and why this process ended; JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
