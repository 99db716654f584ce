"""From a set of images to labelled, dev, test and unlabelled shards, the same bytes each time."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from webdataset.writer import TarWriter

from storage import objects
from tasks.images import BadImage, decode_any_image, image_kind
from tasks.sources import SourceImage

SCHEMA = 1
SPLITS = ("labeled", "dev", "test", "unlabeled")
_OWNER = "selftrain"


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """What one split got. `pattern` is the shard pattern to give to `data index` or a config."""

    num_samples: int
    num_shards: int
    class_counts: dict[str, int]
    pattern: str | None


@dataclass(frozen=True, slots=True)
class ShardingSummary:
    """What `shard_dataset` wrote, also stored as `dataset.json`."""

    class_names: tuple[str, ...]
    splits: dict[str, SplitSummary]
    schema: int = SCHEMA


def shard_dataset(
    images: Sequence[SourceImage],
    out_url: str,
    *,
    labels_per_class: int | None = None,
    labels: int | None = None,
    dev: int,
    test: int | None = None,
    test_images: Sequence[SourceImage] | None = None,
    shard_size: int = 1000,
    seed: int = 0,
    balanced: bool = True,
    keep_truth: bool = True,
    class_names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardingSummary:
    """Split images and write `labeled/`, `dev/`, `test/` and `unlabeled/` shards below a URL.

    Samples are drawn, and ordered within a split, by a hash of (seed, path), so the order of
    listing does not matter: first the labelled ones, then dev, then test; the rest, and whatever
    has no label, is unlabelled. Image bytes are kept for JPEG, PNG and WebP, others become PNG.

    Args:
        images: with labels where known.
        out_url: a folder or fsspec URL. Nothing there is overwritten: an interrupted call can be
            repeated, another one needs a folder of its own.
        labels_per_class: labelled samples of each class; or
        labels: labelled samples in all: evenly over classes when `balanced`, else as found.
        dev: samples with labels for decisions, drawn evenly over classes when `balanced`.
        test: samples for the final report, drawn as found; with `test_images` from these, None
            meaning all of them.
        test_images: a separate test set.
        shard_size: samples per shard.
        seed: of the draws.
        balanced: see `labels` and `dev`.
        keep_truth: write the true label beside unlabelled images too; it serves diagnosis only.
        class_names: class numbers follow this order; by default the labels, sorted.
        progress: called with (samples written, samples in all).
    Raises: ValueError if a class, or the whole, has too few images, for labels that are not in
        class_names, and if the URL holds other shards. BadImage for what cannot be decoded.
    """
    if shard_size < 1:
        raise ValueError("shard_size must be at least 1")
    names, splits = draw_splits(
        images,
        labels_per_class=labels_per_class,
        labels=labels,
        dev=dev,
        test=test,
        test_images=test_images,
        seed=seed,
        balanced=balanced,
        class_names=class_names,
    )
    return _write(splits, out_url.rstrip("/"), names, shard_size, keep_truth, progress)


def draw_splits(
    images: Sequence[SourceImage],
    *,
    labels_per_class: int | None = None,
    labels: int | None = None,
    dev: int,
    test: int | None = None,
    test_images: Sequence[SourceImage] | None = None,
    seed: int = 0,
    balanced: bool = True,
    class_names: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], dict[str, list[SourceImage]]]:
    """Return the class names, and the images of every split, without reading or writing any.

    Arguments and errors are those of `shard_dataset`.
    """
    if (labels_per_class is None) == (labels is None):
        raise ValueError("give either labels_per_class or labels, not both")
    if min(labels_per_class or 0, labels or 0, dev, test or 0) < 0:
        raise ValueError("the sizes of splits must be at least 0")
    names = _class_names([*images, *(test_images or [])], class_names)
    pool = _Pool(images, names, seed)
    per_class = dict.fromkeys(names, labels_per_class or 0)
    if labels is not None and balanced:
        per_class = _even(labels, names, seed)
    splits: dict[str, list[SourceImage]] = {}
    if labels is not None and not balanced:
        splits["labeled"] = pool.take(labels, "labelled samples")
    else:
        splits["labeled"] = pool.take_per_class(per_class, "labelled samples")
    if balanced:
        splits["dev"] = pool.take_per_class(_even(dev, names, seed), "dev samples")
    else:
        splits["dev"] = pool.take(dev, "dev samples")
    if test_images is None:
        splits["test"] = pool.take(test or 0, "test samples")
    else:
        separate = _Pool(test_images, names, seed)
        size = separate.num_labeled if test is None else test
        splits["test"] = separate.take(size, "test samples")
    splits["unlabeled"] = pool.rest()
    return names, splits


class _Pool:
    """Images in the order of their hashes; what is taken is gone."""

    def __init__(self, images: Sequence[SourceImage], names: Sequence[str], seed: int) -> None:
        paths = Counter(image.path for image in images)
        path, times = paths.most_common(1)[0] if paths else ("", 0)
        if times > 1:
            raise ValueError(f"{times} images have the path {path!r}; each needs its own")
        self._names = names
        self._left = sorted(images, key=lambda image: (_hash(seed, image.path), image.path))

    @property
    def num_labeled(self) -> int:
        return sum(image.label is not None for image in self._left)

    def take(self, size: int, what: str) -> list[SourceImage]:
        if size > self.num_labeled:
            raise ValueError(
                f"too few images: {size} {what} are asked for, {self.num_labeled} images with a "
                "label are left. Ask for fewer, or give more images"
            )
        labeled = (image for image in self._left if image.label is not None)
        return self._taken([image for image, _ in zip(labeled, range(size), strict=False)])

    def take_per_class(self, sizes: dict[str, int], what: str) -> list[SourceImage]:
        there = Counter(image.label for image in self._left)
        short = [name for name in self._names if there[name] < sizes[name]]
        if short:
            shown = ", ".join(f"{n!r} ({there[n]} left, {sizes[n]} needed)" for n in short[:5])
            raise ValueError(
                f"too few images for the {what} in {len(short)} of {len(self._names)} classes: "
                f"{shown}. Ask for fewer, give more images, or draw them as found (balanced=False)"
            )
        left = dict(sizes)
        taken: list[SourceImage] = []
        for image in self._left:
            if image.label is not None and left[image.label] > 0:
                left[image.label] -= 1
                taken.append(image)
        return self._taken(taken)

    def rest(self) -> list[SourceImage]:
        return self._taken(list(self._left))

    def _taken(self, taken: list[SourceImage]) -> list[SourceImage]:
        gone = {image.path for image in taken}
        self._left = [image for image in self._left if image.path not in gone]
        return taken


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()


def _even(size: int, names: Sequence[str], seed: int) -> dict[str, int]:
    """Spread a number evenly over the classes; the remainder goes to classes drawn by hash."""
    each, remainder = divmod(size, len(names))
    drawn = sorted(names, key=lambda name: _hash(seed, f"class\0{name}"))[:remainder]
    return {name: each + (name in drawn) for name in names}


def _class_names(images: Iterable[SourceImage], given: Sequence[str] | None) -> tuple[str, ...]:
    found = {image.label for image in images if image.label is not None}
    names = tuple(sorted(found) if given is None else given)
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"class names must be unique and at least one, not {list(names)}")
    if unknown := sorted(found - set(names)):
        raise ValueError(f"{len(unknown)} labels are not in class_names, such as {unknown[0]!r}")
    return names


def _write(
    splits: dict[str, list[SourceImage]],
    out_url: str,
    names: tuple[str, ...],
    shard_size: int,
    keep_truth: bool,
    progress: Callable[[int, int], None] | None,
) -> ShardingSummary:
    starts = {split: range(0, len(splits[split]), shard_size) for split in SPLITS}
    expected = {
        f"{split}/{_shard_name(split, i)}" for split in SPLITS for i in range(len(starts[split]))
    }
    there = {name for name in objects.list_objects(out_url) if name.endswith(".tar")}
    if others := sorted(there - expected):
        raise ValueError(
            f"{out_url} holds {len(others)} shards of another data set, such as {others[0]}: "
            "choose an empty folder, or delete them"
        )
    num_done, num_all = 0, sum(len(chosen) for chosen in splits.values())
    classes = json.dumps({"schema": SCHEMA, "class_names": list(names)}, ensure_ascii=False)
    summaries: dict[str, SplitSummary] = {}
    for split in SPLITS:
        chosen, folder = splits[split], objects.join_url(out_url, split)
        for i, start in enumerate(starts[split]):
            part = chosen[start : start + shard_size]
            data = _shard_bytes(part, start, names, with_labels=split != "unlabeled" or keep_truth)
            _write_once(out_url, f"{split}/{_shard_name(split, i)}", data, there)
            num_done += len(part)
            if progress is not None:
                progress(num_done, num_all)
        _write_text(objects.join_url(folder, "classes.json"), classes)
        _write_text(objects.join_url(folder, "sources.csv"), _sources(chosen))
        counts = Counter(image.label for image in chosen)
        summaries[split] = SplitSummary(
            num_samples=len(chosen),
            num_shards=len(starts[split]),
            class_counts={name: counts[name] for name in names},
            pattern=_pattern(folder, split, len(starts[split])),
        )
    summary = ShardingSummary(names, summaries)
    _write_text(objects.join_url(out_url, "dataset.json"), json.dumps(asdict(summary), indent=1))
    return summary


def _write_once(out_url: str, name: str, data: bytes, there: set[str]) -> None:
    url = objects.join_url(out_url, name)
    if name not in there:
        objects.write_object(url, data)
    elif objects.read_object(url) != data:
        raise ValueError(
            f"{url} is there with other samples: {out_url} holds another data set. Choose an empty "
            "folder, or delete that one"
        )


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:06d}.tar"


def _pattern(folder: str, split: str, num_shards: int) -> str | None:
    if num_shards == 0:
        return None
    if num_shards == 1:
        return objects.join_url(folder, _shard_name(split, 0))
    return objects.join_url(folder, f"{split}-{{000000..{num_shards - 1:06d}}}.tar")


def _key(position: int) -> str:
    return f"{position:08d}"


def _shard_bytes(
    images: Sequence[SourceImage], start: int, names: tuple[str, ...], *, with_labels: bool
) -> bytes:
    numbers = {name: number for number, name in enumerate(names)}
    buffer = io.BytesIO()
    with TarWriter(
        buffer, user=_OWNER, group=_OWNER, mode=0o444, mtime=0, encoder=False, compress=False
    ) as writer:
        for position, image in enumerate(images, start=start):
            data, extension = _shard_image(image)
            sample: dict[str, str | bytes] = {"__key__": _key(position), extension: data}
            if with_labels and image.label is not None:
                sample["cls"] = str(numbers[image.label]).encode()
            writer.write(sample)
    return buffer.getvalue()


def _shard_image(image: SourceImage) -> tuple[bytes, str]:
    data = image.load()
    if (kind := image_kind(data)) is not None:
        return data, kind
    buffer = io.BytesIO()
    try:
        decoded = decode_any_image(data, where=image.path)
    except BadImage as error:
        # Without it other images are drawn, which the shards that are there do not hold.
        raise BadImage(
            f"{error}. Repair it; or remove it, and the shards that were written by now"
        ) from error
    decoded.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _sources(images: Sequence[SourceImage]) -> str:
    """Return which image became which sample: the only place that remembers paths."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "path"])
    writer.writerows([_key(position), image.path] for position, image in enumerate(images))
    return text.getvalue()


def _write_text(url: str, text: str) -> None:
    objects.write_object(url, text.encode("utf-8"), "replace")
