"""How a stream's shards are opened: which samples of one are its items, and their targets."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.randomness import hash_keys
from storage.corpus import Corpus, Locations, Shard, load_locations, read_samples
from storage.manifest import Manifest, StoredObject, read_stored
from storage.predictions import prediction_record, read_columns
from storage.samples import RawSample, iterate_samples, sample_key
from storage.selections import Selection, from_parquet
from storage.shard_cache import CacheTooSmall, ShardCache
from storage.store import Store
from tasks.shard_items import BadSampleBudget, OpenShard, ShardItems, Targets
from tasks.sparse_targets import SparseTargets, target_bytes

_log = logging.getLogger(__name__)

BudgetOf = Callable[[str], BadSampleBudget]
"""The budget of the shard with that stem."""

_COPIED_SHARE = 0.5
"""Selected images are copied out of a shard, which is let go, if they are less of it than this."""


@dataclass(frozen=True)
class ShardReader:
    """Reads the shards of one corpus, checked.

    Attributes:
        corpus: what they must be.
        locations: where they lie.
        cache: of the node, where there is one.
    """

    corpus: Corpus
    locations: Locations
    cache: ShardCache | None

    @classmethod
    def of(cls, store: Store, corpus: Corpus, cache: ShardCache | None) -> "ShardReader":
        """Return the reader of a corpus whose locations the store knows."""
        return cls(corpus, load_locations(store, corpus.digest), cache)

    def samples(self, index: int) -> tuple[list[RawSample], bool]:
        """Return the samples of a shard, in its order, and whether its file is mapped."""
        shard = self.corpus.shards[index]
        if self.cache is not None:
            try:
                mapped = read_samples(self.corpus, self.locations, shard.stem, cache=self.cache)
            except CacheTooSmall as error:
                _warn_of_full_cache(shard.stem, error)
            else:
                return mapped, True
        return read_samples(self.corpus, self.locations, shard.stem), False

    def compact_samples(
        self, store: Store, stored: StoredObject, stem: str, num_samples: int
    ) -> tuple[list[RawSample], bool]:
        """Return the samples of a compact shard of the store in the place of a whole one."""

        def fetch() -> bytes:
            return read_stored(store, stored)

        data, is_mapped = None, self.cache is not None
        if self.cache is not None:
            try:
                data = self.cache.read(stored.sha256, stored.size, fetch)
            except CacheTooSmall as error:
                _warn_of_full_cache(stem, error)
                is_mapped = False
        if data is None:
            data = memoryview(fetch())
        return iterate_samples(data, stem=stem, num_samples=num_samples), is_mapped


def _warn_of_full_cache(stem: str, error: CacheTooSmall) -> None:
    # Other trainings of the node may use it whole: slower is better than stopped.
    _log.warning("shard %s is read past the cache: %s", stem, error)


def labeled_opener(
    reader: ShardReader, class_names: tuple[str, ...], budget_of: BudgetOf
) -> OpenShard:
    """Open shards whose every sample is an item with the label of its .cls member."""
    corpus = reader.corpus
    assert corpus.class_names is not None, "splits are checked when the run is opened"
    positions = {name: position for position, name in enumerate(class_names)}
    to_run = [positions[name] for name in corpus.class_names]

    def open_shard(index: int) -> ShardItems:
        samples, is_mapped = reader.samples(index)
        labels = [_label(sample) for sample in samples]
        targets = Targets(labels=np.array([to_run[label] for label in labels], np.int64))
        return _every_sample(reader.corpus.shards[index], samples, is_mapped, targets, budget_of)

    return open_shard


def unlabeled_opener(reader: ShardReader, budget_of: BudgetOf) -> OpenShard:
    """Open shards whose every sample is an item without target."""

    def open_shard(index: int) -> ShardItems:
        return _every_sample(
            reader.corpus.shards[index], *reader.samples(index), Targets(), budget_of
        )

    return open_shard


def _every_sample(
    shard: Shard, samples: list[RawSample], is_mapped: bool, targets: Targets, budget_of: BudgetOf
) -> ShardItems:
    return ShardItems(
        samples,
        sample_of=np.arange(len(samples)),
        copies=np.zeros(len(samples), np.int64),
        key_hashes=hash_keys([s.key for s in samples]).view(np.int64),
        targets=targets,
        budget=budget_of(shard.stem),
        num_bytes=shard.num_bytes,
        is_mapped=is_mapped,
    )


def _label(sample: RawSample) -> int:
    if sample.label is None:
        raise ValueError(f"{sample.key}: no .cls member, but training data must be labelled")
    return sample.label


@dataclass(frozen=True)
class SelectedData:
    """A finished selection and what it was made from.

    Attributes:
        store: that holds it.
        selection: its manifest.
        labeling: manifest of the labelling.
        num_classes: C of the targets.
        with_confidences: whether the labeller's confidences are read, too.
        compact: manifest of shards that hold the selected images only, where there are such.
    """

    store: Store
    selection: Manifest
    labeling: Manifest
    num_classes: int
    with_confidences: bool
    compact: Manifest | None = None

    def shard_bytes(self, corpus: Corpus) -> list[int]:
        """Return the bytes of what is read in the place of each shard."""
        if self.compact is None:
            return [shard.num_bytes for shard in corpus.shards]
        sizes = {stored.name: stored.size for stored in self.compact.objects}
        return [sizes.get(shard.digest, 0) for shard in corpus.shards]

    def target_bytes(self, corpus: Corpus) -> list[int]:
        """Return the bytes of the targets of each shard's items, at the most."""
        found = bytes_of_targets(self.selection, self.num_classes)
        return [found[shard.stem] for shard in corpus.shards]


def bytes_of_targets(selection: Manifest, num_classes: int) -> dict[str, int]:
    """Return by stem what the targets of a selection's items hold in memory, at the most.

    A selection that was made before its listed probabilities were counted is taken to list all.
    """
    is_hard = selection.settings["selection"]["target"] == "hard"
    listed = selection.counts.get("listed_targets", {})
    return {
        stem: target_bytes(
            num_items=items,
            num_listed=listed.get(stem, items * (1 if is_hard else num_classes)),
            num_classes=num_classes,
        )
        for stem, items in selection.counts["items"].items()
    }


def read_chosen(store: Store, selection: Manifest, labeling: Manifest, shard: Shard) -> Selection:
    """Return the selection of one shard."""
    stored = selection.object(shard.digest)
    return from_parquet(
        read_stored(store, stored),
        num_samples=labeling.counts["shards"][shard.stem]["num_samples"],
        where=store.url_of(stored.path),
    )


def selected_opener(reader: ShardReader, data: SelectedData, budget_of: BudgetOf) -> OpenShard:
    """Open shards whose items are the copies of the selected samples, joined on keys."""
    store, file_bytes = data.store, data.shard_bytes(reader.corpus)

    def open_shard(index: int) -> ShardItems:
        shard = reader.corpus.shards[index]
        chosen = read_chosen(store, data.selection, data.labeling, shard)
        kept = np.flatnonzero(chosen.kept)
        in_shard = [chosen.keys[int(row)] for row in kept]
        if data.compact is None:
            every, is_mapped = reader.samples(index)
        else:
            stored = data.compact.object(shard.digest)
            every, is_mapped = reader.compact_samples(store, stored, shard.stem, len(kept))
        by_key = {sample.key: sample for sample in every}
        samples = [by_key[sample_key(shard.stem, key)] for key in in_shard]
        num_bytes = sum(len(sample.image) for sample in samples)
        if is_mapped or num_bytes >= _COPIED_SHARE * file_bytes[index]:
            num_bytes = file_bytes[index]
        else:
            samples = [replace(s, image=memoryview(bytes(s.image))) for s in samples]
        confidences = None
        if data.with_confidences:
            confidences = _confidences(data, shard.digest, in_shard)
        copies = chosen.copies[kept].astype(np.int64)
        sample_of = np.repeat(np.arange(len(kept)), copies)
        return ShardItems(
            samples,
            sample_of=sample_of,
            copies=np.concatenate([np.arange(n) for n in copies] or [np.zeros(0, np.int64)]),
            key_hashes=hash_keys([s.key for s in samples]).view(np.int64)[sample_of],
            targets=Targets(
                probs=SparseTargets.of(chosen, kept[sample_of], data.num_classes),
                weights=chosen.weight[kept][sample_of],
                confidences=None if confidences is None else confidences[sample_of],
            ),
            budget=budget_of(shard.stem),
            num_bytes=num_bytes,
            is_mapped=is_mapped,
        )

    return open_shard


def _confidences(data: SelectedData, digest: str, keys: list[str]) -> NDArray[np.float32]:
    """Return the labeller's confidences of some samples of a shard, before any calibration."""
    labeler = data.labeling.inputs["labeler"].fingerprint
    record = prediction_record(data.store, labeler, digest)
    columns = read_columns(data.store, record, ("key", "confidence"))
    by_key = dict(zip(columns["key"].tolist(), columns["confidence"].tolist(), strict=True))
    return np.array([by_key[key] for key in keys], np.float32)
