"""From shards and a selection to the batches of a training: a step is the whole position."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from models.noise import RandomResizedConfig, apply_input_noise
from models.objectives import Batch
from models.randomness import Draws, derive_seed, hash_keys, input_draws
from models.training import TrainingConfig
from storage.corpus import Corpus, load_corpus, load_locations, read_samples
from storage.manifest import Manifest, read_stored
from storage.samples import RawSample, sample_key
from storage.selections import from_parquet
from storage.store import Store
from tasks.sample_order import OPEN_SHARDS, SampleOrder
from tasks.shard_items import BadSampleBudget, OpenShard, Pixels, ShardItems, Targets

CACHE_BYTES = 4 * 2**30
"""Pixels or shards that one training may hold in memory; above it, shards are read again."""

_BudgetOf = Callable[[str], BadSampleBudget]

_DECODE_THREADS = 4
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class _Read:
    """The samples of one stream at some positions."""

    views: list[Pixels]
    key_hashes: NDArray[np.int64]
    copies: NDArray[np.int64]
    epochs: NDArray[np.int64]
    targets: Targets


class SampleStream:
    """One endless stream of items; what it gives at a position depends on the position alone."""

    def __init__(
        self,
        items_per_shard: list[int],
        open_shard: OpenShard,
        config: TrainingConfig,
        *,
        shard_bytes: int,
        order_stream: int,
        noise_stream: int,
        decoders: ThreadPoolExecutor,
    ) -> None:
        self._order = SampleOrder(items_per_shard, order_stream)
        self._open_shard = open_shard
        self._config = config
        self._noise_stream = noise_stream
        self._decoders = decoders
        self._opened: OrderedDict[int, ShardItems] = OrderedDict()
        # An open shard holds its files beside the pixels.
        num_bytes = self._order.num_items * config.image_size**2 * 3 + shard_bytes
        self.is_cached = num_bytes <= CACHE_BYTES and not isinstance(
            config.noise.crop, RandomResizedConfig
        )

    def read(self, start: int, count: int) -> _Read:
        """Return the samples at positions start .. start + count."""
        shards, items, epochs = self._order.read(start, count)
        views: list[Pixels | None] = [None] * count
        hashes, copies = np.empty(count, np.int64), np.empty(count, np.int64)
        parts: list[tuple[NDArray[np.int64], ShardItems, NDArray[np.int64]]] = []
        for shard in np.unique(shards):
            opened = self._shard(int(shard))
            positions = np.flatnonzero(shards == shard)
            found, pixels = opened.fetch(
                items[positions],
                epochs[positions],
                self._noise_stream,
                self._config,
                self._decoders,
            )
            hashes[positions] = opened.key_hashes[found]
            copies[positions] = opened.copies[found]
            parts.append((positions, opened, found))
            for position, view in zip(positions, pixels, strict=True):
                views[position] = view
        return _Read([v for v in views if v is not None], hashes, copies, epochs, _joined(parts))

    def _shard(self, index: int) -> ShardItems:
        if index not in self._opened:
            self._opened[index] = self._open_shard(index)
            if not self.is_cached and len(self._opened) > 2 * OPEN_SHARDS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(index)
        return self._opened[index]


class TrainingBatches:
    """Joint batches of labelled and pseudo-labelled images, noised, on the device.

    Args:
        store: holds the corpora's locations, the selection and nothing of the images.
        config: batch size, ratio, view and noise.
        labeled: digest of the labelled corpus.
        class_names: of the run.
        selection: manifest of the selection, None to train on labels only.
        labeling: manifest that the selection was made from.
        stage_stream: of the stage; all orders and noise derive from it.
        device: where batches are noised.
        max_bad_samples: undecodable images allowed in a shard.
    """

    def __init__(
        self,
        store: Store,
        config: TrainingConfig,
        *,
        labeled: str,
        class_names: tuple[str, ...],
        selection: Manifest | None,
        labeling: Manifest | None,
        stage_stream: int,
        device: torch.device,
        max_bad_samples: int,
    ) -> None:
        self._config = config
        self._device = device
        self._noise_stream = derive_seed(stage_stream, "input-noise")
        self._decoders = ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="decode")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pending: dict[int, Future[tuple[_Read, _Read | None]]] = {}
        self._budgets: dict[tuple[str, str], BadSampleBudget] = {}

        def budget(name: str, stem: str) -> BadSampleBudget:
            made = BadSampleBudget(stem, max_bad_samples)
            return self._budgets.setdefault((name, stem), made)

        def stream(
            name: str, corpus: Corpus, items: list[int], open_shard: OpenShard
        ) -> SampleStream:
            return SampleStream(
                items,
                open_shard,
                config,
                shard_bytes=corpus.num_bytes,
                order_stream=derive_seed(stage_stream, "order", name),
                noise_stream=self._noise_stream,
                decoders=self._decoders,
            )

        corpus = load_corpus(store, labeled)
        items = [shard.num_samples for shard in corpus.shards]
        opener = _labeled_opener(store, corpus, class_names, partial(budget, "labeled"))
        self._labeled = stream("labeled", corpus, items, opener)
        self._pseudo: SampleStream | None = None
        if selection is not None and labeling is not None:
            corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
            items = [selection.counts["items"][shard.stem] for shard in corpus.shards]
            opener = _pseudo_opener(
                store, corpus, selection, labeling, len(class_names), partial(budget, "pseudo")
            )
            self._pseudo = stream("pseudo", corpus, items, opener)
        self.targets_are_hard = (
            selection is not None and selection.settings["selection"]["target"] == "hard"
        )

    def batch(self, step: int, part: int = 0, num_parts: int = 1) -> Batch:
        """Return one of the equal parts of a step; the same for every process and resume."""
        assert (part, num_parts) == (0, 1), "a step is not divided yet"
        labeled, pseudo = self._read(step)
        images, draws = self._assembled(labeled, pseudo)
        assert labeled.targets.labels is not None
        labels = torch.from_numpy(labeled.targets.labels).to(self._device)
        noised = apply_input_noise(images, self._config.noise, draws)
        if pseudo is None:
            return Batch(noised, labels)
        assert pseudo.targets.probs is not None
        assert pseudo.targets.weights is not None
        return Batch(
            noised,
            labels,
            pseudo_targets=torch.from_numpy(pseudo.targets.probs).to(self._device),
            pseudo_weights=torch.from_numpy(pseudo.targets.weights).to(self._device),
            pseudo_is_hard=self.targets_are_hard,
        )

    def bad_samples(self) -> dict[str, str]:
        """Return key -> reason of the images that could not be decoded so far."""
        return {
            key: reason
            for _, budget in sorted(self._budgets.items())
            for key, reason in sorted(budget.reasons.items())
        }

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> tuple[_Read, _Read | None]:
        is_cached = self._labeled.is_cached and (self._pseudo is None or self._pseudo.is_cached)
        if is_cached:
            return self._read_now(step)
        for ahead in range(step, step + 1 + _BATCHES_AHEAD):
            if ahead not in self._pending:
                self._pending[ahead] = self._ahead.submit(self._read_now, ahead)
        return self._pending.pop(step).result()

    def _read_now(self, step: int) -> tuple[_Read, _Read | None]:
        count = self._config.batch_size
        labeled = self._labeled.read(step * count, count)
        if self._pseudo is None:
            return labeled, None
        count *= self._config.unlabeled_ratio
        return labeled, self._pseudo.read(step * count, count)

    def _assembled(self, labeled: _Read, pseudo: _Read | None) -> tuple[torch.Tensor, Draws]:
        reads = [labeled] if pseudo is None else [labeled, pseudo]
        # (B, S, S, 3) uint8 -> (B, 3, S, S): one copy to the device, noise happens there.
        views = torch.from_numpy(np.stack([view for read in reads for view in read.views]))
        draws = input_draws(
            self._noise_stream,
            torch.from_numpy(np.concatenate([read.key_hashes for read in reads])),
            torch.from_numpy(np.concatenate([read.copies for read in reads])),
            torch.from_numpy(np.concatenate([read.epochs for read in reads])),
        )
        return views.to(self._device).permute(0, 3, 1, 2), draws


def _joined(parts: list[tuple[NDArray[np.int64], ShardItems, NDArray[np.int64]]]) -> Targets:
    """Put the targets of several shards' items into the order of their positions."""
    order = np.argsort(np.concatenate([positions for positions, _, _ in parts]), kind="stable")

    def join(pick: Callable[[Targets], NDArray | None]) -> NDArray | None:
        chosen = [(pick(opened.targets), found) for _, opened, found in parts]
        if any(values is None for values, _ in chosen):
            return None
        return np.concatenate([v[found] for v, found in chosen if v is not None])[order]

    return Targets(join(lambda t: t.labels), join(lambda t: t.probs), join(lambda t: t.weights))


def _labeled_opener(
    store: Store, corpus: Corpus, class_names: tuple[str, ...], budget_of: _BudgetOf
) -> OpenShard:
    locations = load_locations(store, corpus.digest)
    assert corpus.class_names is not None, "splits are checked when the run is opened"
    positions = {name: position for position, name in enumerate(class_names)}
    to_run = [positions[name] for name in corpus.class_names]

    def open_shard(index: int) -> ShardItems:
        stem = corpus.shards[index].stem
        samples = read_samples(corpus, locations, stem)
        labels = [_label(sample) for sample in samples]
        return ShardItems(
            samples,
            sample_of=np.arange(len(samples)),
            copies=np.zeros(len(samples), np.int64),
            key_hashes=hash_keys([s.key for s in samples]).view(np.int64),
            targets=Targets(labels=np.array([to_run[label] for label in labels], np.int64)),
            budget=budget_of(stem),
        )

    return open_shard


def _label(sample: RawSample) -> int:
    if sample.label is None:
        raise ValueError(f"{sample.key}: no .cls member, but training data must be labelled")
    return sample.label


def _pseudo_opener(
    store: Store,
    corpus: Corpus,
    selection: Manifest,
    labeling: Manifest,
    num_classes: int,
    budget_of: _BudgetOf,
) -> OpenShard:
    locations = load_locations(store, corpus.digest)

    def open_shard(index: int) -> ShardItems:
        shard = corpus.shards[index]
        stored = selection.object(shard.digest)
        chosen = from_parquet(
            read_stored(store, stored),
            num_samples=labeling.counts["shards"][shard.stem]["num_samples"],
            where=store.url_of(stored.path),
        )
        samples = read_samples(corpus, locations, shard.stem)
        by_key = {sample.key: position for position, sample in enumerate(samples)}
        kept = np.flatnonzero(chosen.kept)
        copies = chosen.copies[kept].astype(np.int64)
        rows = np.repeat(kept, copies)
        keys = [sample_key(shard.stem, chosen.keys[row]) for row in rows]
        return ShardItems(
            samples,
            sample_of=np.array([by_key[key] for key in keys], dtype=np.int64),
            copies=np.concatenate([np.arange(n) for n in copies] or [np.zeros(0, np.int64)]),
            key_hashes=hash_keys(keys).view(np.int64),
            targets=Targets(
                probs=chosen.dense_targets(num_classes)[rows],
                weights=chosen.weight[rows],
            ),
            budget=budget_of(shard.stem),
        )

    return open_shard
