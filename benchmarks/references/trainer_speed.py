"""Seconds a step of the trainer, of the bare loop and of a plain DataLoader, in turns.

A turn of each follows a turn of the others in one process, so that what else the machine does
meets all of them alike. Every turn begins with steps that are not timed: batches that were
prepared during the others' turns are used up by then, and those prepared during this one go on.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.references.bare_loop import MemoryData, bare_loop, batches_in_memory
from benchmarks.references.plain_dataloader import batches_of_loaders
from benchmarks.references.synthetic_store import CLASS_NAMES, make_store
from models.architectures import ArchitectureConfig, WideResNetConfig
from models.durations import Duration
from models.noise import CutoutConfig, NoiseConfig, PadShiftConfig, RandAugmentConfig
from models.optimization import EmaConfig, SGDConfig
from models.training import StepReport, TrainingConfig
from tasks.training import TrainingStopped, run_training

FULL_NOISE = NoiseConfig(
    crop=PadShiftConfig(pixels=4),
    horizontal_flip=True,
    randaugment=RandAugmentConfig(num_ops=2, magnitude=10),
    cutout=CutoutConfig(fraction=0.5),
    dropout=0.5,
)


_WIDE_RESNET = WideResNetConfig()


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        labeled_batch: images a step; three times as many pseudo-labelled ones come with them.
        report_steps: steps between two reports of the trainer.
        warm_reports: of a turn, not timed.
        timed_reports: of a turn.
        turns: of each participant.
        architecture: WRN-28-2 unless given.
    """

    labeled_batch: int
    report_steps: int
    warm_reports: int
    timed_reports: int
    turns: int
    architecture: ArchitectureConfig = _WIDE_RESNET

    @property
    def reports(self) -> int:
        """Of the whole measurement, and one in which it is stopped."""
        return self.turns * (self.warm_reports + self.timed_reports) + 1

    @property
    def images_a_step(self) -> int:
        """Labelled and pseudo-labelled."""
        return 4 * self.labeled_batch

    @property
    def images_a_turn(self) -> int:
        """Those that are timed."""
        return self.images_a_step * self.report_steps * self.timed_reports


@dataclass(frozen=True)
class Turn:
    """Of the timed steps of one turn.

    Attributes:
        seconds: that passed.
        cpu_seconds: of this process, all threads; says something on a busy machine, too.
    """

    seconds: float
    cpu_seconds: float


class _Clock:
    def __init__(self) -> None:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def turn(self) -> Turn:
        return Turn(time.perf_counter() - self._began, time.process_time() - self._cpu_began)


@dataclass
class _Rotation:
    """Follows the trainer's reports; when its turn is over, the others have theirs."""

    plan: Plan
    others: dict[str, Iterator[None]]
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    _num_reports: int = 0
    _clock: _Clock = field(default_factory=_Clock)

    def report(self, report: StepReport, total_steps: int) -> None:
        del report, total_steps
        self._num_reports += 1
        if self._num_reports == self.plan.warm_reports:
            self._clock = _Clock()
        if self._num_reports == self.plan.warm_reports + self.plan.timed_reports:
            self.turns.setdefault("trainer", []).append(self._clock.turn())
            for name, steps in self.others.items():
                _run(steps, self.plan.warm_reports * self.plan.report_steps)
                turn = _run(steps, self.plan.timed_reports * self.plan.report_steps)
                self.turns.setdefault(name, []).append(turn)
            self._num_reports = 0

    def is_over(self) -> bool:
        return len(self.turns.get("trainer", [])) == self.plan.turns


def training_config(plan: Plan) -> TrainingConfig:
    """The network at 32 px under the full noise recipe, three pseudo-labels a label."""
    # A stage reports 50 times, or every tenth step if that is more often.
    assert plan.report_steps == 10 or plan.reports <= 50
    return TrainingConfig(
        architecture=plan.architecture,
        image_size=32,
        batch_size=plan.labeled_batch,
        unlabeled_ratio=3,
        duration=Duration(steps=max(50, plan.reports) * plan.report_steps),
        noise=FULL_NOISE,
        optimizer=SGDConfig(lr=0.01),
        ema=EmaConfig(decay=0.999),
    )


def measure(plan: Plan, folder: Path) -> dict[str, list[Turn]]:
    """Return the turns of `trainer`, `bare_loop` and `plain_dataloader`.

    The trainer is the whole training stage as a run has it: batches from shards in a store,
    reports, checks, checkpoints at the default interval.
    """
    stored = make_store(folder, labeled_shards=2, unlabeled_shards=8, shard_size=256, image_size=32)
    order = stored.order(training_config(plan))
    data = MemoryData.random(2 * 256, 8 * 256, size=32, classes=len(CLASS_NAMES))
    config, num_classes = order.config, len(CLASS_NAMES)
    # Two loaders, so a worker a core in all.
    num_workers = max(1, (os.cpu_count() or 1) // 2)
    loaded = batches_of_loaders(data, config, num_workers=num_workers)
    rotation = _Rotation(
        plan,
        {
            "bare_loop": bare_loop(config, num_classes, batches_in_memory(data, config)),
            "plain_dataloader": bare_loop(config, num_classes, loaded),
        },
    )
    try:
        run_training(
            stored.store,
            order,
            device=torch.device("cpu"),
            on_report=rotation.report,
            should_stop=rotation.is_over,
        )
    except TrainingStopped:
        return rotation.turns
    raise AssertionError("the training was too short for the turns")


def _run(steps: Iterator[None], count: int) -> Turn:
    clock = _Clock()
    for _ in range(count):
        next(steps)
    return clock.turn()
