"""From shards and a selection to the batches of a training: a step is the whole position."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.draws import input_draws
from models.noise import NoiseConfig, apply_input_noise
from models.objectives import Batch, ViewKind, build_objective
from models.randomness import derive_seed
from models.training import TrainingConfig
from storage.manifest import Manifest
from storage.shard_cache import CacheConfig, ShardCache
from storage.store import Store
from tasks.open_shards import ShardMemory
from tasks.reading_ahead import Position, ReadAhead
from tasks.sample_order import OPEN_SHARDS
from tasks.sample_stream import SamplesRead
from tasks.shard_items import BadSampleBudget, Targets
from tasks.sparse_targets import SparseTargets
from tasks.stream_sources import Source, SourceMaker, TrainingData, check_room
from tasks.waiting_batches import WaitingBatch, WaitingTargets

CACHE_BYTES = 4 * 2**30
"""Of a stream's pixels, files and targets that are held decoded; above it, shards are opened again.

As much again may be held by the open shards of all streams together.
"""

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class _Noised:
    """One view of the samples of some sources, as one batch: (B, 3, S, S)."""

    sources: list[int]
    sizes: list[int]
    images: Tensor

    def images_of(self, source: int) -> Tensor:
        """Return the images of one of the sources."""
        place = self.sources.index(source)
        start = sum(self.sizes[:place])
        return self.images[start : start + self.sizes[place]]


class TrainingBatches:
    """Batches of the streams that an objective declares, noised, on the device.

    View 0 of every stream has the stage's noise stream and each further view one of its own, so
    that a second view changes nothing of the first. A thread makes the next parts while the
    current one is used. Targets stay sparse until a part is taken: dense ones of one part at most.

    Args:
        store: holds the corpora's locations, the selection and nothing of the images.
        config: batch size, ratio, objective, view and noise.
        labeled: digest of the labelled corpus.
        class_names: of the run.
        selection: manifest of the selection, None where no stream reads one.
        labeling: manifest that the selection was made from.
        unlabeled: digest of the corpus that a stream without targets reads.
        stage_stream: of the stage; all orders and noise derive from it.
        device: where batches are noised.
        max_bad_samples: undecodable images allowed in a shard.
        loader_threads: that decode; they change nothing of the batches. None: one a core.
        cache: of the node's shards; None reads shards from where they lie.
        compact: manifest of the selection's compact shards, which give the same batches.
    Raises: ValueError for a stream whose data are not given; CacheTooSmall, with the numbers.
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
        unlabeled: str | None = None,
        loader_threads: int | None = None,
        cache: CacheConfig | None = None,
        compact: Manifest | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._noise_stream = derive_seed(stage_stream, "input-noise")
        threads = loader_threads or len(os.sched_getaffinity(0))
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._budgets: dict[tuple[str, str], BadSampleBudget] = {}
        self._max_bad_samples = max_bad_samples
        streams = build_objective(config.objective).streams(config)
        self._memory = ShardMemory(
            CACHE_BYTES,
            max_mapped_bytes=0 if cache is None else cache.max_bytes,
            max_shards=2 * OPEN_SHARDS * len(streams),
        )
        maker = SourceMaker(
            TrainingData(store, class_names, labeled, selection, labeling, unlabeled, compact),
            config,
            stage_stream,
            self._memory,
            CACHE_BYTES,
            None if cache is None else ShardCache(cache),
            self._decoders,
            device,
            self._budget,
        )
        self._sources = [
            maker.make(one, tuple(self._view_stream(i) for i in range(len(one.views))))
            for one in streams
        ]
        check_room(self._sources, self._memory, cache)
        self.targets_are_hard = (
            selection is not None and selection.settings["selection"]["target"] == "hard"
        )
        self._ahead = ReadAhead(self._made, _BATCHES_AHEAD, initializer=self._enter_thread)

    def batch(self, step: int, part: int = 0, num_parts: int = 1) -> Batch:
        """Return one of the equal parts of a step; the same for every process and resume.

        Raises: ValueError if a stream's samples of a step cannot be split into so many parts.
        """
        for source in self._sources:
            count = source.declared.samples_per_step
            if count % num_parts != 0:
                raise ValueError(
                    f"{count} {source.declared.role} samples a step cannot be split into "
                    f"{num_parts} equal parts: change batch_size, accumulation_steps or the number "
                    "of processes"
                )
        return self._ahead.get(Position(step, part, num_parts)).batch()

    def bad_samples(self) -> dict[str, str]:
        """Return key -> reason of the images that could not be decoded so far."""
        return {
            key: reason
            for _, budget in sorted(self._budgets.items())
            for key, reason in sorted(budget.reasons.items())
        }

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()
        for source in self._sources:
            source.samples.close()
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _budget(self, name: str, stem: str) -> BadSampleBudget:
        made = BadSampleBudget(stem, self._max_bad_samples)
        return self._budgets.setdefault((name, stem), made)

    def _enter_thread(self) -> None:
        # A thread begins on the first accelerator, and pinning memory there would take some of it.
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)

    def _view_stream(self, view: int) -> int:
        return self._noise_stream if view == 0 else derive_seed(self._noise_stream, "view", view)

    def _made(self, position: Position) -> WaitingBatch:
        return self._assembled([self._read(source, position) for source in self._sources])

    def _read(self, source: Source, position: Position) -> SamplesRead:
        count = source.declared.samples_per_step
        share = count // position.num_parts
        return source.samples.read(position.step * count + position.part * share, share)

    def _assembled(self, reads: list[SamplesRead]) -> WaitingBatch:
        roles = [source.declared.role for source in self._sources]
        noised = self._noised(reads)
        labels = torch.zeros(0, dtype=torch.int64)
        pseudo = Targets()
        views: dict[str, Tensor] = {}
        for number, (source, read) in enumerate(zip(self._sources, reads, strict=True)):
            made = [group.images_of(number) for group in noised if number in group.sources]
            if roles[number] == "unlabeled":
                views.update(zip(unlabeled_names(source.declared.views), made, strict=True))
                continue
            views.update({f"{roles[number]}_{i}": v for i, v in enumerate(made[1:], start=2)})
            if roles[number] == "labeled":
                assert read.targets.labels is not None
                labels = torch.from_numpy(read.targets.labels)
            else:
                pseudo = read.targets
        with_targets = [number for number, role in enumerate(roles) if role != "unlabeled"]
        return WaitingBatch(
            _joined(noised, with_targets),
            self._on_device(labels),
            pseudo_targets=None if pseudo.probs is None else self._waiting(pseudo.probs),
            pseudo_weights=self._given(pseudo.weights),
            pseudo_is_hard=pseudo.probs is not None and self.targets_are_hard,
            pseudo_confidences=self._given(pseudo.confidences),
            views=views,
        )

    def _waiting(self, targets: SparseTargets) -> WaitingTargets:
        listed = (self._on_device(torch.from_numpy(values)) for values in targets.normalized())
        return WaitingTargets(*listed, num_classes=targets.num_classes)

    def _given(self, values: np.ndarray | None) -> Tensor | None:
        return None if values is None else self._on_device(torch.from_numpy(values))

    def _on_device(self, values: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def _noised(self, reads: list[SamplesRead]) -> list["_Noised"]:
        """Noise all views, view 0 first; one batch for the sources that want the same noise."""
        made: list[_Noised] = []
        for view in range(max(len(source.declared.views) for source in self._sources)):
            for kind in ("strong", "weak"):
                numbers = [
                    number
                    for number, source in enumerate(self._sources)
                    if source.declared.views[view : view + 1] == (kind,)
                ]
                if numbers:
                    chosen = [reads[number] for number in numbers]
                    images = self._noised_view(chosen, view, kind)
                    sizes = [len(read.epochs) for read in chosen]
                    made.append(_Noised(numbers, sizes, images))
        return made

    def _noised_view(self, reads: list[SamplesRead], view: int, kind: ViewKind) -> Tensor:
        # (B, S, S, 3) uint8 -> (B, 3, S, S): noise happens on the device.
        on_device = [read.pixels[view].to(self._device, non_blocking=True) for read in reads]
        images = on_device[0] if len(on_device) == 1 else torch.cat(on_device)
        draws = input_draws(
            self._view_stream(view),
            torch.from_numpy(np.concatenate([read.key_hashes for read in reads])),
            torch.from_numpy(np.concatenate([read.copies for read in reads])),
            torch.from_numpy(np.concatenate([read.epochs for read in reads])),
        )
        noise = self._config.noise if kind == "strong" else weak_noise(self._config.noise)
        return apply_input_noise(images.permute(0, 3, 1, 2), noise, draws)


def weak_noise(noise: NoiseConfig) -> NoiseConfig:
    """Return the noise of a weak view: the crop and the flip of `noise`, and nothing else."""
    return NoiseConfig(crop=noise.crop, horizontal_flip=noise.horizontal_flip)


def unlabeled_names(kinds: Sequence[ViewKind]) -> list[str]:
    """Name a stream's views: unlabeled_weak, unlabeled_strong, a second one unlabeled_strong_2."""
    names: list[str] = []
    for i, kind in enumerate(kinds):
        number = kinds[: i + 1].count(kind)
        names.append(f"unlabeled_{kind}" if number == 1 else f"unlabeled_{kind}_{number}")
    return names


def _joined(noised: list[_Noised], numbers: list[int]) -> Tensor:
    """Return the first views of some sources behind each other, without a copy where they lie so.

    Without a source there are no images: (0, 3, S, S).
    """
    if not numbers:
        return noised[0].images[:0]
    if noised[0].sources == numbers:
        return noised[0].images
    first = [next(group for group in noised if number in group.sources) for number in numbers]
    return torch.cat(
        [group.images_of(number) for group, number in zip(first, numbers, strict=True)]
    )
