"""What does it cost to label many shards, beside labelling them, and does the cost grow evenly?

The flow `label` with two worker processes and 100 tasks, over shards of one tiny image each, so
that nearly all of its time is what it costs to have 10,000 shards. Each labelling runs in a process
of its own with a Prefect server of its own, and all of them three times, in turn: the start of the
small ones varies by seconds.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from benchmarks.references.orchestration import Labeling, measure

_NUM_SHARDS = (10, 100, 1_000, 10_000)
_QUICK_NUM_SHARDS = (10, 100, 1_000)
_REPEATS, _QUICK_REPEATS = 3, 1

# What shards of usual size hold, and more than two cores label a second: decoding ImageNet-size
# JPEGs and a forward pass of MobileNetV3-small leave 854 at best. Slower labelling makes the share
# of all else smaller.
_IMAGES_PER_SHARD = 1_000
_IMAGES_PER_SECOND = 1_000


def main() -> None:
    """Measure, and print the figures."""
    parser = benchmark_parser(__doc__, quick="up to 1,000 shards, not 10,000")
    options = parser.parse_args()
    counts = _QUICK_NUM_SHARDS if options.quick else _NUM_SHARDS
    with tempfile.TemporaryDirectory(prefix="selftrain-labeling-scale-") as name:
        repeats = _QUICK_REPEATS if options.quick else _REPEATS
        measured = [[measure(Path(name), count) for count in counts] for _ in range(repeats)]
    labelings = [_median(of_count) for of_count in zip(*measured, strict=True)]
    print_figures(figures_of(labelings, quick=options.quick), as_json=options.json)


def figures_of(labelings: list[Labeling], *, quick: bool) -> list[Figure]:
    """Return the figures of labelings of growing size."""
    *_, small, middle, large = labelings
    work = large.num_shards * _IMAGES_PER_SHARD / _IMAGES_PER_SECOND
    seconds = ", ".join(f"{one.seconds:.1f} ({one.overhead_seconds:.1f})" for one in labelings)
    memory = ", ".join(f"{one.driver_mib:.0f} + {one.worker_mib:.0f}" for one in labelings)
    counts = ", ".join(f"{one.num_shards:,}" for one in labelings)
    return [
        figure(
            "orchestration_share",
            large.overhead_seconds / (large.overhead_seconds + work),
            "of wall time",
            goal=0.01,
            direction="at_most",
            against=f"{large.overhead_seconds:.1f} s in which a worker had no shard, of"
            f" {large.seconds:.1f} s for {large.num_shards:,} shards of one tiny image, beside"
            f" {work:,.0f} s for as many shards of {_IMAGES_PER_SHARD:,} images at"
            f" {_IMAGES_PER_SECOND:,} a second",
            quick=quick,
            seeds=[0],
        ),
        figure(
            "labeling_growth_time",
            _seconds_a_shard(middle, large) / _seconds_a_shard(small, middle),
            "x the time of one more shard",
            goal=1.2,
            direction="at_most",
            against=f"ten times fewer shards; {counts} shards in {seconds} s (of which no work),"
            " the median of each",
            quick=quick,
            seeds=[0],
        ),
        figure(
            "labeling_growth_memory",
            (large.driver_mib + large.worker_mib) / (small.driver_mib + small.worker_mib),
            "x the peak memory",
            goal=1.2,
            direction="at_most",
            against=f"a hundred times fewer shards; {counts} shards in {memory} MiB (flow, worker)",
            quick=quick,
            seeds=[0],
        ),
    ]


def _median(labelings: Sequence[Labeling]) -> Labeling:
    """Return the one that took neither most nor least time."""
    return sorted(labelings, key=lambda one: one.seconds)[len(labelings) // 2]


def _seconds_a_shard(smaller: Labeling, larger: Labeling) -> float:
    return (larger.seconds - smaller.seconds) / (larger.num_shards - smaller.num_shards)


if __name__ == "__main__":
    main()
