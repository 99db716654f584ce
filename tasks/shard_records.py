"""What the store holds of each of many shards: requests that mostly wait, so many at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from storage.corpus import Shard

T = TypeVar("T")

_READERS = 16
_READ_IN_A_ROW = 64
"""At most, by one thread: handing each over alone takes as long as reading it from a disk."""


def read_of_each(shards: Sequence[Shard], read: Callable[[Shard], T]) -> list[tuple[Shard, T]]:
    """Return every shard, in its order, with what `read` finds of it; called from threads."""
    size = max(1, min(-(-len(shards) // _READERS), _READ_IN_A_ROW))
    parts = [shards[start : start + size] for start in range(0, len(shards), size)]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda part: [read(shard) for shard in part], parts)
        return list(zip(shards, chain.from_iterable(found), strict=True))
