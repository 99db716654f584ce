"""What the store holds of each of many shards: requests that mostly wait, so many at a time."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from storage.corpus import Shard

T = TypeVar("T")

_READERS = 16
_READ_IN_A_ROW = 64
"""At most, by one thread: handing each over alone takes as long as reading it from a disk."""

_READ_FIRST = 4
_WORTH_THREADS = 0.5
"""Share of the time that reading waits."""


def read_of_each(shards: Sequence[Shard], read: Callable[[Shard], T]) -> list[tuple[Shard, T]]:
    """Return every shard, in its order, with what `read` finds of it; called from threads.

    Unless the first few show that reading hardly waits, as from a disk whose files are in memory:
    threads that only work take turns at Python's lock, which took them three times as long.
    """
    started, worked = time.perf_counter(), time.thread_time()
    first = [read(shard) for shard in shards[:_READ_FIRST]]
    rest = shards[_READ_FIRST:]
    worked, took = time.thread_time() - worked, time.perf_counter() - started
    if worked > (1 - _WORTH_THREADS) * took:
        return list(zip(shards, [*first, *map(read, rest)], strict=True))
    size = max(1, min(-(-len(rest) // _READERS), _READ_IN_A_ROW))
    parts = [rest[start : start + size] for start in range(0, len(rest), size)]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda part: [read(shard) for shard in part], parts)
        return list(zip(shards, [*first, *chain.from_iterable(found)], strict=True))
