"""Does labelling run at the speed of the hardware, and does that leave views and labels alone?

Photographs of ImageNet, replicated into shards on the local disk, by networks of random weights at
224 pixels: the stage is `label_corpus`, from the store to Parquet in the store. Labelling is for
corpora of millions, beside which the start of the workers, some five seconds, is nothing; so a
stage that is timed lasts minutes, of which that is a few hundredths.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from benchmarks.references import labeling_views
from benchmarks.references.labeling_data import (
    PHOTOGRAPHS,
    PhotographStore,
    make_store,
    put_network,
)
from benchmarks.references.labeling_speeds import (
    Forward,
    alone_decoding,
    best_forward,
    images_per_second,
    num_processes,
    stage_decoding,
)
from flows.labeling import label_corpus
from flows.server import prefect_server
from storage.corpus import Corpus, save_corpus
from tasks.labeling import LabelingConfig

T = TypeVar("T")

_NETWORKS = ("mobilenet_v3_small", "resnet18")


@dataclass(frozen=True)
class Plan:
    """How much work is measured.

    Attributes:
        shard_size: photographs of a shard.
        num_shards: of each network's corpus; the stage takes three to five minutes on two cores.
        plain_shards: that the plain loop labels.
        forward_seconds: of the network alone, each time.
        num_images: CIFAR-10 images that are labelled, and as many that are trained on.
        steps: of that training.
    """

    shard_size: int
    num_shards: dict[str, int]
    plain_shards: int
    forward_seconds: float
    num_images: int
    steps: int


_FULL = Plan(400, {"mobilenet_v3_small": 200, "resnet18": 16}, 10, 15, 4000, 400)
_QUICK = Plan(100, {"mobilenet_v3_small": 20, "resnet18": 4}, 4, 2, 500, 60)
_BATCH_SIZES = (8, 16, 32, 64)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="the same on a twentieth of the work")
    parser.add_argument(
        "--only", choices=("speed", "views"), help="measure only speed, or only views and labels"
    )
    options = parser.parse_args()
    figures: list[Figure] = []
    if not PHOTOGRAPHS.exists():
        print(f"nothing is measured without {PHOTOGRAPHS.name}", file=sys.stderr)
    else:
        plan = _QUICK if options.quick else _FULL
        if options.only != "speed":
            figures += _view_figures(plan, options.quick)
        if options.only != "views":
            with tempfile.TemporaryDirectory(prefix="selftrain-labeling-") as folder:
                figures += _speed_figures(plan, Path(folder), options.quick)
    print_figures(figures, as_json=options.json)


@dataclass(frozen=True)
class Speeds:
    """Images a second of one network's labelling and of its parts, on all cores.

    Attributes:
        stage: the whole labelling.
        decode: its reading, decoding and resizing, before and after it.
        script: reading, decoding and resizing by a script.
        forward: the network alone, before and after the labelling.
        how: the network is fastest.
    """

    stage: float
    decode: float
    script: float
    forward: float
    how: Forward

    @property
    def ideal(self) -> float:
        """What decoding and network reach in turn on the same cores."""
        return 1 / (1 / self.decode + 1 / self.forward)


def _speed_figures(plan: Plan, folder: Path, quick: bool) -> list[Figure]:
    made = make_store(folder, num_shards=max(plan.num_shards.values()), shard_size=plan.shard_size)

    def at_least(name: str, value: float, unit: str, goal: float, against: str) -> Figure:
        return figure(
            name,
            value,
            unit,
            goal=goal,
            direction="at_least",
            against=against,
            quick=quick,
            seeds=[0],
        )

    with prefect_server():
        speeds = {name: _speeds(plan, made, name, folder / name) for name in _NETWORKS}
    figures = [
        at_least(
            f"labeling_efficiency_{name}",
            found.stage / found.ideal,
            "of the ideal",
            0.9,
            f"1 / (1 / decoding + 1 / network); stage {found.stage:.0f}, decoding alone"
            f" {found.decode:.0f}, network alone {found.forward:.0f} images/s ({found.how});"
            f" {num_processes()} cores, {plan.num_shards[name] * plan.shard_size} photographs",
        )
        for name, found in speeds.items()
    ]
    light = speeds[_NETWORKS[0]]
    plain = _plain_loop(sorted(made.shards.glob("*.tar"))[: plan.plain_shards], folder)
    return [
        *figures,
        at_least(
            "labeling_decoding_over_script",
            light.decode / light.script,
            "x",
            0.9,
            "a script that reads with tarfile, decodes with simplejpeg and resizes with torch:"
            f" {light.script:.0f} images/s",
        ),
        at_least(
            "labeling_over_plain_loop",
            light.stage / plain,
            "x",
            3,
            f"{_NETWORKS[0]} by webdataset, Pillow, torchvision's transforms, a DataLoader of"
            f" {num_processes()} workers and Parquet: {plain:.0f} images/s",
        ),
    ]


def _speeds(plan: Plan, made: PhotographStore, name: str, folder: Path) -> Speeds:
    chosen = made.corpus.shards[: plan.num_shards[name]]
    paths = [made.shards / f"{shard.stem}.tar" for shard in chosen]
    corpus = Corpus.of(list(chosen), None)
    save_corpus(made.store, corpus, {path.stem: str(path) for path in paths})
    how = best_forward(name, batch_sizes=_BATCH_SIZES, seconds=plan.forward_seconds)
    script = images_per_second(alone_decoding, [(share,) for share in _shares(paths)])

    def parts(some: list[Path]) -> tuple[float, float]:
        shares = _shares([path.stem for path in some])
        decoding = [(made.store.url, corpus.digest, share) for share in shares]
        return images_per_second(stage_decoding, decoding), how.rate(plan.forward_seconds)

    model = put_network(made.store, name, folder)
    config = LabelingConfig(form="full")  # random weights have no dev split to be calibrated by
    # A machine's speed drifts: what the stage is held against is measured on both sides of it.
    before = parts(paths[::2])
    started = time.monotonic()
    label_corpus(made.store.url, model, corpus.digest, config, device="cpu")
    seconds = time.monotonic() - started
    decode, forward = (sum(pair) / 2 for pair in zip(before, parts(paths[1::2]), strict=True))
    found = Speeds(corpus.num_samples / seconds, decode, script, forward, how)
    print(name, found, file=sys.stderr)
    return found


def _shares(items: list[T]) -> list[list[T]]:
    """Return one share for each process."""
    count = num_processes()
    return [items[i::count] for i in range(count)]


def _plain_loop(shards: list[Path], folder: Path) -> float:
    """Return images a second of the plain loop, in a process without threads to fork beside."""
    arguments = [_NETWORKS[0], folder / "plain.parquet", num_processes(), *shards]
    module = [sys.executable, "-m", "benchmarks.references.labeling_plain_loop"]
    done = subprocess.run(
        [*module, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout)


def _view_figures(plan: Plan, quick: bool) -> list[Figure]:
    def at_most(name: str, value: float, unit: str, goal: float, against: str) -> Figure:
        return figure(
            name,
            value,
            unit,
            goal=goal,
            direction="at_most",
            against=against,
            quick=quick,
            seeds=[0],
        )

    pixels = labeling_views.pixel_difference()
    views, bf16, accuracy = labeling_views.label_differences(
        num_images=plan.num_images, steps=plan.steps
    )
    trained = f"{plan.num_images} CIFAR-10 images, network of {accuracy:.0%} accuracy"
    torchvision = "torchvision's Resize and CenterCrop of Pillow's images"
    at_thresholds = f"fp32; {trained}; thresholds at 25, 50 and 75 % of confidences"
    return [
        at_most("view_pixel_difference", pixels, "of 255", 1.0, f"{torchvision}; photographs"),
        at_most(
            "view_labels_changed",
            views.labels_changed,
            "of labels",
            0.005,
            f"{torchvision}; {trained}",
        ),
        at_most(
            "view_confidence_change",
            views.mean_confidence_change,
            "mean absolute difference",
            0.005,
            f"{torchvision}; {trained}",
        ),
        at_most("bf16_rows_moved", bf16.rows_moved, "of rows", 0.01, at_thresholds),
        at_most("bf16_labels_changed", bf16.labels_changed, "of labels", 0.01, at_thresholds),
        at_most(
            "bf16_largest_distance",
            bf16.largest_distance,
            "from the threshold",
            0.02,
            at_thresholds,
        ),
    ]


if __name__ == "__main__":
    main()
