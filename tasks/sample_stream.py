"""Endless streams of samples over shards: what one gives at a position is the position's."""

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.noise import RandomResizedConfig
from models.training import TrainingConfig
from storage.samples import RawSample
from tasks.images import BadImage, upright_size
from tasks.open_shards import OpenShards
from tasks.sample_order import SampleOrder
from tasks.shard_items import Box, Pixels, ShardItems, Targets, draw_crops, views_of


@dataclass(frozen=True)
class SamplesRead:
    """The samples of one stream at some positions.

    Attributes:
        pixels: (n, S, S, 3) uint8 of every view; one tensor for all views where only the noise
            on whole batches tells them apart.
        key_hashes: (n,) int64, and
        copies: (n,) int64, and
        epochs: (n,) int64: what each sample's draws follow from.
        targets: of the n samples.
    """

    pixels: tuple[Tensor, ...]
    key_hashes: NDArray[np.int64]
    copies: NDArray[np.int64]
    epochs: NDArray[np.int64]
    targets: Targets


class SampleStream(Protocol):
    """What gives samples by position, from memory or from shards."""

    def read(self, start: int, count: int) -> SamplesRead:
        """Return the samples at positions start .. start + count."""
        ...

    def close(self) -> None:
        """Let go of threads."""
        ...


@dataclass(frozen=True)
class _Wanted:
    """An item of an open shard in an epoch."""

    shard: ShardItems
    item: int
    epoch: int

    @property
    def sample(self) -> RawSample:
        return self.shard.samples[int(self.shard.sample_of[self.item])]

    def size(self) -> tuple[int, int] | None:
        """Return width and height of the image; None for one that cannot be read."""
        try:
            return upright_size(self.sample.image, where=self.sample.key)
        except BadImage:
            return None  # it is counted when it is decoded


class StreamedSamples:
    """Samples of shards that are opened when they are needed and closed when others are.

    Args:
        order: which item lies at which position.
        shards: opens the shards and holds a bounded number of them.
        config: view and crop.
        noise_streams: of the views that are cropped differently.
        num_views: of the stream; they share their pixels where there is one noise stream.
        decoders: threads that decode; they change nothing of the result.
        pin_memory: whether the pixels go to an accelerator.
    """

    def __init__(
        self,
        order: SampleOrder,
        shards: OpenShards,
        config: TrainingConfig,
        *,
        noise_streams: tuple[int, ...],
        num_views: int,
        decoders: Executor,
        pin_memory: bool,
    ) -> None:
        self._order = order
        self.shards = shards
        self._config = config
        crop = config.noise.crop
        self._crop = crop if isinstance(crop, RandomResizedConfig) else None
        self._streams = noise_streams
        self._repeats = num_views // len(noise_streams)
        self._decoders = decoders
        self._pin_memory = pin_memory

    def read(self, start: int, count: int) -> SamplesRead:
        """Return the samples at positions start .. start + count."""
        shards, items, epochs = self._order.read(start, count)
        size = self._config.image_size
        pixels = [
            torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=self._pin_memory)
            for _ in self._streams
        ]
        hashes, copies = np.empty(count, np.int64), np.empty(count, np.int64)
        places: list[NDArray[np.int64]] = []
        targets: list[Targets] = []
        for group in self.shards.fitting_groups(np.unique(shards).tolist()):
            opened = {shard: self.shards.get(shard) for shard in group}
            place = np.flatnonzero(np.isin(shards, group))
            wanted = [_Wanted(opened[int(shards[p])], int(items[p]), int(epochs[p])) for p in place]
            decoded = self._decoded(wanted)
            found = np.array([item for item, _ in decoded], np.int64)
            for position, (_, views) in zip(place.tolist(), decoded, strict=True):
                for view, into in zip(views, pixels, strict=True):
                    into.numpy()[position] = view
            for index, shard in opened.items():
                own = shards[place] == index
                hashes[place[own]] = shard.key_hashes[found[own]]
                copies[place[own]] = shard.copies[found[own]]
                places.append(place[own])
                targets.append(shard.targets.take(found[own]))
        end = start + count
        self.shards.open_ahead(self._order.next_shards(end), in_use=self._order.shards_at(end))
        found_targets = Targets.in_places(targets, places)
        return SamplesRead(tuple(pixels * self._repeats), hashes, copies, epochs, found_targets)

    def _decoded(self, wanted: list["_Wanted"]) -> list[tuple[int, list[Pixels]]]:
        """Return the item found in the place of each, and its views."""
        boxes = self._boxes(wanted)

        def decode(number: int) -> tuple[int, list[Pixels]]:
            one = wanted[number]
            crops = boxes[number]
            if crops is None and self._crop is not None:
                return one.shard.decode(one.item, one.epoch, self._streams, self._config)
            try:
                return one.item, views_of(one.sample, crops, self._config)
            except BadImage:  # the next one that can be decoded is taken, and this one counted
                return one.shard.decode(one.item, one.epoch, self._streams, self._config)

        return list(self._decoders.map(decode, range(len(wanted))))

    def _boxes(self, wanted: list["_Wanted"]) -> list[list[Box] | None]:
        """Draw all crops at once, which costs a hundredth of drawing them one by one.

        None where there are no crops, or the image's size cannot be read.
        """
        boxes: list[list[Box] | None] = [None] * len(wanted)
        if self._crop is None:
            return boxes
        sizes = list(self._decoders.map(_Wanted.size, wanted))
        known = [number for number, size in enumerate(sizes) if size is not None]
        readable = [wanted[number] for number in known]
        widths, heights = np.array([size for size in sizes if size is not None]).reshape(-1, 2).T
        drawn = [
            draw_crops(
                self._crop,
                stream,
                np.array([one.shard.key_hashes[one.item] for one in readable], np.int64),
                np.array([one.shard.copies[one.item] for one in readable], np.int64),
                np.array([one.epoch for one in readable], np.int64),
                np.ascontiguousarray(widths),
                np.ascontiguousarray(heights),
            )
            for stream in self._streams
        ]
        for number, crops in zip(known, zip(*drawn, strict=True), strict=True):
            boxes[number] = list(crops)
        return boxes

    def close(self) -> None:
        """Stop reading ahead."""
        self.shards.close()
