"""Training: speed against a loop written by hand, checkpoints, resume, several processes.

What is measured against what, and how, stands in benchmarks/references/.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from benchmarks.references import checkpoint_cost, distributed, resuming, trainer_speed
from benchmarks.references.trainer_speed import Plan
from models.architectures import AirbenchConfig

FULL_PLAN = Plan(labeled_batch=32, report_steps=10, warm_reports=1, timed_reports=1, turns=3)
QUICK_PLAN = Plan(labeled_batch=4, report_steps=2, warm_reports=2, timed_reports=2, turns=3)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="about a minute, and less exact")
    options = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        # As for the workers of a run (tasks/launching.py); it is read when torch is imported.
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    quick: bool = options.quick
    plan = QUICK_PLAN if quick else FULL_PLAN
    figures: list[Figure] = []
    for measured in (_speed, _checkpoints, _resume, _processes):
        print(f"{measured.__name__.strip('_')} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="selftrain-training-") as folder:
            figures += measured(plan, Path(folder), quick)
    print_figures(figures, as_json=options.json)


def _speed(plan: Plan, folder: Path, quick: bool) -> list[Figure]:
    size = f"{plan.images_a_step} images a step, {plan.turns} turns"
    recipe = f"at 32 px, RandAugment + cutout + pad_shift + flip + dropout + EMA, {size}"
    make = partial(figure, unit="x", direction="at_least", quick=quick, seeds=[0])
    against_loader = (
        "the bare loop fed by two DataLoaders, a worker a core in all, with torchvision's"
        " transforms per image"
    )
    wide = _Speeds(plan, folder / "wide")
    # Its steps are short enough for the input to show; as many images as in full also when quick.
    fast_plan = replace(plan, architecture=AirbenchConfig(), labeled_batch=FULL_PLAN.labeled_batch)
    fast = _Speeds(fast_plan, folder / "fast")
    return [
        make(
            "trainer_over_bare_loop",
            wide.ratio("bare_loop"),
            goal=0.95,
            against="a loop over tensors in memory with the same noise functions; WRN-28-2 "
            f"{recipe}; {wide.rates('bare_loop')}",
        ),
        make(
            "trainer_over_plain_dataloader",
            wide.ratio("plain_dataloader"),
            goal=1,
            against=f"{against_loader}; WRN-28-2; {wide.rates('plain_dataloader')}",
        ),
        make(
            "trainer_over_plain_dataloader_fast_net",
            fast.ratio("plain_dataloader"),
            goal=1,
            against=f"{against_loader}; airbench, the same recipe, {fast_plan.images_a_step}"
            f" images a step; {fast.rates('plain_dataloader')}; the "
            f"bare loop: {fast.rates('bare_loop')}",
        ),
    ]


class _Speeds:
    """The turns of the trainer and of what it is held against."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._images = plan.images_a_turn
        self._turns = trainer_speed.measure(plan, folder)

    def ratio(self, other: str) -> float:
        """Return how much longer the other's turns took than those of the trainer before them."""
        pairs = zip(self._turns[other], self._turns["trainer"], strict=True)
        return statistics.median(theirs.seconds / ours.seconds for theirs, ours in pairs)

    def rates(self, other: str) -> str:
        """Say the images a second of both, and how they compare on this process's CPU time."""
        ours, theirs = (
            self._images / statistics.median(turn.seconds for turn in self._turns[name])
            for name in ("trainer", other)
        )
        pairs = zip(self._turns[other], self._turns["trainer"], strict=True)
        cpu = statistics.median(theirs.cpu_seconds / ours.cpu_seconds for theirs, ours in pairs)
        return f"{ours:.0f} against {theirs:.0f} images/s ({cpu:.2f} x by CPU of this process)"


def _checkpoints(plan: Plan, folder: Path, quick: bool) -> list[Figure]:
    cost = checkpoint_cost.measure(plan, folder)
    return [
        figure(
            "checkpoint_share",
            cost.share,
            "of the training's time",
            goal=0.01,
            direction="at_most",
            against=f"the same training without checkpoints; one of {cost.num_bytes / 1e6:.0f} MB"
            f" (WRN-28-2, SGD, EMA) costs {cost.lost_seconds:.3f} s and stands for"
            f" {cost.default_interval:.0f} s; copying takes {cost.copy_seconds:.3f} s, the whole"
            f" write {cost.write_seconds:.3f} s",
            quick=quick,
            seeds=[0],
        )
    ]


def _resume(plan: Plan, folder: Path, quick: bool) -> list[Figure]:
    del plan
    num_shards, times = (200, 1) if quick else (1000, 5)
    found = resuming.measure(folder, num_shards=num_shards, times=times)
    total = statistics.median(one.total for one in found)
    return [
        figure(
            "resume_seconds",
            statistics.median(one.after_imports for one in found),
            "s from imports done to the first new step done",
            goal=5,
            direction="at_most",
            against=f"a goal of 5 s; student over {num_shards} shards of pseudo-labels and 10 of "
            f"labels, local store, median of {times}; {total:.1f} s from the process's start",
            quick=quick,
            seeds=[0],
        )
    ]


def _processes(plan: Plan, folder: Path, quick: bool) -> list[Figure]:
    del plan
    depth, batch, steps, timed_steps, times = (10, 2, 20, 4, 1) if quick else (28, 8, 20, 20, 3)
    difference = distributed.max_difference(folder, depth=depth, labeled_batch=batch, steps=steps)
    rate = partial(
        distributed.images_per_second, labeled_batch=8 if quick else 32, steps=timed_steps
    )
    rates = [(rate(1), rate(2)) for _ in range(times)]
    alone, together = (statistics.median(column) for column in zip(*rates, strict=True))
    return [
        figure(
            "ddp_max_difference",
            difference,
            "in a weight or its average",
            goal=1e-9,
            direction="at_most",
            against=f"one process with the joint batch; 2 gloo processes, float64, {steps} steps of"
            f" WRN-{depth}-2 with GroupNorm (BatchNorm over processes needs CUDA: unchecked here)",
            quick=quick,
            seeds=[0],
        ),
        figure(
            "ddp_scaling",
            statistics.median(b / a for a, b in rates),
            "x",
            goal=1,
            direction="at_least",
            against="one process of one thread; 2 gloo processes of one thread, WRN-28-2 with"
            f" GroupNorm, the same global batch; {together:.0f} against {alone:.0f} images/s",
            quick=quick,
            seeds=[0],
        ),
    ]


if __name__ == "__main__":
    main()
