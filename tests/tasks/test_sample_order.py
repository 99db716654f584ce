"""The order of reading: permutations, independent of how they are read, mixed over shards."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.sample_order import OPEN_SHARDS, SampleOrder

MANY_SHARDS = [7, 0, 5, 11] * 10  # 40 shards, 230 items, windows of 16, 16 and 8 shards
GOLDEN = [(2, 1, 0), (0, 1, 0), (0, 0, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1)]


def read(order, start, count):
    shards, items, epochs = order.read(start, count)
    return list(zip(shards.tolist(), items.tolist(), epochs.tolist(), strict=True))


def all_items(items_per_shard):
    return {(shard, item) for shard, n in enumerate(items_per_shard) for item in range(n)}


@pytest.mark.parametrize("items_per_shard", [[1], [5], [3, 4], [0, 3, 0, 2, 0], MANY_SHARDS])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_is_a_permutation_of_all_items(items_per_shard, epoch):
    order, n = SampleOrder(items_per_shard, stream=1), sum(items_per_shard)
    found = read(order, epoch * n, n)
    assert {(shard, item) for shard, item, _ in found} == all_items(items_per_shard)
    assert len(found) == n
    assert {e for _, _, e in found} == {epoch}


@given(
    cuts=st.lists(st.integers(0, 700), max_size=6),
    items_per_shard=st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(sum),
)
@settings(max_examples=40, deadline=None)
def test_what_is_read_does_not_depend_on_how_it_is_cut(cuts, items_per_shard):
    whole = read(SampleOrder(items_per_shard, stream=3), 0, 700)
    order = SampleOrder(items_per_shard, stream=3)
    edges = [0, *sorted(cuts), 700]
    pieces = [
        piece
        for start, end in itertools.pairwise(edges)
        if end > start
        for piece in read(order, start, end - start)
    ]
    assert pieces == whole


def test_positions_can_be_read_backwards_and_by_another_instance():
    order = SampleOrder(MANY_SHARDS, stream=3)
    whole = read(SampleOrder(MANY_SHARDS, stream=3), 0, 500)
    assert [read(order, p, 1)[0] for p in reversed(range(500))] == whole[::-1]


def test_epochs_and_streams_have_orders_of_their_own():
    n = sum(MANY_SHARDS)
    first, second = SampleOrder(MANY_SHARDS, stream=1), SampleOrder(MANY_SHARDS, stream=2)
    orders = [[e[:2] for e in read(o, k * n, n)] for o in (first, second) for k in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_a_batch_may_cross_epochs_and_be_longer_than_one():
    found = read(SampleOrder([2, 1], stream=5), 1, 10)
    assert [epoch for _, _, epoch in found] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_a_reader_needs_one_window_of_shards_at_a_time():
    order, n = SampleOrder(MANY_SHARDS, stream=1), sum(MANY_SHARDS)
    shards = order.read(0, n)[0]
    seen = list(dict.fromkeys(shards.tolist()))
    assert len(seen) == 30  # 10 of 40 are empty
    # Ranks of first occurrence: no shard of a later window comes before the end of an earlier one.
    last = {shard: int(np.flatnonzero(shards == shard)[-1]) for shard in seen}
    first = {shard: int(np.flatnonzero(shards == shard)[0]) for shard in seen}
    most_open = max(
        sum(first[s] <= position <= last[s] for s in seen) for position in range(0, n, 3)
    )
    assert most_open <= OPEN_SHARDS


def test_items_of_a_window_are_mixed_over_its_shards():
    shards = SampleOrder([50, 50, 50, 50], stream=1).read(0, 200)[0]
    # By chance 3 of 4 neighbours come from different shards.
    changes = float((shards[1:] != shards[:-1]).mean())
    assert 0.65 < changes < 0.85


def test_copies_of_an_image_do_not_lie_side_by_side():
    # A shard's copies are neighbouring items: 40 images with 10 copies each.
    items = SampleOrder([400], stream=1).read(0, 400)[1] // 10
    # By chance 9 of 399 neighbours are of the same image: 9 pairs in all.
    assert int((items[1:] == items[:-1]).sum()) <= 20


def test_the_first_positions_of_a_stream_are_these():
    # Golden: a change of the order is a change of every training, and needs a new stage version.
    assert read(SampleOrder([3, 0, 4], stream=42), 5, 6) == GOLDEN


def test_nothing_to_read_is_an_error():
    with pytest.raises(ValueError, match="no items to read: the labelled set or the selection"):
        SampleOrder([0, 0], stream=1)


def test_the_shards_behind_a_window_are_those_that_are_read_after_it():
    order, n = SampleOrder(MANY_SHARDS, stream=1), sum(MANY_SHARDS)
    for epoch in (0, 1):
        ends = [end + epoch * n for end in order._windows_of(epoch)[1].tolist()]
        for start, end in zip([epoch * n, *ends[:-1]], ends, strict=True):
            behind = order.next_shards(start)
            assert behind == order.next_shards(end - 1) == order.shards_at(end)
            # The next window holds nothing but these, and each of them.
            after = order.next_shards(end)
            length = sum(MANY_SHARDS[shard] for shard in behind)
            assert set(order.read(end, length)[0].tolist()) == set(behind)
            assert after != behind


def test_windows_without_items_are_not_read_ahead():
    # 40 shards, of which only a few have items: whole windows are empty.
    for stream in range(20):
        order = SampleOrder([3] + [0] * 38 + [5], stream=stream)
        seen = [order.next_shards(position) for position in range(16)]
        assert all(seen)
        assert {shard for shards in seen for shard in shards} <= {0, 39}
