"""The order in which a training reads its items: one integer is the whole position."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from models.randomness import Block, derive_seed, uniforms

OPEN_SHARDS = 16
"""Shards whose items are mixed with each other; part of the training stage's version."""


class SampleOrder:
    """Endless epochs over items that lie in shards, each epoch a permutation of all items.

    Shards are shuffled, cut into windows of `OPEN_SHARDS`, and the items of a window are shuffled
    together, so that a reader needs one window in memory. Everything follows from
    (stream, epoch, position): no state, no generator.
    """

    def __init__(self, items_per_shard: list[int], stream: int) -> None:
        self.items_per_shard = np.asarray(items_per_shard, dtype=np.int64)
        self.num_items = int(self.items_per_shard.sum())
        self._stream = stream
        self._shard_stream = derive_seed(stream, "shards")
        if self.num_items == 0:
            raise ValueError("no items to read: the labelled set or the selection is empty")
        self._windows_of = lru_cache(maxsize=2)(self._windows)
        self._window_items = lru_cache(maxsize=3)(self._permuted_window)

    def read(
        self, start: int, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return shard, item within the shard, and epoch of positions start .. start + count.

        Returns: three (count,) int64 arrays.
        """
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64], int]] = []
        position, end = start, start + count
        while position < end:
            epoch, offset = divmod(position, self.num_items)
            ends = self._windows_of(epoch)[1]
            window = int(np.searchsorted(ends, offset, side="right"))
            first = int(ends[window - 1]) if window else 0
            shards, items = self._window_items(epoch, window)
            take = min(end - position, int(ends[window]) - offset)
            chosen = slice(offset - first, offset - first + take)
            parts.append((shards[chosen], items[chosen], epoch))
            position += take
        return (
            np.concatenate([shards for shards, _, _ in parts]),
            np.concatenate([items for _, items, _ in parts]),
            np.concatenate([np.full(len(items), epoch) for _, items, epoch in parts]),
        )

    def shards_at(self, position: int) -> list[int]:
        """Return the shards of the window of `position`, those with items."""
        epoch, offset = divmod(position, self.num_items)
        windows, ends = self._windows_of(epoch)
        window = windows[int(np.searchsorted(ends, offset, side="right"))]
        return [int(shard) for shard in window if self.items_per_shard[shard] > 0]

    def next_shards(self, position: int) -> list[int]:
        """Return the shards of the window behind the one of `position`, those with items."""
        epoch, offset = divmod(position, self.num_items)
        ends = self._windows_of(epoch)[1]
        end = int(ends[np.searchsorted(ends, offset, side="right")])
        return self.shards_at(epoch * self.num_items + end)

    def _windows(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        shards = np.arange(len(self.items_per_shard), dtype=np.uint64)
        keys = uniforms(self._shard_stream, shards, epoch=epoch, block=Block.ORDER)
        order = np.argsort(keys, kind="stable")
        windows = [order[i : i + OPEN_SHARDS] for i in range(0, len(order), OPEN_SHARDS)]
        return windows, np.cumsum([self.items_per_shard[w].sum() for w in windows])

    def _permuted_window(
        self, epoch: int, window: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shards_in_window = np.sort(self._windows_of(epoch)[0][window])
        counts = self.items_per_shard[shards_in_window]
        shards = np.repeat(shards_in_window, counts)
        items = np.concatenate([np.arange(n, dtype=np.int64) for n in counts])
        # An item's number in the whole corpus keys its draw.
        starts = np.concatenate([[0], np.cumsum(self.items_per_shard)])
        numbers = (starts[shards] + items).astype(np.uint64)
        keys = uniforms(self._stream, numbers, epoch=epoch, block=Block.ORDER)
        order = np.argsort(keys, kind="stable")
        return shards[order], items[order]
