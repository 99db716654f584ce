"""Shards of a user's images: labels are drawn into a labelled corpus, dev and maybe test.

What has no label is the corpus that teachers label.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.loading import ConfigError
from flows.machine import free_bytes
from tasks.image_sizes import look_at, spread
from tasks.progress import Progress, report
from tasks.sharding import draw_splits, shard_dataset
from tasks.sources import (
    ARCHIVE_SUFFIXES,
    SPLIT_NAMES,
    SourceImage,
    read_image_folder,
    read_source,
)

HELD_OUT_FRACTION = 0.2
MAX_DEV, MAX_TEST = 1000, 2000
MIN_LABELS_FOR_TEST = 500
"""Below it a test split would take labels that the teacher needs more."""

_MAX_SEEDS = 100


@dataclass(frozen=True)
class Hints:
    """What the user says about the data beside naming it.

    Attributes:
        labels: labelled images or shards; then the source is unlabelled.
        dev: shards of the dev split.
        test: shards of the test split.
        labels_per_class: labels to use of each class; the other images count as unlabelled.
    """

    labels: str | None = None
    dev: str | None = None
    test: str | None = None
    labels_per_class: int | None = None


@dataclass(frozen=True)
class Located:
    """Where the splits of a run lie, before they are indexed.

    Attributes:
        root: put before the patterns; empty: nothing.
        patterns: split -> what to write into the config.
        made_by: how the shards were made of images; None if they were there.
    """

    root: str
    patterns: Mapping[str, str]
    made_by: str | None = None


def is_images(source: str) -> bool:
    """Return whether a source holds images, and not shards of them."""
    lower = source.lower()
    if lower.endswith((".csv", ".parquet", *(s for s in ARCHIVE_SUFFIXES if s != ".tar"))):
        return True
    if not os.path.isdir(source):
        return False
    return not any(
        name.lower().endswith(".tar") for _, _, names in os.walk(source) for name in names
    )


def shard_images(
    source: str, hints: Hints, shards: str, *, unlabeled: str | None = None
) -> Located:
    """Make shards of images and return where they lie.

    Args:
        source: a folder, a table or an archive of images.
        hints: what the user says beside.
        shards: folder or URL for the shards; interrupted, the same call goes on.
        unlabeled: shards to label, where they are there already.
    Raises: ConfigError for what cannot become a run, with what to do.
    """
    if hints.dev is not None or hints.test is not None:
        raise ConfigError(
            "--dev and --test name shards, and dev and test are drawn from labelled images here:"
            " leave them out, or make all shards with `selftrain data shard` first"
        )
    images, test_images = _read_images(source, hints.labels)
    labeled = [image for image in images if image.label is not None]
    counts = Counter(str(image.label) for image in labeled)
    if len(counts) < 2:
        raise ConfigError(
            f"{hints.labels or source}: images of {len(counts)} classes; at least 2 are needed. Put"
            " labelled images into one folder for each class, or give a table of path,label"
        )
    has_rest = unlabeled is not None or len(labeled) < len(images)
    if not has_rest and hints.labels_per_class is None:
        raise ConfigError(
            f"{source}: all {len(images):,} images have a label, so there is nothing to label. Put"
            " unlabelled images directly into the folder; or name them as the source and these with"
            " --labels; or, to try the method, use some labels only: --labels-per-class"
            f" {max(1, min(counts.values()) // 5)}"
        )
    sizes = _split_sizes(counts, hints.labels_per_class, has_test=test_images is not None)
    seed = _seed_with_all_classes(labeled, sizes)
    looked_at = look_at(image.load() for image in spread(images))
    _refuse_without_room(shards, looked_at.mean_bytes * len(images))
    summary = shard_dataset(
        images,
        shards,
        **sizes,
        test_images=test_images,
        seed=seed,
        progress=lambda done, total: report(Progress("shard", done, total, "images")),
    )
    patterns = {split: split for split, of in summary.splits.items() if of.num_shards}
    if unlabeled is not None:
        patterns.pop("unlabeled", None)
    drawn = " + ".join(
        f"{of.num_samples:,} {split}" for split, of in summary.splits.items() if of.num_samples
    )
    return Located(shards, patterns, f"{drawn} images of {source}, drawn with seed {seed}")


def _read_images(
    source: str, labels: str | None
) -> tuple[list[SourceImage], list[SourceImage] | None]:
    """Return all images, and those of a test set of its own where the source has one."""
    if labels is None:
        return _read_splits(source)
    if not is_images(labels):
        raise ConfigError(
            f"--labels {labels}: shards, but {source} holds images. Make shards of both, or give"
            " both as images"
        )
    labeled, test_images = _read_splits(labels)
    files = {file for image in labeled if (file := _file_of(labels, image)) is not None}
    rest = [
        SourceImage(f"unlabeled/{image.path}", None, image.load)
        for image in _read_splits(source)[0]
        # Seen as unlabelled, too, a dev image would be trained on.
        if (file := _file_of(source, image)) is None or file not in files
    ]
    named = [SourceImage(f"labels/{i.path}", i.label, i.load) for i in labeled]
    return [*named, *rest], test_images


def _read_splits(source: str) -> tuple[list[SourceImage], list[SourceImage] | None]:
    """Return the images of a source, of a tree of splits all but test, and those of test."""
    path = Path(source)
    folders = {p.name for p in path.iterdir() if p.is_dir()} if path.is_dir() else set[str]()
    visible = {name for name in folders if not name.startswith(".")}
    if not visible or not visible <= SPLIT_NAMES:
        return read_source(source), None
    images: list[SourceImage] = []
    for split in sorted(visible - {"test"}):
        of_split = read_image_folder(path, split=split)
        if split == "unlabeled":
            of_split = [SourceImage(image.path, None, image.load) for image in of_split]
        images += of_split
    return images, read_image_folder(path, split="test") if "test" in visible else None


def _file_of(source: str, image: SourceImage) -> str | None:
    """Return the file on this machine that an image is; None for a member of an archive."""
    if "://" in image.path or "://" in source:
        return None
    if os.path.isdir(source):
        return os.path.realpath(os.path.join(source, image.path))
    if source.lower().endswith((".csv", ".parquet")):
        return os.path.realpath(os.path.join(os.path.dirname(source), image.path))
    return None


def _split_sizes(
    counts: Mapping[str, int], labels_per_class: int | None, *, has_test: bool
) -> dict[str, Any]:
    """Return how many labels go where, as `shard_dataset` takes them."""
    if labels_per_class is not None:
        left = min(counts.values()) - labels_per_class
        each = min(int(HELD_OUT_FRACTION * left), MAX_DEV // len(counts))
        if each < 1:
            raise ConfigError(
                f"--labels-per-class {labels_per_class}: the smallest class has"
                f" {min(counts.values())} images, which leaves too few for dev and for the corpus."
                " Ask for fewer"
            )
        held_out = each * len(counts)
        test = None if has_test else held_out
        return {"labels_per_class": labels_per_class, "dev": held_out, "test": test}
    total = sum(counts.values())
    dev = max(1, min(MAX_DEV, int(HELD_OUT_FRACTION * total)))
    test = 0
    if not has_test and total >= MIN_LABELS_FOR_TEST:
        test = min(MAX_TEST, int(HELD_OUT_FRACTION * total))
    return {
        "labels": total - dev - test,
        "dev": dev,
        "test": None if has_test else test,
        "balanced": False,  # a real data set's dev split has the classes as they come
    }


def _seed_with_all_classes(labeled: Sequence[SourceImage], sizes: Mapping[str, Any]) -> int:
    """Return the first seed by which the labelled corpus gets an image of every class."""
    classes = {image.label for image in labeled}
    for seed in range(_MAX_SEEDS):
        sizes_here = {**sizes, "test": sizes["test"] or 0}
        _, splits = draw_splits(labeled, **sizes_here, seed=seed)
        if {image.label for image in splits["labeled"]} == classes:
            return seed
    raise ConfigError(
        f"{len(labeled)} labelled images of {len(classes)} classes cannot be split into labels and"
        " dev so that a teacher sees every class: label more images of the rare classes"
    )


def _refuse_without_room(shards: str, num_bytes: int) -> None:
    free = free_bytes(shards)
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"the shards take about {num_bytes:,} bytes, and {shards} has {free:,} free: give"
            " another folder or a URL with --shards"
        )
