"""Guard against leaks: find images of the unlabelled corpus that are copies of dev or test images.

The one stage beside `test` that opens the test split: it looks at the images, never at a label.
Whatever it finds is dropped from every selection, before anything is counted.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.leak_guard_config import NearDuplicatesConfig
from models.near_duplicates import (
    NUM_COEFFICIENTS,
    THUMBNAIL_SIZE,
    References,
    describe,
    find_near_duplicates,
)
from storage.addresses import canonical_json, fingerprint, settings_of
from storage.corpus import (
    Corpus,
    Locations,
    Shard,
    cached_corpus,
    load_corpus,
    load_locations,
    read_samples,
)
from storage.descriptors import SCHEMA_VERSION as DESCRIPTORS_SCHEMA
from storage.descriptors import (
    Descriptors,
    read_descriptors,
    write_descriptors,
)
from storage.descriptors import read_record as read_descriptor_record
from storage.manifest import (
    InputReference,
    Manifest,
    commit_manifest,
    create_record,
    put_object,
    read_record,
    read_stored,
)
from storage.samples import RawSample, in_shard_key
from storage.store import Store
from tasks import provenance
from tasks.images import CONVERSION, BadImage, decode_image, largest_reduction
from tasks.shard_items import BadSampleBudget
from tasks.shard_records import read_of_each
from tasks.specifications import Specification

VERSION = 1
DESCRIPTOR_VERSION = 1
RECORD_SCHEMA = 1
SPLITS = ("dev", "test")
BYTES_PER_DESCRIPTOR = 2 * NUM_COEFFICIENTS + 20
"""About: half floats and a key; for estimates."""


class GuardStopped(Exception):
    """A guard was asked to stop; every shard that was searched is recorded."""


@dataclass(frozen=True)
class Leak:
    """An image of the corpus that is a copy of one of a split.

    Attributes:
        key: in its shard.
        split: dev or test.
        of: sample key of the most similar image of the splits.
        similarity: at least the threshold, at most 1.
    """

    key: str
    split: str
    of: str
    similarity: float


@dataclass(frozen=True)
class SplitImages:
    """The images of dev and test that copies are looked for of.

    Attributes:
        references: what they look like.
        splits: (R,) dev or test.
        keys: (R,) sample keys.
    """

    references: References
    splits: NDArray[np.str_]
    keys: NDArray[np.str_]


def descriptor_fingerprint() -> str:
    """Return the address of how images are described, which is the same for every run."""
    settings = {
        "conversion": CONVERSION,
        "thumbnail_size": THUMBNAIL_SIZE,
        "descriptors_schema": DESCRIPTORS_SCHEMA,
    }
    return fingerprint("descriptor", DESCRIPTOR_VERSION, settings, {})


def specify(
    config: NearDuplicatesConfig, *, corpus: str, dev: str, test: str | None
) -> Specification:
    """Return the specification of a leak guard.

    Args:
        config: what counts as a copy.
        corpus: digest of the unlabelled corpus.
        dev: digest of the dev split.
        test: digest of the test split, None where there is none.
    """
    inputs = {"descriptor": descriptor_fingerprint(), "corpus": corpus, "dev": dev}
    if test is not None:
        inputs["test"] = test
    return Specification("guard", VERSION, {"leak_guard": settings_of(config)}, inputs)


def read_split_images(
    store: Store, specification: Specification, *, max_bad_samples: int
) -> SplitImages:
    """Read the images of dev and test; raises as `read_samples`, and TooManyBadSamples."""
    thumbnails: list[NDArray[np.uint8]] = []
    splits: list[str] = []
    keys: list[str] = []
    for split in SPLITS:
        digest = specification.inputs.get(split)
        if digest is None:
            continue
        corpus, locations = load_corpus(store, digest), load_locations(store, digest)
        for shard in corpus.shards:
            budget = BadSampleBudget(shard.stem, max_bad_samples)
            found, pixels = _thumbnails(read_samples(corpus, locations, shard.stem), budget)
            thumbnails.append(pixels)
            keys += found
            splits += [split] * len(found)
    references = References.of(np.concatenate(thumbnails))
    return SplitImages(references, np.array(splits), np.array(keys))


def shards_to_search(store: Store, specification: Specification) -> list[Shard]:
    """Return the shards that this guard has no record of, in the corpus's order."""
    return [shard for shard, record in _records(store, specification) if record is None]


def search_shards(
    store: Store,
    specification: Specification,
    stems: Sequence[str],
    images: SplitImages,
    *,
    max_bad_samples: int,
) -> Iterator[int]:
    """Search shards one by one and yield the number of samples of each once it is recorded.

    Shards that are recorded already are passed over, and those that were described before, for
    another corpus, split or threshold, are not opened.

    Raises: TooManyBadSamples, MissingShard, CorruptShard.
    """
    corpus = cached_corpus(store, specification.inputs["corpus"])
    locations = load_locations(store, corpus.digest)
    threshold = specification.settings["leak_guard"]["threshold"]
    for stem in stems:
        shard = corpus.shard(stem)
        path = specification.record_path(shard.digest)
        if read_record(store, path) is None:
            described = _described(store, corpus, locations, shard, max_bad_samples)
            found = find_near_duplicates(described.values, images.references, threshold=threshold)
            leaks = [
                Leak(
                    described.keys[row],
                    str(images.splits[reference]),
                    str(images.keys[reference]),
                    round(float(similarity), 4),
                )
                for row, reference, similarity in zip(
                    found.rows, found.references, found.similarities, strict=True
                )
            ]
            body = {
                "schema": RECORD_SCHEMA,
                "stem": stem,
                "num_samples": len(described.keys),
                "leaks": [asdict(leak) for leak in leaks],
            }
            create_record(store, path, body)
        yield shard.num_samples


def finish(store: Store, specification: Specification, *, seconds: float) -> Manifest:
    """Commit a guard once every shard of the corpus is searched."""
    records = _records(store, specification)
    missing = [shard.stem for shard, record in records if record is None]
    if missing:
        raise ValueError(
            f"leak guard {specification.fingerprint[:12]}: {len(missing)} of {len(records)} shards"
            f" are not searched, first {missing[0]}; run it again to search them"
        )
    leaks = {shard.stem: record["leaks"] for shard, record in records if record["leaks"]}
    body = {"schema": RECORD_SCHEMA, "leaks": leaks}
    stored = put_object(
        store, specification.folder, "leaks", canonical_json(body), "json", crash_kind="guard"
    )
    of_splits = [leak["split"] for some in leaks.values() for leak in some]
    manifest = Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs={role: InputReference(fp, fp) for role, fp in specification.inputs.items()},
        objects=(stored,),
        counts={
            "samples": sum(shard.num_samples for shard, _ in records),
            "searched": sum(record["num_samples"] for _, record in records),
            "leaked": len(of_splits),
            **{f"leaked_from_{split}": of_splits.count(split) for split in SPLITS},
        },
    )
    provenance.record(store, specification.folder, seconds=seconds, device=None)
    return commit_manifest(store, specification.folder, manifest)


def read_leaks(store: Store, manifest: Manifest) -> dict[str, tuple[Leak, ...]]:
    """Return what a finished guard found, by the stem of the shard; shards without are left out."""
    body = json.loads(read_stored(store, manifest.object("leaks")))
    return {stem: tuple(Leak(**leak) for leak in leaks) for stem, leaks in body["leaks"].items()}


def thumbnail(data: bytes | memoryview, *, where: str) -> NDArray[np.uint8]:
    """Return the (32, 32, 3) thumbnail of an image file; JPEGs are decoded at a part of their size.

    Raises: BadImage.
    """

    def reduction(width: int, height: int) -> int:
        return largest_reduction(width, height, 2 * THUMBNAIL_SIZE)

    image = decode_image(data, where=where, reduction=reduction)
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    return np.asarray(image.resize(size, Image.Resampling.BOX))


def _described(
    store: Store, corpus: Corpus, locations: Locations, shard: Shard, max_bad_samples: int
) -> Descriptors:
    """Return the descriptors of a shard out of the store, where they are put if they are not."""
    descriptor = descriptor_fingerprint()
    record = read_descriptor_record(store, descriptor, shard.digest)
    if record is None:
        budget = BadSampleBudget(shard.stem, max_bad_samples)
        keys, pixels = _thumbnails(read_samples(corpus, locations, shard.stem), budget)
        described = Descriptors(
            tuple(in_shard_key(key, shard.stem) for key in keys),
            describe(pixels).astype(np.float16),
        )
        bad = {in_shard_key(key, shard.stem): reason for key, reason in budget.reasons.items()}
        record = write_descriptors(store, descriptor, shard.digest, described, bad_samples=bad)
    return read_descriptors(store, record)


def _thumbnails(
    samples: Sequence[RawSample], budget: BadSampleBudget
) -> tuple[list[str], NDArray[np.uint8]]:
    """Return keys and (N, 32, 32, 3) thumbnails of the images that can be decoded."""

    def decoded(sample: RawSample) -> NDArray[np.uint8] | BadImage:
        try:
            return thumbnail(sample.image, where=sample.key)
        except BadImage as error:
            return error

    keys: list[str] = []
    pixels = np.empty((len(samples), THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), np.uint8)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for sample, found in zip(samples, pool.map(decoded, samples), strict=True):
            if isinstance(found, BadImage):
                budget.spend(sample.key, found)
            else:
                pixels[len(keys)] = found
                keys.append(sample.key)
    return keys, pixels[: len(keys)]


def _records(store: Store, specification: Specification) -> list[tuple[Shard, Any]]:
    """Return every shard of the corpus with its record, None where it is not searched yet."""
    corpus = load_corpus(store, specification.inputs["corpus"])
    return read_of_each(
        corpus.shards, lambda shard: read_record(store, specification.record_path(shard.digest))
    )
