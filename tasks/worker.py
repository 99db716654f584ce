"""Train what a store specifies: `python -m tasks.worker STORE FINGERPRINT`; imports no Prefect.

Exit codes: 0 the model is committed, 1 failed, 2 refused (input or settings are at fault, another
try would fail alike), 3 stopped on request with a checkpoint written.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from models.training import StepReport
from storage.manifest import read_manifest
from storage.store import open_store
from tasks.checkpointing import VersionsChanged
from tasks.devices import resolve_device
from tasks.training import TrainingDiverged, TrainingStopped, run_training
from tasks.training_orders import read_order

REFUSED, STOPPED = 2, 3

_REFUSALS = (ValueError, FileNotFoundError, PermissionError, TrainingDiverged, VersionsChanged)


def main(arguments: list[str] | None = None) -> int:
    """Train to the end, or until SIGTERM, and return the exit code."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    is_stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal is_stopping
        is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    try:
        store = open_store(options.store)
        order = read_order(store, options.fingerprint)
        folder = order.specification.folder
        if read_manifest(store, folder, expect_fingerprint=options.fingerprint) is not None:
            return 0
        run_training(
            store,
            order,
            device=resolve_device(options.device),
            on_report=_ProgressFile(options.progress).write,
            should_stop=lambda: is_stopping,
        )
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except _REFUSALS as refusal:
        # One line: the launcher takes the last one for the reason.
        print(" ".join(str(refusal).split()), file=sys.stderr)
        return REFUSED
    return 0


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
        line: dict[str, Any] = {
            "step": report.step,
            "total_steps": total_steps,
            "loss": report.loss,
            "learning_rate": report.learning_rate,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.worker", description=__doc__)
    parser.add_argument("store", help="URL of the store")
    parser.add_argument("fingerprint", help="fingerprint of a training specified in the store")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--threads", type=int, help="CPU threads; default: OMP_NUM_THREADS, else one a core"
    )
    parser.add_argument("--progress", help="file to append progress to, one JSON object a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
