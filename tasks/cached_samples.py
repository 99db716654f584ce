"""A small corpus decoded once into one tensor, from which batches are gathered by index."""

from concurrent.futures import Executor

import numpy as np
import torch
from numpy.typing import NDArray

from models.training import TrainingConfig
from tasks.sample_order import SampleOrder
from tasks.sample_stream import SamplesRead
from tasks.shard_items import OpenShard, ShardItems, Targets

_UNKNOWN = -1


class CachedSamples:
    """Samples of a corpus whose clean views lie in memory.

    An image is decoded when it is first read, so that a resumed training waits for the shards of
    its next batch and not for the corpus; from then on a batch is a few gathers.

    Args:
        order: which item lies at which position.
        open_shard: opens a shard; its files are let go when all its items are decoded.
        config: the view; its crop must not happen when decoding.
        num_views: of the stream; they share their pixels.
        decoders: threads that decode; they change nothing of the result.
        pin_memory: whether the pixels go to an accelerator.
    """

    def __init__(
        self,
        order: SampleOrder,
        open_shard: OpenShard,
        config: TrainingConfig,
        *,
        num_views: int,
        decoders: Executor,
        pin_memory: bool,
    ) -> None:
        self._order = order
        self._open_shard = open_shard
        self._config = config
        self._num_views = num_views
        self._decoders = decoders
        self._pin_memory = pin_memory
        n, size = order.num_items, config.image_size
        counts = order.items_per_shard
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._left = counts.copy()  # items of each shard that were never read
        self._open: dict[int, ShardItems] = {}
        # Memory of rows that nothing wrote yet is not taken: copies of an image share a row.
        self._pixels = torch.empty((n, size, size, 3), dtype=torch.uint8)
        self._is_decoded = np.zeros(n, np.bool_)
        self._found = np.full(n, _UNKNOWN, np.int64)  # item -> the item in its place
        self._row_of = np.empty(n, np.int64)
        self._key_hashes, self._copies = np.empty(n, np.int64), np.empty(n, np.int64)
        self._targets: dict[int, Targets] = {}  # of every shard that was opened

    def read(self, start: int, count: int) -> SamplesRead:
        """Return the samples at positions start .. start + count."""
        shards, items, epochs = self._order.read(start, count)
        wanted = self._starts[shards] + items
        if (self._found[wanted] == _UNKNOWN).any():
            self._decode_missing(np.unique(wanted[self._found[wanted] == _UNKNOWN]))
        found = self._found[wanted]
        size = self._config.image_size
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=self._pin_memory)
        torch.index_select(self._pixels, 0, torch.from_numpy(self._row_of[found]), out=pixels)
        return SamplesRead(
            (pixels,) * self._num_views,
            self._key_hashes[found],
            self._copies[found],
            epochs,
            self._targets_of(shards, found),
        )

    def _targets_of(self, shards: NDArray[np.int64], found: NDArray[np.int64]) -> Targets:
        parts: list[Targets] = []
        places: list[NDArray[np.int64]] = []
        for shard in np.unique(shards).tolist():
            place = np.flatnonzero(shards == shard)
            parts.append(self._targets[shard].take(found[place] - self._starts[shard]))
            places.append(place)
        return Targets.in_places(parts, places)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _decode_missing(self, missing: NDArray[np.int64]) -> None:
        """Decode items, given by their sorted numbers in the corpus."""
        shards = np.searchsorted(self._starts, missing, side="right") - 1
        for shard in np.unique(shards).tolist():
            self._open_once(shard)
        # One decoding serves all copies of an image.
        rows, first = np.unique(self._row_of[missing], return_index=True)
        is_new = ~self._is_decoded[rows]

        def decode(number: int) -> int:
            shard = int(shards[number])
            start = int(self._starts[shard])
            item = int(missing[number]) - start
            found, (view, *_) = self._open[shard].decode(item, 0, (0,), self._config)
            self._pixels.numpy()[self._row_of[start + found]] = view
            return start + found

        chosen = first[is_new]
        replaced = list(self._decoders.map(decode, chosen.tolist()))
        for number, found in zip(chosen.tolist(), replaced, strict=True):
            self._is_decoded[self._row_of[found]] = True
            self._found[missing[number]] = found
        for number, item in enumerate(missing.tolist()):
            if self._found[item] == _UNKNOWN:
                self._found[item] = self._copy_of(item, int(shards[number]))
            self._left[shards[number]] -= 1
        for shard in np.unique(shards).tolist():
            if self._left[shard] == 0:
                del self._open[shard]

    def _copy_of(self, item: int, shard: int) -> int:
        """Return what takes the place of an item of whose image another copy was read."""
        if self._is_decoded[self._row_of[item]]:
            return item
        # The image is bad: the first item behind it that is not, as if it were decoded alone.
        start = int(self._starts[shard])
        found, (view, *_) = self._open[shard].decode(item - start, 0, (0,), self._config)
        self._pixels.numpy()[self._row_of[start + found]] = view
        self._is_decoded[self._row_of[start + found]] = True
        return start + found

    def _open_once(self, shard: int) -> None:
        if shard in self._open:
            return
        opened = self._open_shard(shard).in_memory()
        self._open[shard] = opened
        start, end = int(self._starts[shard]), int(self._starts[shard + 1])
        self._row_of[start:end] = start + _first_item_of(opened.sample_of)
        self._key_hashes[start:end] = opened.key_hashes
        self._copies[start:end] = opened.copies
        self._targets[shard] = opened.targets


def _first_item_of(sample_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each item, the first item with the same image: (n,) -> (n,)."""
    _, first, inverse = np.unique(sample_of, return_index=True, return_inverse=True)
    return first[inverse]
