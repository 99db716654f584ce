"""Seconds from a process's start, and from its imports done, to the first step after a resume.

Run by itself, this file is that process: `python -m benchmarks.references.resuming STORE
FINGERPRINT`.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.references.synthetic_store import make_store
from benchmarks.references.trainer_speed import FULL_NOISE
from models.architectures import SmallCnnConfig
from models.durations import Duration
from models.noise import RandomResizedConfig
from models.training import StepReport, TrainingConfig
from storage.store import open_store
from tasks.training import TrainingStopped, run_training
from tasks.training_orders import read_order

_STOP_AT = 3


@dataclass(frozen=True)
class ResumeSeconds:
    """Of one resume.

    Attributes:
        after_imports: from "imports done" to "first new step done".
        total: from the start of the process.
    """

    after_imports: float
    total: float


class _FirstStepDone(Exception):
    pass


def measure(folder: Path, *, num_shards: int, times: int) -> list[ResumeSeconds]:
    """Stop a training over that many shards with a checkpoint, and resume it in new processes.

    Random resized crops are decoded anew in every epoch, so shards are streamed and not cached, as
    with a corpus of this many shards of usual size. The network is small: a step of it is fast.
    """
    stored = make_store(
        folder, labeled_shards=10, unlabeled_shards=num_shards, shard_size=10, image_size=32
    )
    noise = FULL_NOISE.model_copy(update={"crop": RandomResizedConfig()})
    config = TrainingConfig(
        architecture=SmallCnnConfig(width=16, depth=1),
        image_size=32,
        batch_size=32,
        duration=Duration(steps=50),  # few enough for a report after each
        noise=noise,
    )
    order = stored.order(config)
    num_reports = 0

    def should_stop() -> bool:
        nonlocal num_reports
        num_reports += 1
        return num_reports == _STOP_AT

    try:
        run_training(
            stored.store,
            order,
            device=torch.device("cpu"),
            on_report=lambda report, total_steps: None,
            should_stop=should_stop,
        )
    except TrainingStopped:
        fingerprint = order.specification.fingerprint
        return [_resume(stored.store.url, fingerprint) for _ in range(times)]
    raise AssertionError("the training was not stopped")


def _resume(url: str, fingerprint: str) -> ResumeSeconds:
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.references.resuming", url, fingerprint],
        stdout=subprocess.PIPE,
        check=True,
    )
    times = json.loads(done.stdout)
    assert times["step"] == _STOP_AT + 1
    return ResumeSeconds(times["done"] - times["imported"], times["done"] - began)


def _main(imported: float, url: str, fingerprint: str) -> None:
    store = open_store(url)

    def first_step(report: StepReport, total_steps: int) -> None:
        del total_steps
        print(json.dumps({"imported": imported, "done": time.time(), "step": report.step}))
        raise _FirstStepDone

    try:
        run_training(
            store,
            read_order(store, fingerprint),
            device=torch.device("cpu"),
            on_report=first_step,
            should_stop=lambda: False,
        )
    except _FirstStepDone:
        return


if __name__ == "__main__":
    _main(time.time(), *sys.argv[1:])
