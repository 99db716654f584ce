"""What the store holds of each of many shards: requests that mostly wait, so many at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from storage.corpus import Shard

T = TypeVar("T")

_READERS = 16


def read_of_each(shards: Sequence[Shard], read: Callable[[Shard], T]) -> list[tuple[Shard, T]]:
    """Return every shard, in its order, with what `read` finds of it; called from threads."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(zip(shards, pool.map(read, shards), strict=True))
