"""Tests of reading what the store holds of each of many shards."""

import threading
import time

import pytest

from storage.corpus import Shard
from tasks import shard_records

SHARDS = [Shard(f"part-{i:03d}", f"{i:064x}", 1, 0) for i in range(200)]


@pytest.mark.parametrize("num_shards", [0, 1, 4, 5, 200])
@pytest.mark.parametrize("waits", [True, False])
def test_every_shard_is_found_in_its_order_by_threads_if_reading_waits(
    num_shards: int, waits: bool
) -> None:
    readers: set[int] = set()

    def read(shard: Shard) -> str:
        readers.add(threading.get_ident())
        if waits:
            time.sleep(0.002)
        else:
            started = time.thread_time()
            while time.thread_time() < started + 0.0005:
                pass
        return shard.stem.upper()

    found = shard_records.read_of_each(SHARDS[:num_shards], read)

    assert found == [(shard, shard.stem.upper()) for shard in SHARDS[:num_shards]]
    if waits and num_shards == len(SHARDS):
        assert len(readers) > 1


@pytest.mark.parametrize(("worked", "is_alone"), [(0.9, True), (0.1, False)])
def test_what_does_not_wait_is_read_by_the_calling_thread(
    monkeypatch: pytest.MonkeyPatch, worked: float, is_alone: bool
) -> None:
    class Clocks:
        perf_counter = iter([0.0, 1.0]).__next__
        thread_time = iter([0.0, worked]).__next__

    monkeypatch.setattr(shard_records, "time", Clocks)

    found = shard_records.read_of_each(SHARDS, lambda shard: threading.get_ident())

    assert ({reader for _, reader in found} == {threading.get_ident()}) == is_alone


@pytest.mark.parametrize("failing", [2, 150])
def test_what_reading_raises_is_raised(failing: int) -> None:
    def read(shard: Shard) -> None:
        if shard is SHARDS[failing]:
            raise ValueError(shard.stem)

    with pytest.raises(ValueError, match=SHARDS[failing].stem):
        shard_records.read_of_each(SHARDS, read)
