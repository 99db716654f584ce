"""The shards that the streams of a training hold open together, at most so many bytes."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from tasks.shard_items import HeldBytes, OpenShard, ShardItems

ShardKey = tuple[str, int]
"""A stream's name and the index of one of its shards."""


@dataclass
class ShardMemory:
    """What all streams of a training hold open: the least recently read is closed first.

    Attributes:
        max_bytes: of the process's own memory, targets included; the shard that is being read may
            exceed it alone.
        max_mapped_bytes: of the node's cache, whose files in use cannot make room for others.
        max_shards: open at a time, whatever they hold.
    """

    max_bytes: int
    max_mapped_bytes: int
    max_shards: int
    opened: OrderedDict[ShardKey, ShardItems] = field(default_factory=OrderedDict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def can_hold(self, held: Sequence[HeldBytes]) -> bool:
        """Return whether the limits allow shards of these sizes to be open together."""
        fits = (
            sum(one.own for one in held) <= self.max_bytes
            and sum(one.mapped for one in held) <= self.max_mapped_bytes
        )
        return fits and len(held) <= self.max_shards

    def has_room_for(self, held: HeldBytes) -> bool:
        """Return whether a shard of this size can be opened without closing another."""
        with self.lock:
            return self.can_hold([*(shard.held for shard in self.opened.values()), held])

    def make_room_for(self, held: HeldBytes) -> None:
        """Close shards until one of this size fits, or none is open."""
        with self.lock:
            while self.opened and not self.has_room_for(held):
                self.opened.popitem(last=False)

    def make_room_by_closing(self, keys: Sequence[ShardKey], held: HeldBytes) -> bool:
        """Close shards of these only, in their order, until one of this size fits, if it can."""
        with self.lock:
            for key in keys:
                if self.has_room_for(held):
                    break
                del self.opened[key]
            return self.has_room_for(held)

    def add(self, key: ShardKey, shard: ShardItems) -> None:
        """Keep a shard open, closing others for it."""
        with self.lock:
            self.make_room_for(shard.held)
            self.opened[key] = shard


class OpenShards:
    """The shards of one stream, in a memory that it shares with the other streams.

    Args:
        memory: shared.
        name: of the stream.
        open_shard: reads a shard; called from a thread of its own for those read ahead.
        held: by index, the most that an open shard can hold.
    """

    def __init__(
        self,
        memory: ShardMemory,
        name: str,
        open_shard: OpenShard,
        held: Sequence[HeldBytes],
    ) -> None:
        self._memory = memory
        self._name = name
        self._open_shard = open_shard
        self._held = held
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=f"open-{name}")
        self._coming: dict[int, Future[ShardItems]] = {}

    def get(self, index: int) -> ShardItems:
        """Return an open shard, reading it if it is not open."""
        coming = self._coming.pop(index, None)
        opened = self._memory.opened
        with self._memory.lock:
            if (self._name, index) in opened:
                opened.move_to_end((self._name, index))
                return opened[self._name, index]
            if coming is None:
                self._memory.make_room_for(self._held[index])
        shard = coming.result() if coming is not None else self._open_shard(index)
        self._memory.add((self._name, index), shard)
        return shard

    def fitting_groups(self, indices: list[int]) -> list[list[int]]:
        """Split shards into groups that can be open together; one shard is a group at least."""
        groups: list[list[int]] = [[]]
        for index in indices:
            together = [self._held[one] for one in (*groups[-1], index)]
            if groups[-1] and not self._memory.can_hold(together):
                groups.append([])
            groups[-1].append(index)
        return groups

    def open_ahead(self, indices: Sequence[int], *, in_use: Sequence[int]) -> None:
        """Read the first of these shards that is not open, if nothing in use is closed for it.

        One at a time; the step that needs it waits for what is left of the reading. Where there is
        no room, this stream's shards that are neither coming nor in use are closed: they are not
        read again in this epoch.
        """
        for index in [i for i, future in self._coming.items() if future.done()]:
            self.get(index)
        if self._coming:
            return
        for index in indices:
            if (self._name, index) not in self._memory.opened:
                wanted = {*indices, *in_use}
                done = [
                    (name, one)
                    for name, one in self._memory.opened
                    if name == self._name and one not in wanted
                ]
                if self._memory.make_room_by_closing(done, self._held[index]):
                    self._coming[index] = self._reader.submit(self._open_shard, index)
                return

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)
