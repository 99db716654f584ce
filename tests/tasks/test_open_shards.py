"""Open shards: at most so many bytes for all streams together, the next ones read ahead."""

import threading
from itertools import pairwise

import numpy as np
import pytest

from tasks.open_shards import OpenShards, ShardMemory
from tasks.shard_items import BadSampleBudget, HeldBytes, ShardItems, Targets


def items_of(num_bytes, is_mapped=False, num_labels=0):
    empty, budget = np.zeros(0, np.int64), BadSampleBudget("s", 0)
    targets = Targets(labels=np.zeros(num_labels, np.int64))
    return ShardItems([], empty, empty, empty, targets, budget, num_bytes, is_mapped)


def memory_of(max_bytes=0, max_mapped_bytes=0, max_shards=100):
    return ShardMemory(max_bytes, max_mapped_bytes, max_shards)


@pytest.fixture
def stream_of():
    """Make a stream of shards of 10 bytes each, and the list of the shards that it opened."""
    made = []

    def make(memory, name="a", num_shards=10, num_bytes=10, is_mapped=False):
        opened = []

        def open_shard(index):
            opened.append(index)
            return items_of(num_bytes, is_mapped)

        shards = OpenShards(
            memory, name, open_shard, [items_of(num_bytes, is_mapped).held] * num_shards
        )
        made.append(shards)
        return shards, opened

    yield make
    for shards in made:
        shards.close()


def held(memory):
    return sum(shard.num_bytes for shard in memory.opened.values())


def test_two_streams_share_one_limit(stream_of):
    memory = memory_of(max_bytes=35)
    (a, opened_a), (b, opened_b) = stream_of(memory, "a"), stream_of(memory, "b")
    for index in range(5):
        a.get(index)
        b.get(index)
        assert held(memory) <= 30  # a limit for each stream alone would hold 60
    assert opened_a == opened_b == [0, 1, 2, 3, 4]
    assert list(memory.opened) == [("b", 3), ("a", 4), ("b", 4)]


def test_the_least_recently_read_shard_is_closed_first(stream_of):
    memory = memory_of(max_bytes=30)
    shards, opened = stream_of(memory)
    for index in (0, 1, 2, 0, 3, 0, 1):
        shards.get(index)
    assert opened == [0, 1, 2, 3, 1]  # 0 stayed open, since it was read in between


def test_a_shard_larger_than_the_limit_is_open_alone(stream_of):
    memory = memory_of(max_bytes=5)
    shards, _ = stream_of(memory)
    for index in range(3):
        shards.get(index)
        assert list(memory.opened) == [("a", index)]


def test_shards_that_hold_nothing_are_limited_in_number(stream_of):
    memory = memory_of(max_bytes=0, max_shards=4)
    shards, opened = stream_of(memory, num_bytes=0)
    for index in range(9):
        shards.get(index)
    assert len(memory.opened) == 4
    assert opened == list(range(9))


def test_shards_of_the_cache_have_a_limit_of_their_own(stream_of):
    memory = memory_of(max_bytes=10, max_mapped_bytes=30)
    mapped, _ = stream_of(memory, "a", is_mapped=True)
    plain, _ = stream_of(memory, "b")
    plain.get(0)
    for index in range(3):
        mapped.get(index)
    assert held(memory) == 40
    mapped.get(3)  # the cache could not evict a fourth while these are in use
    assert list(memory.opened) == [("a", 1), ("a", 2), ("a", 3)]


def test_targets_count_as_memory_of_the_process_wherever_the_images_lie():
    # 3 labels are 24 bytes.
    assert items_of(10, num_labels=3).held == HeldBytes(34, 0)
    assert items_of(10, is_mapped=True, num_labels=3).held == HeldBytes(24, 10)
    memory = memory_of(max_bytes=50, max_mapped_bytes=1000)
    for index in range(3):
        memory.add(("a", index), items_of(10, is_mapped=True, num_labels=3))
    assert list(memory.opened) == [("a", 1), ("a", 2)]  # three would be 72 bytes of targets


def test_groups_fit_the_limit_and_hold_every_shard_once(stream_of):
    shards, _ = stream_of(memory_of(max_bytes=35))
    assert shards.fitting_groups(list(range(7))) == [[0, 1, 2], [3, 4, 5], [6]]
    alone, _ = stream_of(memory_of(max_bytes=0))
    assert alone.fitting_groups([4, 5]) == [[4], [5]]
    few, _ = stream_of(memory_of(max_bytes=100, max_shards=2))
    assert few.fitting_groups([1, 2, 3]) == [[1, 2], [3]]


def test_the_next_shard_is_read_ahead_while_there_is_room(stream_of):
    memory = memory_of(max_bytes=20)
    shards, opened = stream_of(memory)
    shards.get(0)
    shards.open_ahead([5, 6], in_use=[0])
    shards.get(5)
    assert opened == [0, 5]
    assert list(memory.opened) == [("a", 0), ("a", 5)]
    # There is no room for 6 unless a shard in use is closed for it.
    shards.open_ahead([5, 6], in_use=[0])
    assert opened == [0, 5]
    assert list(memory.opened) == [("a", 0), ("a", 5)]


def test_reading_ahead_goes_on_when_the_memory_is_full_of_what_was_read():
    # Known-broken variant: nothing is closed for it, and it ends with the second window for good.
    windows = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    readers = {}

    def open_shard(index):
        readers[index] = threading.current_thread().name
        return items_of(10)

    memory = memory_of(max_bytes=50)
    other = OpenShards(memory, "b", open_shard, [HeldBytes(10, 0)])
    shards = OpenShards(memory, "a", open_shard, [HeldBytes(10, 0)] * 10)
    other.get(0)
    for now, behind in pairwise(windows):
        for index in now:
            shards.get(index)
        for index in behind:
            shards.open_ahead(behind, in_use=now)
            shards.get(index)
            assert held(memory) <= 50
        assert {("a", index) for index in now} <= memory.opened.keys()
    assert [readers[index].startswith("open-a") for index in range(2, 10)] == [True] * 8
    assert ("b", 0) in memory.opened  # what another stream uses is its own business
    for one in (shards, other):
        one.close()


def test_a_shard_that_is_coming_is_waited_for_and_not_read_twice():
    is_free = threading.Event()
    opened = []

    def open_shard(index):
        opened.append(index)
        assert is_free.wait(timeout=10)
        return items_of(10)

    shards = OpenShards(memory_of(100), "a", open_shard, [HeldBytes(10, 0)] * 3)
    shards.open_ahead([2], in_use=[])
    threading.Timer(0.05, is_free.set).start()
    assert shards.get(2).num_bytes == 10
    assert opened == [2]
    shards.close()
