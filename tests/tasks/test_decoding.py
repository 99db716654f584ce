"""Samples to views: any number of threads gives the same batches, cut by position in the shard."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from storage.samples import RawSample
from tasks.decoding import decode_threads, decoded_batches
from tasks.images import BadImage, clean_view


@dataclass
class Shard:
    stem: str
    samples: list


@pytest.fixture
def shards(lab):
    def shard(stem, count):
        return Shard(
            stem,
            [
                RawSample(f"{stem}/{i}", memoryview(lab.png(i % 3, i)), "png", None, 0)
                for i in range(count)
            ],
        )

    return [shard("a", 5), shard("b", 0), shard("c", 2), shard("d", 4)]


def views_of(shard, sample, pixels):
    """Two views of different sizes."""
    return [clean_view(pixels, 8, 0, "bilinear"), clean_view(pixels, 4, 0, "bilinear")]


def batches(shards, threads):
    return [
        (b.shard.stem, b.number, b.is_last, [s.key for s in b.samples], b.views)
        for b in decoded_batches(shards, views_of, batch_size=2, threads=threads)
    ]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_are_cut_by_position_and_never_cross_shards(shards, threads):
    found = batches(shards, threads)
    assert [one[:4] for one in found] == [
        ("a", 0, False, ["a/0", "a/1"]),
        ("a", 1, False, ["a/2", "a/3"]),
        ("a", 2, True, ["a/4"]),
        ("b", 0, True, []),
        ("c", 0, True, ["c/0", "c/1"]),
        ("d", 0, False, ["d/0", "d/1"]),
        ("d", 1, True, ["d/2", "d/3"]),
    ]
    first = found[0][4][0]
    assert not isinstance(first, BadImage)
    assert [view.shape for view in first] == [(8, 8, 3), (4, 4, 3)]


def test_threads_change_no_bit(shards):
    for one, other in zip(batches(shards, 0), batches(shards, 4), strict=True):
        for ours, theirs in zip(one[4], other[4], strict=True):
            assert not isinstance(ours, BadImage)
            assert not isinstance(theirs, BadImage)
            for view, same in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(view, same)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_image_is_told_in_its_place(shards, threads):
    shards[0].samples[1] = RawSample("a/1", memoryview(b"GIF89a"), "png", None, 0)
    views = batches(shards, threads)[0][4]
    assert isinstance(views[1], BadImage)
    assert not isinstance(views[0], BadImage)
    assert len(views[0]) == 2


def test_shards_are_opened_when_they_are_due(shards):
    opened = []

    def one_by_one():
        for shard in shards:
            opened.append(shard.stem)
            yield shard

    decoding = decoded_batches(one_by_one(), views_of, batch_size=2, threads=2)
    assert next(decoding).shard.stem == "a"
    assert opened == ["a"]  # its three batches are those that are decoded ahead
    assert next(decoding).number == 1
    assert opened == ["a", "b"]
    decoding.close()


def test_one_cpu_thread_decodes_in_turn_and_several_decode_ahead():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert decode_threads(torch.device("cpu")) == 0
        assert decode_threads(torch.device("cuda")) == 1
        torch.set_num_threads(6)
        assert decode_threads(torch.device("cpu")) == 6
    finally:
        torch.set_num_threads(before)


def test_beside_a_gpu_each_thread_that_decodes_takes_one_core(shards):
    seen = []

    def views_of(shard, sample, pixels):
        seen.append(torch.get_num_threads())
        return [pixels]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in decoded_batches(shards, views_of, batch_size=2, threads=2, is_beside_gpu=True):
            pass
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 11
