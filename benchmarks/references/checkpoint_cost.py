"""What checkpoints cost a training: turns with one at every report, turns without."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.references.bare_loop import MemoryData
from benchmarks.references.synthetic_store import CLASS_NAMES
from benchmarks.references.trainer_speed import Plan, training_config
from models.objectives import Batch
from models.training import StepReport, TrainingConfig, TrainingState, initial_state, train
from storage.store import open_store
from tasks.checkpointing import CheckpointKeeper

_FINGERPRINT = "c" * 64


@dataclass(frozen=True)
class CheckpointCost:
    """Of one checkpoint.

    Attributes:
        lost_seconds: by which a training comes later to its end.
        copy_seconds: in which it stands still.
        write_seconds: until the checkpoint is whole.
        num_bytes: of its tensors.
        default_interval: in seconds.
    """

    lost_seconds: float
    copy_seconds: float
    write_seconds: float
    num_bytes: int
    default_interval: float

    @property
    def share(self) -> float:
        """Of the time that a training takes at the default interval.

        What is lost cannot be less than the copying, whatever the rest of the machine did.
        """
        return max(self.copy_seconds, self.lost_seconds) / self.default_interval


def measure(plan: Plan, folder: Path) -> CheckpointCost:
    """Train in turns; in every second one, write a checkpoint at each report."""
    config = training_config(plan)
    assert config.checkpoint_every_seconds is not None
    every_report = config.model_copy(update={"checkpoint_every_steps": 1})
    state = initial_state(config, len(CLASS_NAMES), seed=0, device="cpu")
    keeper = CheckpointKeeper(open_store(str(folder)), _FINGERPRINT, every_report)
    reports = _reports(state, config, plan)
    num_reports = plan.timed_reports
    for _ in range(plan.warm_reports):
        next(reports)
    lost: list[float] = []
    for _ in range(plan.turns):
        seconds: list[float] = []
        for saves in (False, True):
            began = time.perf_counter()
            for _ in range(num_reports):
                next(reports)
                if saves:
                    keeper.save_if_due(state, [])
            keeper.wait()
            seconds.append(time.perf_counter() - began)
        lost.append((seconds[1] - seconds[0]) / num_reports)
    began = time.perf_counter()
    tensors = state.tensors()
    copied = time.perf_counter()
    next(reports)
    writing = time.perf_counter()
    keeper.save(state, [])
    written = time.perf_counter()
    keeper.close()
    return CheckpointCost(
        lost_seconds=statistics.median(lost),
        copy_seconds=copied - began,
        write_seconds=written - writing,
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        default_interval=config.checkpoint_every_seconds,
    )


def _reports(state: TrainingState, config: TrainingConfig, plan: Plan) -> Iterator[StepReport]:
    data = MemoryData.random(256, 256, size=32, classes=len(CLASS_NAMES))
    rows = torch.arange(config.batch_size)
    pseudo_rows = torch.arange(config.batch_size * config.unlabeled_ratio) % 256
    images = torch.cat([data.images[rows], data.pseudo_images[pseudo_rows]]).float() / 255
    batch = Batch(images, data.labels[rows], data.pseudo_targets[pseudo_rows])
    return train(
        state,
        config,
        lambda step, part, num_parts: batch,
        total_steps=10**6,
        num_labeled=256,
        layer_seed=0,
        report_every=plan.report_steps,
    )
