"""From the streams that an objective declares to the samples that they read."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch

from models.noise import RandomResizedConfig
from models.objectives import Stream
from models.randomness import derive_seed
from models.training import TrainingConfig
from storage.corpus import load_corpus
from storage.manifest import Manifest
from storage.shard_cache import CacheConfig, ShardCache, refuse_small_cache
from storage.store import Store
from tasks.cached_samples import CachedSamples
from tasks.open_shards import OpenShards, ShardMemory
from tasks.sample_order import OPEN_SHARDS, SampleOrder
from tasks.sample_stream import SampleStream, StreamedSamples
from tasks.shard_items import BadSampleBudget, HeldBytes, OpenShard
from tasks.shard_openers import (
    SelectedData,
    ShardReader,
    labeled_opener,
    selected_opener,
    unlabeled_opener,
)

_log = logging.getLogger(__name__)

BYTES_PER_LABEL = 8
"""Of a labelled item's target in memory."""


@dataclass(frozen=True)
class TrainingData:
    """What the streams of a training may read.

    Attributes:
        store: holds the corpora's locations, the selection and nothing of the images.
        class_names: of the run.
        labeled: digest of the labelled corpus.
        selection: manifest of the selection, None where no stream reads one.
        labeling: manifest that the selection was made from.
        unlabeled: digest of the corpus that a stream without targets reads.
        compact: manifest of the selection's compact shards, where there are such.
    """

    store: Store
    class_names: tuple[str, ...]
    labeled: str
    selection: Manifest | None
    labeling: Manifest | None
    unlabeled: str | None
    compact: Manifest | None


@dataclass(frozen=True)
class Source:
    """A stream as the objective declares it, and where its samples come from."""

    declared: Stream
    samples: SampleStream
    is_cached: bool
    shard_bytes: list[int]
    """Of the files of every shard that it reads."""
    held: list[HeldBytes]
    """By every shard while it is open, at the most."""


@dataclass(frozen=True)
class _Shards:
    """The shards of a stream: its name in seeds, items and bytes of each, and how to open one."""

    name: str
    items: list[int]
    num_bytes: list[int]
    target_bytes: list[int]
    open_shard: OpenShard

    def held(self, *, is_mapped: bool) -> list[HeldBytes]:
        """Return what each may hold while it is open."""
        if is_mapped:
            return [HeldBytes(*one) for one in zip(self.target_bytes, self.num_bytes, strict=True)]
        both = zip(self.num_bytes, self.target_bytes, strict=True)
        return [HeldBytes(files + targets, 0) for files, targets in both]


@dataclass(frozen=True)
class SourceMaker:
    """Makes the sources of a training.

    Attributes:
        data: what may be read.
        config: view, noise and objective.
        stage_stream: of the stage; orders derive from it.
        memory: for the open shards of all sources together.
        decoded_bytes: largest stream that is kept decoded.
        cache: of the node's shards.
        decoders: threads that decode.
        device: what batches are for.
        budget_of: (stream's name, stem) -> budget of undecodable images.
    """

    data: TrainingData
    config: TrainingConfig
    stage_stream: int
    memory: ShardMemory
    decoded_bytes: int
    cache: ShardCache | None
    decoders: Executor
    device: torch.device
    budget_of: Callable[[str, str], BadSampleBudget]

    def make(self, declared: Stream, noise_streams: tuple[int, ...]) -> Source:
        """Return the source of one stream.

        Raises: ValueError if its data are not given.
        """
        shards, config = self._shards(declared), self.config
        order = SampleOrder(shards.items, derive_seed(self.stage_stream, "order", shards.name))
        held = shards.held(is_mapped=self.cache is not None)
        pin_memory = self.device.type == "cuda"
        if stays_decoded(
            config,
            order.num_items,
            shard_bytes=sum(shards.num_bytes),
            target_bytes=sum(shards.target_bytes),
            decoded_bytes=self.decoded_bytes,
        ):
            samples = CachedSamples(
                order,
                shards.open_shard,
                config,
                num_views=len(noise_streams),
                decoders=self.decoders,
                pin_memory=pin_memory,
            )
            return Source(declared, samples, True, shards.num_bytes, held)
        opened = OpenShards(self.memory, shards.name, shards.open_shard, held)
        samples = StreamedSamples(
            order,
            opened,
            config,
            # Views differ in their pixels only where decoding crops each of them.
            noise_streams=noise_streams if _crops_when_decoding(config) else noise_streams[:1],
            num_views=len(noise_streams),
            decoders=self.decoders,
            pin_memory=pin_memory,
        )
        return Source(declared, samples, False, shards.num_bytes, held)

    def _shards(self, declared: Stream) -> _Shards:
        data, kind = self.data, self.config.objective.kind
        if declared.with_selection:
            if data.selection is None or data.labeling is None:
                raise ValueError(
                    f"objective {kind} reads {declared.role} samples of a selection, but the "
                    "training has none: give it one, or set unlabeled_ratio: 0"
                )
            corpus = load_corpus(data.store, data.labeling.inputs["corpus"].fingerprint)
            counts = data.selection.counts["items"]
            selected = SelectedData(
                data.store,
                data.selection,
                data.labeling,
                num_classes=len(data.class_names),
                with_confidences=self._reads_confidences,
                compact=data.compact,
            )
            reader = ShardReader.of(data.store, corpus, self.cache)
            opener = selected_opener(reader, selected, partial(self.budget_of, "pseudo"))
            items = [counts[shard.stem] for shard in corpus.shards]
            num_bytes, of_targets = selected.shard_bytes(corpus), selected.target_bytes(corpus)
            return _Shards("pseudo", items, num_bytes, of_targets, opener)
        budget = partial(self.budget_of, declared.role)
        if declared.role == "labeled":
            corpus = load_corpus(data.store, data.labeled)
            reader = ShardReader.of(data.store, corpus, self.cache)
            opener = labeled_opener(reader, data.class_names, budget)
        elif data.unlabeled is None:
            raise ValueError(
                f"objective {kind} reads unlabelled samples, but the training has no unlabelled "
                "corpus: give it one"
            )
        else:
            corpus = load_corpus(data.store, data.unlabeled)
            opener = unlabeled_opener(ShardReader.of(data.store, corpus, self.cache), budget)
        items = [shard.num_samples for shard in corpus.shards]
        per_item = BYTES_PER_LABEL if declared.role == "labeled" else 0
        return _Shards(
            declared.role,
            items,
            [shard.num_bytes for shard in corpus.shards],
            [per_item * count for count in items],
            opener,
        )

    @property
    def _reads_confidences(self) -> bool:
        mixing = self.config.noise.mixing
        return mixing is not None and mixing.kind == "prob_pseudo_mixup"


def stays_decoded(
    config: TrainingConfig,
    num_items: int,
    *,
    shard_bytes: int,
    target_bytes: int,
    decoded_bytes: int,
) -> bool:
    """Return whether a stream is read once and kept decoded, or read anew in every epoch.

    Args:
        config: of the training.
        num_items: of an epoch.
        shard_bytes: of all its shards; an open one holds its files beside the pixels.
        target_bytes: of all its items.
        decoded_bytes: largest stream that is kept.
    """
    num_bytes = num_items * config.image_size**2 * 3 + shard_bytes + target_bytes
    return num_bytes <= decoded_bytes and not _crops_when_decoding(config)


def _crops_when_decoding(config: TrainingConfig) -> bool:
    return isinstance(config.noise.crop, RandomResizedConfig)


def check_room(sources: Sequence[Source], memory: ShardMemory, cache: CacheConfig | None) -> None:
    """Refuse a cache that cannot serve these sources, and warn of shards too large for memory.

    Raises: CacheTooSmall, with the numbers.
    """
    if cache is not None:
        refuse_cache_without_room(cache, [source.shard_bytes for source in sources])
        return
    streamed = [source for source in sources if not source.is_cached]
    open_bytes = sum(_window_bytes([one.own for one in source.held]) for source in streamed)
    if open_bytes > memory.max_bytes:
        _log.warning(
            "the shards that are read at a time may have %d bytes, but %d may be held in memory:"
            " shards are read again and again. Set cache: {dir, max_bytes}, or write smaller"
            " shards",
            open_bytes,
            memory.max_bytes,
        )


def refuse_cache_without_room(cache: CacheConfig, shard_bytes: Sequence[Sequence[int]]) -> None:
    """Refuse a cache that cannot serve a training, or whose disk cannot.

    Args:
        cache: of the node.
        shard_bytes: of every shard, for each stream or corpus that the training reads.
    Raises: CacheTooSmall, with the numbers.
    """
    refuse_small_cache(
        cache,
        open_bytes=sum(_window_bytes(one) for one in shard_bytes),
        corpus_bytes=sum(sum(one) for one in shard_bytes),
    )


def _window_bytes(shard_bytes: Sequence[int]) -> int:
    """Return the most bytes that shards mixed with each other can have."""
    return sum(sorted(shard_bytes, reverse=True)[:OPEN_SHARDS])
