"""Images that a selection kept and rejected, as thumbnails: the look that tables cannot give."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.corpus import (
    Corpus,
    MissingShard,
    Shard,
    load_corpus,
    load_locations,
    read_samples,
)
from storage.manifest import read_manifest, read_stored
from storage.predictions import read_predictions, read_record
from storage.samples import CorruptShard, sample_key
from storage.selections import Reason, from_parquet
from storage.store import Store
from tasks.distributions import Calibration
from tasks.images import BadImage, decode_image
from tasks.report_facts import RoundSelection
from tasks.report_formats import words
from tasks.specifications import folder_of

MAX_ROUNDS = 3
MAX_SHARDS = 4
MAX_BYTES = 256 * 2**20
IMAGES_PER_GROUP = 8
THUMBNAIL_PIXELS = 128


@dataclass(frozen=True)
class GalleryImage:
    """One sample as the report shows it.

    Attributes:
        key: sample key.
        predicted: name of the class with the largest probability.
        confidence: calibrated, in [0, 1].
        truth: name of the true class; None where unknown.
        before: name of the class in the round before, where the image is shown because that was
            another; else None.
        source: the thumbnail as a data URI; None where the image could not be read.
        is_tiny: fewer pixels than are shown, so they are drawn as squares.
    """

    key: str
    predicted: str
    confidence: float
    truth: str | None
    before: str | None = None
    source: str | None = None
    is_tiny: bool = False

    @property
    def is_right(self) -> bool | None:
        """Whether the prediction is true; None where the truth is unknown."""
        return None if self.truth is None else self.truth == self.predicted


@dataclass(frozen=True)
class GalleryGroup:
    """Some samples that had the same fate, and how many there are in the shards looked at."""

    title: str
    images: tuple[GalleryImage, ...]
    num_found: int


@dataclass(frozen=True)
class Gallery:
    """What one round's selection kept and rejected in a few shards.

    Attributes:
        round_index: of the selection.
        groups: none where nothing could be read.
        shards: stems of the shards that were looked at.
        num_shards: of the whole corpus.
        problems: what could not be read, in words.
    """

    round_index: int
    groups: tuple[GalleryGroup, ...]
    shards: tuple[str, ...]
    num_shards: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Rows:
    """Selected and rejected samples of some shards, joined on their keys."""

    keys: NDArray[np.str_]
    reason: NDArray[np.int8]
    label: NDArray[np.int64]
    true_label: NDArray[np.int64]
    confidence: NDArray[np.float64]


def galleries(
    store: Store, selections: Sequence[RoundSelection], class_names: Sequence[str]
) -> list[Gallery]:
    """Return the galleries of the last rounds, from the same few shards in each.

    The choice is a function of content alone: shards in the order of their digests, which is as
    good as random, until 4 of them or 256 MiB are reached; samples by confidence, then key.
    """
    if not selections:
        return []
    labeling = read_manifest(store, _labeling_folder(selections[-1]))
    if labeling is None:
        return []
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
    shards = choose_shards(corpus.shards)
    # One round more than is shown: labels flip from the round before.
    rows = [_read_rows(store, one, shards) for one in selections[-MAX_ROUNDS - 1 :]]
    before = [None, *rows][-MAX_ROUNDS - 1 : -1]
    shown = zip(selections[-MAX_ROUNDS:], rows[-MAX_ROUNDS:], before, strict=True)
    found = [_gallery(*one, corpus, shards, class_names) for one in shown]
    thumbnails, problems = _thumbnails(store, corpus, _keys_by_stem(found, shards))
    return [_with_thumbnails(one, thumbnails, problems) for one in found]


def choose_shards(shards: Sequence[Shard]) -> list[Shard]:
    """Return at most 4 shards of at most 256 MiB together; the smallest if all are larger."""
    chosen: list[Shard] = []
    for shard in sorted(shards, key=lambda shard: shard.digest):
        if shard.num_samples and sum(s.num_bytes for s in chosen) + shard.num_bytes <= MAX_BYTES:
            chosen.append(shard)
        if len(chosen) == MAX_SHARDS:
            break
    return chosen or [min(shards, key=lambda shard: (shard.num_bytes, shard.digest))]


def thumbnail(data: bytes | memoryview, *, where: str) -> tuple[str, bool]:
    """Return an image file as the data URI of a small one, and whether it was small before.

    Raises: BadImage.
    """
    image = decode_image(data, where=where)
    is_tiny = max(image.size) <= THUMBNAIL_PIXELS // 2
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if is_tiny:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85)
    kind = "png" if is_tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_tiny


def _labeling_folder(selection: RoundSelection) -> str:
    return folder_of("label", selection.manifest.inputs["labeling"].fingerprint)


def _gallery(
    selection: RoundSelection,
    rows: _Rows | None,
    before: _Rows | None,
    corpus: Corpus,
    shards: Sequence[Shard],
    class_names: Sequence[str],
) -> Gallery:
    groups: list[GalleryGroup] = []
    problems: list[str] = []
    if rows is None:
        problems.append(f"the predictions of round {selection.round_index} are no longer stored")
    else:
        groups = [
            GalleryGroup(title, _images(rows, shown, class_names), num_found)
            for title, shown, num_found in _choices(rows)
            if shown
        ]
        flipped = None if before is None else _flipped(rows, before, class_names)
        groups += [flipped] if flipped is not None and flipped.images else []
    return Gallery(
        round_index=selection.round_index,
        groups=tuple(groups),
        shards=tuple(sorted(shard.stem for shard in shards)),
        num_shards=len(corpus.shards),
        problems=tuple(problems),
    )


def _read_rows(store: Store, selection: RoundSelection, shards: Sequence[Shard]) -> _Rows | None:
    """Join predictions and selection of some shards; None if predictions are gone."""
    labeling = read_manifest(store, _labeling_folder(selection))
    if labeling is None:
        return None
    calibration = Calibration.of_summary(selection.summary)
    parts: list[_Rows] = []
    for shard in shards:
        record = read_record(store, labeling.inputs["labeler"].fingerprint, shard.digest)
        if record is None:
            return None
        predictions = read_predictions(store, record)
        stored = selection.manifest.object(shard.digest)
        chosen = from_parquet(
            read_stored(store, stored),
            num_samples=predictions.num_samples,
            where=store.url_of(stored.path),
        )
        reasons = dict(zip(chosen.keys, chosen.reason.tolist(), strict=True))
        label, confidence = calibration.seen_by_threshold(predictions)
        parts.append(
            _Rows(
                keys=np.array([sample_key(shard.stem, key) for key in predictions.keys]),
                reason=np.array([reasons[key] for key in predictions.keys], dtype=np.int8),
                label=label.astype(np.int64),
                true_label=predictions.true_label.astype(np.int64),
                confidence=confidence.astype(np.float64),
            )
        )
    return _Rows(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("keys", "reason", "label", "true_label", "confidence")
        )
    )


def _choices(rows: _Rows) -> list[tuple[str, list[int], int]]:
    """Return each group's title, the rows to show, and of how many they are."""
    # Most confident first; equal ones by key.
    order = np.lexsort((rows.keys, -rows.confidence))
    kept = order[rows.reason[order] == Reason.KEPT].tolist()
    is_wrong = (rows.true_label >= 0) & (rows.label != rows.true_label)
    wrong = [row for row in kept if is_wrong[row]]
    # What is shown as most confident is not shown again as least confident.
    least = kept[IMAGES_PER_GROUP:][::-1]
    choices = [
        ("Kept, most confident", kept, len(kept)),
        ("Kept, least confident", least, len(kept)),
        ("Kept although wrong, most confident", wrong, len(wrong)),
    ]
    for reason in Reason:
        if reason != Reason.KEPT:
            rejected = order[rows.reason[order] == reason].tolist()
            title = f"Rejected: {words(reason.name.lower())}, most confident"
            choices.append((title, rejected, len(rejected)))
    return [(title, shown[:IMAGES_PER_GROUP], found) for title, shown, found in choices]


def _flipped(rows: _Rows, before: _Rows, class_names: Sequence[str]) -> GalleryGroup:
    """Return the samples whose label differs from that of the round before, by their keys."""
    labels = dict(zip(before.keys.tolist(), before.label.tolist(), strict=True))
    # A sample that could not be decoded is in neither round.
    old = np.array([labels.get(key, -1) for key in rows.keys.tolist()])
    order = np.lexsort((rows.keys, -rows.confidence))
    found = order[((old >= 0) & (old != rows.label))[order]].tolist()
    shown = found[:IMAGES_PER_GROUP]
    images = tuple(
        replace(image, before=class_names[int(old[row])])
        for image, row in zip(_images(rows, shown, class_names), shown, strict=True)
    )
    return GalleryGroup("Label flipped since the round before, most confident", images, len(found))


def _images(
    rows: _Rows, shown: Sequence[int], class_names: Sequence[str]
) -> tuple[GalleryImage, ...]:
    return tuple(
        GalleryImage(
            key=str(rows.keys[row]),
            predicted=class_names[int(rows.label[row])],
            confidence=float(rows.confidence[row]),
            truth=class_names[int(rows.true_label[row])] if rows.true_label[row] >= 0 else None,
        )
        for row in shown
    )


def _keys_by_stem(found: Sequence[Gallery], shards: Sequence[Shard]) -> dict[str, set[str]]:
    keys = {image.key for one in found for group in one.groups for image in group.images}
    return {
        shard.stem: {key for key in keys if key.startswith(f"{shard.stem}/")} for shard in shards
    }


def _thumbnails(
    store: Store, corpus: Corpus, keys_by_stem: dict[str, set[str]]
) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """Read each shard once; a shard or image that cannot be read is said, and shown as missing."""
    locations = load_locations(store, corpus.digest)
    thumbnails: dict[str, tuple[str, bool]] = {}
    problems: list[str] = []
    for stem, keys in keys_by_stem.items():
        try:
            samples = read_samples(corpus, locations, stem) if keys else []
        except (MissingShard, CorruptShard) as error:
            problems.append(str(error))
            continue
        for sample in samples:
            if sample.key in keys:
                try:
                    thumbnails[sample.key] = thumbnail(sample.image, where=sample.key)
                except BadImage as error:
                    problems.append(str(error))
    return thumbnails, problems


def _with_thumbnails(
    gallery: Gallery, thumbnails: dict[str, tuple[str, bool]], problems: Sequence[str]
) -> Gallery:
    def shown(image: GalleryImage) -> GalleryImage:
        source, is_tiny = thumbnails.get(image.key, (None, False))
        return replace(image, source=source, is_tiny=is_tiny)

    groups = tuple(
        replace(group, images=tuple(shown(image) for image in group.images))
        for group in gallery.groups
    )
    return replace(gallery, groups=groups, problems=(*gallery.problems, *problems))
