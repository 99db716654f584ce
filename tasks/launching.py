"""Have a training run in processes of its own, and follow it: started here, or by somebody else."""

import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from storage.addresses import model_folder
from storage.manifest import read_manifest
from storage.store import Store
from tasks.children import die_with_parent, stop_process_group
from tasks.devices import DeviceChoice
from tasks.progress_records import ProgressRecord, read_progress
from tasks.training import TrainingStopped
from tasks.worker import REFUSED, STOPPED

_log = logging.getLogger(__name__)
_OF_A_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}
_POLL_SECONDS = 0.25
_STOP_GRACE_SECONDS = 60


class TrainingFailed(RuntimeError):
    """The worker ended without a model."""


class TrainingRefused(ValueError):
    """The worker found its input or settings at fault; another try would fail alike."""


class TrainingNotSeen(TimeoutError):
    """A training that somebody else was to start gave no sign of life for too long."""


class LocalLaunch(BaseModel):
    """Trainings run on this machine, started by the run itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"] = "local"
    processes: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default=1,
        description="Processes that train one model together; auto: one for each CUDA device, one"
        " on the CPU. It must divide every training's accumulation_steps, and then changes the"
        " result by the order of sums only; where that is 1, it must divide the batch sizes, and"
        " layer noise and mixing are drawn for each process.",
    )


class ExternalLaunch(BaseModel):
    """Trainings are ordered in the store; somebody else starts them, and the run waits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["external"] = "external"
    timeout_seconds: float = Field(
        default=86_400.0,
        gt=0,
        description="Longest time without a sign of life in the store, before the start or after.",
    )
    poll_seconds: float = Field(
        default=10.0, gt=0, description="Time between two looks into the store."
    )


LaunchConfig = Annotated[LocalLaunch | ExternalLaunch, Field(discriminator="kind")]

ONE_LOCAL_PROCESS = LocalLaunch()


def launch_worker(
    store: Store,
    fingerprint: str,
    *,
    device: DeviceChoice,
    on_progress: Callable[[dict[str, Any]], None],
    launch: LaunchConfig = ONE_LOCAL_PROCESS,
    announce: Callable[[str], None] = _log.info,
) -> None:
    """Have `tasks.worker` run until the model is committed.

    Workers of a local launch are stopped by SIGTERM, upon which they write a checkpoint, when an
    exception passes through here, such as Ctrl-C or a cancelled flow run; if this process is
    killed, they are killed with it. Workers that somebody else started go on.

    Args:
        store: holds the specification.
        fingerprint: of the training.
        device: where to train.
        on_progress: called with step, total_steps, loss and learning_rate, a few times a second.
        launch: who starts how many processes.
        announce: given the command, in words, where somebody else is to start it.
    Raises: TrainingStopped if the worker was stopped by somebody else; TrainingRefused with its
        message; TrainingFailed with the end of its output; TrainingNotSeen.
    """
    if isinstance(launch, ExternalLaunch):
        _await(store, fingerprint, launch, device, on_progress, announce)
    else:
        _run_here(store, fingerprint, _num_processes(launch, device), device, on_progress)


def _num_processes(launch: LocalLaunch, device: DeviceChoice) -> int:
    if launch.processes != "auto":
        return launch.processes
    has_devices = device != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if has_devices else 1


def _run_here(
    store: Store,
    fingerprint: str,
    num_processes: int,
    device: DeviceChoice,
    on_progress: Callable[[dict[str, Any]], None],
) -> None:
    with tempfile.TemporaryDirectory(prefix="selftrain-worker-") as name:
        folder = Path(name)
        log_path, progress_path = folder / "log.txt", folder / "progress.jsonl"
        endings_path = folder / "endings.jsonl"
        for path in (progress_path, endings_path):
            path.touch()
        worker = ["-m", "tasks.worker", store.url, fingerprint, "--device", device]
        worker += ["--progress", str(progress_path)]
        if num_processes > 1:
            worker = [*_torchrun(num_processes), *worker, "--endings", str(endings_path)]
        # Output goes to a file: a pipe held by a surviving child would hide a dead flow's exit.
        with log_path.open("wb") as log, progress_path.open() as progress:
            process = subprocess.Popen(
                [sys.executable, *worker],
                env=_environment(num_processes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            begun = ""  # of a line that the worker is still writing
            try:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    *lines, begun = (begun + progress.read()).split("\n")
                    for line in lines:
                        on_progress(json.loads(line))
            finally:
                stop_process_group(process, grace_seconds=_STOP_GRACE_SECONDS)
        output = log_path.read_text(errors="replace").strip()
        ended = endings_path.read_text().splitlines(keepends=True)
        # A rank may have been killed in the middle of its line.
        endings = [json.loads(line) for line in ended if line.endswith("\n")]
    if num_processes > 1:
        code, reason = _joint_ending(process.returncode, endings, num_processes)
    else:
        code, reason = process.returncode, output.splitlines()[-1] if output else "no output"
    if code == STOPPED:
        raise TrainingStopped(reason)
    if code == REFUSED:
        raise TrainingRefused(reason)
    if code != 0:
        raise TrainingFailed(
            f"training {fingerprint[:12]} failed (exit code {code}): {reason}\n"
            f"--- end of the worker's output ---\n{output[-4000:]}"
        )


def _torchrun(num_processes: int) -> list[str]:
    # The loopback address, not this machine's name: a container may not be able to look it up, and
    # ranks of one machine have no business on the network.
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num_processes)]
    return ["-m", "torch.distributed.run", *options]


def _environment(num_processes: int) -> dict[str, str]:
    # Threads that wait by spinning slow training tenfold where another process shares the cores;
    # waiting passively costs nothing measurable where none does.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    if num_processes > 1:
        threads = max(1, (os.cpu_count() or 1) // num_processes)
        defaults |= {
            "OMP_NUM_THREADS": str(threads),
            # Ranks get nearly as long for their checkpoint as a single worker.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_STOP_GRACE_SECONDS - 10),
        }
        if sys.platform == "linux":
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
    # Of a launcher around this process: a worker would wait for ranks that nobody starts.
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    return defaults | inherited


def _joint_ending(code: int, endings: list[dict[str, Any]], num_processes: int) -> tuple[int, str]:
    """Return one exit code and reason for all ranks, of which torchrun says only: failed.

    A refusal counts before all else: the other ranks only see that a connection was lost.
    """
    if code == 0:
        return 0, ""
    for decisive in (REFUSED, STOPPED):
        for ending in endings:
            if ending["exit_code"] == decisive:
                return decisive, ending["message"]
    silent = sorted(set(range(num_processes)) - {ending["rank"] for ending in endings})
    if silent:
        ranks = ", ".join(map(str, silent))
        return code, f"rank {ranks} of {num_processes} was lost (killed, or out of memory)"
    failed = [ending for ending in endings if ending["exit_code"] != 0]
    if not failed:
        return code, "torchrun failed after its ranks had ended well"
    return code, f"rank {failed[0]['rank']}: {failed[0]['message']}"


def _await(
    store: Store,
    fingerprint: str,
    launch: ExternalLaunch,
    device: DeviceChoice,
    on_progress: Callable[[dict[str, Any]], None],
    announce: Callable[[str], None],
) -> None:
    worker = ["-m", "tasks.worker", store.url, fingerprint, "--device", device]
    seen = read_progress(store, fingerprint)  # of an attempt before, if any
    seen_at = time.monotonic()
    announce(
        f"waiting for training {fingerprint[:12]}, to be started by:"
        f" {shlex.join(['python', *worker])}"
        f" (or {shlex.join(['torchrun', '--nproc-per-node', 'N', *worker])})"
    )
    while read_manifest(store, model_folder(fingerprint), expect_fingerprint=fingerprint) is None:
        record = read_progress(store, fingerprint)
        if record is not None and record != seen:
            seen, seen_at = record, time.monotonic()
            if record.state == "refused":
                raise TrainingRefused(record.message)
            if record.progress:
                on_progress(record.progress)
        if time.monotonic() - seen_at > launch.timeout_seconds:
            raise TrainingNotSeen(
                f"training {fingerprint[:12]} gave no sign of life in {store.url} for"
                f" {launch.timeout_seconds:g} s ({_last_seen(seen)}): start"
                f" {shlex.join(['python', *worker])} and resume the run, or raise"
                " launch.timeout_seconds"
            )
        time.sleep(launch.poll_seconds)


def _last_seen(record: ProgressRecord | None) -> str:
    if record is None:
        return "never seen"
    if not record.progress:
        return f"last seen {record.state}, before its first report"
    step, total_steps = record.progress["step"], record.progress["total_steps"]
    return f"last seen {record.state} at step {step} of {total_steps}"
