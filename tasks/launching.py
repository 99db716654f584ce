"""Run a training in a process of its own and follow it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.store import Store
from tasks.children import die_with_parent, stop_process_group
from tasks.devices import DeviceChoice
from tasks.training import TrainingStopped
from tasks.worker import REFUSED, STOPPED

_POLL_SECONDS = 0.25
_STOP_GRACE_SECONDS = 60


class TrainingFailed(RuntimeError):
    """The worker ended without a model."""


class TrainingRefused(ValueError):
    """The worker found its input or settings at fault; another try would fail alike."""


def launch_worker(
    store: Store,
    fingerprint: str,
    *,
    device: DeviceChoice,
    on_progress: Callable[[dict[str, Any]], None],
) -> None:
    """Run `tasks.worker` until the model is committed.

    An exception in the caller, such as Ctrl-C or a cancelled flow run, stops the worker by SIGTERM,
    upon which it writes a checkpoint. If this process is killed, the worker is killed with it.

    Args:
        store: holds the specification.
        fingerprint: of the training.
        device: where to train.
        on_progress: called with step, total_steps, loss and learning_rate, a few times a second.
    Raises: TrainingStopped if the worker was stopped by somebody else; TrainingRefused with its
        message; TrainingFailed with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="selftrain-worker-") as folder:
        log_path, progress_path = Path(folder) / "log.txt", Path(folder) / "progress.jsonl"
        progress_path.touch()
        command = [sys.executable, "-m", "tasks.worker", store.url, fingerprint]
        command += ["--device", device, "--progress", str(progress_path)]
        # Output goes to a file: a pipe held by a surviving child would hide a dead flow's exit.
        with log_path.open("wb") as log, progress_path.open() as progress:
            process = subprocess.Popen(
                command,
                # Threads that wait by spinning slow training tenfold where another process shares
                # the cores; waiting passively costs nothing measurable where none does.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            try:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    for line in progress.readlines():
                        if line.endswith("\n"):
                            on_progress(json.loads(line))
            finally:
                stop_process_group(process, grace_seconds=_STOP_GRACE_SECONDS)
        output = log_path.read_text(errors="replace").strip()
    last = output.splitlines()[-1] if output else "no output"
    if process.returncode == STOPPED:
        raise TrainingStopped(last)
    if process.returncode == REFUSED:
        raise TrainingRefused(last)
    if process.returncode != 0:
        raise TrainingFailed(
            f"training {fingerprint[:12]} failed (exit code {process.returncode}): {last}\n"
            f"--- end of the worker's output ---\n{output[-4000:]}"
        )
