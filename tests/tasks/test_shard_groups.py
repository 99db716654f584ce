"""Groups by work: every shard once, in order, enough for all workers, and the last ones small."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.corpus import Shard
from tasks.shard_groups import group_shards, work_of


def shards_of(sizes, num_bytes=0):
    return [Shard(f"s{i:05d}", f"{i:064x}", size, num_bytes) for i, size in enumerate(sizes)]


def sizes_of(groups):
    return [[shard.num_samples for shard in group] for group in groups]


def test_work_is_half_the_images_and_half_their_bytes():
    # 1,000 images of 110 kB: 500 for the network and 110e6 / 100,000 / 2 = 550 to decode.
    assert work_of(shards_of([1000], num_bytes=110_000_000)) == pytest.approx(1050)


@pytest.mark.parametrize(
    ("sizes", "num_workers", "expected"),
    [
        ([], 2, []),
        ([5, 5, 5], 1, [[5, 5, 5]]),  # one worker, little work: one group
        ([5, 5, 5], 2, [[5], [5], [5]]),  # four groups for each of two, but there are three shards
        ([9, 1, 1, 1, 1, 1], 1, [[9, 1, 1, 1, 1, 1]]),
    ],
)
def test_small_corpora_are_cut_for_the_workers_only(sizes, num_workers, expected):
    assert sizes_of(group_shards(shards_of(sizes), "auto", num_workers=num_workers)) == expected


def test_groups_are_cut_by_work_and_not_by_number():
    # 160,000 of work in images alone (half counts): 8 groups of 20,000. The large shard is one.
    sizes = [40_000, *[4_000] * 70]
    groups = sizes_of(group_shards(shards_of(sizes), "auto", num_workers=1))
    assert groups == [[40_000]] + [[4_000] * 10] * 7


def test_groups_of_a_gpu_are_larger():
    shards = shards_of([10_000] * 150)  # half of 1,500,000 are 750,000 of work
    assert (
        sizes_of(group_shards(shards, "auto", num_workers=1, device="cuda")) == [[10_000] * 50] * 3
    )


def test_groups_of_several_workers_shrink_evenly():
    # Four groups for each of two workers, in the proportion of the odd numbers 15, 13, ..., 1.
    groups = group_shards(shards_of([100] * 64), "auto", num_workers=2)
    assert [len(group) for group in groups] == [15, 13, 11, 9, 7, 5, 3, 1]


def test_a_worker_that_is_late_and_slow_keeps_the_other_waiting_for_less_than_a_shard():
    groups = group_shards(shards_of([100] * 64), "auto", num_workers=2)
    # A shard takes one worker 1.0; the other starts 5.0 later and takes 1.2.
    workers = [(0.0, 1.0), (5.0, 1.2)]
    for group in groups:  # handed to whoever is free first
        free_at, seconds = heapq.heappop(workers)
        heapq.heappush(workers, (free_at + len(group) * seconds, seconds))
    (first, _), (last, _) = sorted(workers)
    assert last - first < 1.0  # 6.2 with eight equal groups


def test_a_large_corpus_has_a_hundred_groups_or_one_for_each_worker():
    shards = shards_of([100_000] * 10_000)
    groups = group_shards(shards, "auto", num_workers=8)
    sizes = [len(group) for group in groups]
    # In the proportion of 199, 197, ..., 1, which add up to 10,000.
    assert sizes == list(range(199, 0, -2))
    # With one group each there is nothing to even out at the end.
    assert {len(group) for group in group_shards(shards, "auto", num_workers=300)} <= {33, 34}


def test_no_group_is_more_than_half_of_what_a_worker_gets():
    # 100 groups for 40 workers, 2.5 each: half of 2.5 is 1.25 of the mean of 100 shards for the
    # first (1.2475, for it lies half a step below), and 0.75 are left for the last.
    groups = group_shards(shards_of([100_000] * 10_000), "auto", num_workers=40)
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (125, 75)


def test_a_given_number_of_shards_is_obeyed():
    groups = group_shards(shards_of([1] * 5), 2, num_workers=8)
    assert [len(group) for group in groups] == [2, 2, 1]


@given(
    sizes=st.lists(st.integers(0, 10**6), max_size=60),
    num_workers=st.integers(1, 40),
    num_bytes=st.integers(0, 10**9),
)
def test_every_shard_is_in_one_group_and_every_worker_has_one(sizes, num_workers, num_bytes):
    shards = shards_of(sizes, num_bytes)
    groups = group_shards(shards, "auto", num_workers=num_workers)
    assert [shard for group in groups for shard in group] == shards
    assert all(groups)
    assert min(num_workers, len(shards)) <= len(groups) <= max(100, num_workers)
