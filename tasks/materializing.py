"""Compact shards that hold a selection's images only, for trainings that read few of many.

There is one for each shard with selected samples, in the selection's order, so a training reads the
same items at the same positions, and only fewer bytes.
"""

import io
import logging
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from storage.corpus import load_corpus
from storage.manifest import (
    InputReference,
    Manifest,
    StoredObject,
    commit_manifest,
    put_object,
)
from storage.samples import RawSample, in_shard_key, sample_key
from storage.shard_cache import ShardCache
from storage.store import Store
from tasks.batches import CACHE_BYTES
from tasks.shard_openers import ShardReader, bytes_of_targets, read_chosen
from tasks.specifications import Specification, read_result
from tasks.training_orders import TrainingOrder

VERSION = 1
KIND = "materialize"

LARGEST_SHARE = 0.25
"""Share of a corpus's samples up to which `auto` writes compact shards.

Measured by benchmarks/materializing.py on a local disk (2 cores, 22 MB shards, --quick, seed 0): at
a share of 0.05 they pay from pass 1.7 over the selection on, at 0.25 from pass 2.2 to 2.9, at 0.5
from pass 4.3 to 5.0; where shards come over a network, earlier.
"""
FEWEST_EPOCHS = 3.0

_READERS = 4

_log = logging.getLogger(__name__)


def specify(selection: str) -> Specification:
    """Return the specification of the compact shards of a selection, given its fingerprint."""
    return Specification(KIND, VERSION, {}, {"selection": selection})


def find_compact(store: Store, selection: str) -> Manifest | None:
    """Return the manifest of a selection's compact shards, None where there are none."""
    return specify(selection).result(store)


def materialize(
    store: Store, selection: Manifest, labeling: Manifest, *, cache: ShardCache | None
) -> Manifest:
    """Write the compact shards of a selection, and their manifest last.

    What a killed attempt wrote is written again: names hold the contents' checksum.
    """
    specification = specify(selection.fingerprint)
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
    reader = ShardReader.of(store, corpus, cache)
    write = partial(_write_compact, store, specification, selection, labeling, reader)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="materialize") as pool:
        written = [one for one in pool.map(write, range(len(corpus.shards))) if one is not None]
    manifest = Manifest(
        kind=KIND,
        fingerprint=specification.fingerprint,
        stage_version=VERSION,
        settings=specification.settings,
        inputs={"selection": InputReference(selection.fingerprint, selection.sha256)},
        objects=tuple(written),
        counts={
            "samples": selection.counts["unique"],
            "bytes": sum(stored.size for stored in written),
            "corpus_bytes": corpus.num_bytes,
        },
    )
    return commit_manifest(store, specification.folder, manifest)


def materialize_if_useful(store: Store, order: TrainingOrder) -> Manifest | None:
    """Write the compact shards of the selection that a training reads, if its order says so.

    `auto` writes them for a corpus that fits neither memory nor the node's cache, of which at most
    `LARGEST_SHARE` is selected, and which is read at least `FEWEST_EPOCHS` times.

    Returns: their manifest, also if they were there; None where none are to be.
    """
    fingerprint = order.specification.inputs.get("selection")
    choice, cache = order.loading.materialize, order.loading.cache
    if fingerprint is None or choice == "never":
        return None
    there = find_compact(store, fingerprint)
    if there is not None:
        return there
    selection = read_result(store, "select", fingerprint)
    assert selection is not None, "the graph trains after the selection"
    labeling = read_result(store, "label", selection.inputs["labeling"].fingerprint)
    assert labeling is not None, "a finished selection has a finished labelling"
    if choice == "auto" and not _is_useful(store, order, selection, labeling):
        return None
    found = materialize(
        store, selection, labeling, cache=None if cache is None else ShardCache(cache)
    )
    _log.info(
        "%d selected samples lie in compact shards of %d bytes; the corpus has %d",
        found.counts["samples"],
        found.counts["bytes"],
        found.counts["corpus_bytes"],
    )
    return found


def _is_useful(store: Store, order: TrainingOrder, selection: Manifest, labeling: Manifest) -> bool:
    num_bytes = load_corpus(store, labeling.inputs["corpus"].fingerprint).num_bytes
    cache, config = order.loading.cache, order.config
    num_classes = len(order.specification.settings["class_names"])
    own_bytes = num_bytes + sum(bytes_of_targets(selection, num_classes).values())
    if own_bytes <= CACHE_BYTES or (cache is not None and num_bytes <= cache.max_bytes):
        return False
    labeled = load_corpus(store, order.specification.inputs["labeled"])
    steps = config.duration.to_steps(config.batch_size, labeled.num_samples)
    num_read = steps * config.batch_size * config.unlabeled_ratio
    epochs = num_read / sum(selection.counts["items"].values())
    share = selection.counts["unique"] / selection.counts["samples"]
    return share <= LARGEST_SHARE and epochs >= FEWEST_EPOCHS


def _write_compact(
    store: Store,
    specification: Specification,
    selection: Manifest,
    labeling: Manifest,
    reader: ShardReader,
    index: int,
) -> StoredObject | None:
    shard = reader.corpus.shards[index]
    if selection.counts["items"][shard.stem] == 0:
        return None
    chosen = read_chosen(store, selection, labeling, shard)
    by_key = {sample.key: sample for sample in reader.samples(index)[0]}
    keys = [sample_key(shard.stem, chosen.keys[int(row)]) for row in np.flatnonzero(chosen.kept)]
    data = compact_shard([by_key[key] for key in keys], shard.stem)
    return put_object(store, specification.folder, shard.digest, data, "tar", crash_kind=KIND)


def compact_shard(samples: Sequence[RawSample], stem: str) -> bytes:
    """Return a tar of the samples' images under their keys; the same samples, the same bytes."""
    buffer = io.BytesIO()
    # Keys are UTF-8 in every shard, whatever the locale of who writes this one.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for sample in samples:
            member = f"{in_shard_key(sample.key, stem)}.{sample.image_extension}"
            info = tarfile.TarInfo(member)
            info.size = len(sample.image)
            tar.addfile(info, io.BytesIO(sample.image))
    return buffer.getvalue()
