"""Decoding in processes gives the batches that threads give, in their order, bit by bit."""

import multiprocessing

import pytest
import torch

import tasks.decode_processes
from models.views import HflipViewConfig, KRandomViewConfig
from storage.samples import RawSample
from tasks.decode_processes import DecodersLost, view_batches_from_processes
from tasks.shard_items import BadSampleBudget
from tasks.teacher_views import Shown, TeacherViews
from tasks.view_batches import OpenShard, view_batches

BAD = b"GIF89a not one of ours"
TEACHERS = (Shown(8, 0, "bilinear"), Shown(6, 2, "bicubic"))


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    tasks.decode_processes._pool.cache_clear()


@pytest.fixture
def shards(lab):
    def shard(stem, count, bad=()):
        samples = [
            RawSample(
                f"{stem}/{i}",
                memoryview(BAD if i in bad else lab.png(i % 3, i, size=12)),
                "png",
                i % 3,
                0,
            )
            for i in range(count)
        ]
        return OpenShard(f"{ord(stem):064x}", samples, BadSampleBudget(stem, 0))

    # More than a chunk, none, only bad ones, and bad ones on both sides of a chunk's end.
    return [shard("a", 70, {31, 32}), shard("b", 0), shard("c", 3, range(3)), shard("d", 40)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [HflipViewConfig(), KRandomViewConfig(k=2, seed=5)])
def test_processes_give_the_batches_of_threads(shards, config):
    views = TeacherViews(config, TEACHERS)
    expected = list(view_batches(shards, views, batch_size=50, threads=0))

    def decoded():
        return list(
            view_batches_from_processes(shards, views, batch_size=50, processes=2, is_pinned=False)
        )

    found = decoded()
    children = {child.pid for child in multiprocessing.active_children()}
    again = decoded()
    assert {child.pid for child in multiprocessing.active_children()} == children
    assert [one.bad.keys() for one in again] == [one.bad.keys() for one in found]
    pairs = zip(found, again, strict=True)
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in pairs if a.views)
    assert [(one.shard.budget.stem, one.number, one.is_last) for one in found] == [
        ("a", 0, False),
        ("a", 1, True),
        ("b", 0, True),
        ("c", 0, True),
        ("d", 0, True),
    ]
    for one, other in zip(found, expected, strict=True):
        assert [s.key for s in one.samples] == [s.key for s in other.samples]
        assert {k: str(v) for k, v in one.bad.items()} == {k: str(v) for k, v in other.bad.items()}
        assert len(one.views) == len(other.views)
        for view, wanted in zip(one.views, other.views, strict=True):
            assert torch.equal(view, wanted)
    assert [len(one.bad) for one in found] == [2, 0, 0, 3, 0]
    assert len(found[0].views) == 4, "two views of two teachers"


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_no_missing_batch(shards):
    views = TeacherViews(HflipViewConfig(), TEACHERS)
    many = [shards[0]] * 50
    batches = view_batches_from_processes(many, views, batch_size=50, processes=2, is_pinned=False)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DecodersLost, match="df /dev/shm"):
        list(batches)
    expected = list(view_batches(shards, views, batch_size=50, threads=0))
    found = list(
        view_batches_from_processes(shards, views, batch_size=50, processes=2, is_pinned=False)
    )
    assert [len(one.samples) for one in found] == [len(one.samples) for one in expected]


@pytest.mark.slow
def test_batches_that_nobody_takes_are_not_given_to_the_next(shards):
    views = TeacherViews(HflipViewConfig(), TEACHERS)

    def decoding(given):
        return view_batches_from_processes(
            given, views, batch_size=50, processes=2, is_pinned=False
        )

    given_up = decoding([shards[0]] * 20)
    next(given_up)
    given_up.close()
    assert [one.shard.budget.stem for one in decoding(shards)] == ["a", "a", "b", "c", "d"]


@pytest.mark.slow
def test_a_shard_that_cannot_be_read_is_told_as_it_is(shards):
    def reading():
        yield shards[0]
        raise FileNotFoundError("shard b is gone")

    views = TeacherViews(HflipViewConfig(), TEACHERS)
    with pytest.raises(FileNotFoundError, match="shard b is gone"):
        list(
            view_batches_from_processes(
                reading(), views, batch_size=50, processes=2, is_pinned=False
            )
        )
