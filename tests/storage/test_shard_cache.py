"""The node's shard cache: shared by processes, bounded, and right whatever is killed."""

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from storage.samples import CorruptShard
from storage.shard_cache import CacheConfig, CacheTooSmall, ShardCache, refuse_small_cache

SIZE = 1000

# Reads the shards named by numbers through the cache and prints which of them it had to fetch.
READER = """
import contextlib, hashlib, os, sys, time
from pathlib import Path
from storage.shard_cache import CacheConfig, ShardCache

folder, max_bytes, numbers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
cache = ShardCache(CacheConfig(dir=str(folder), max_bytes=max_bytes))
for number in map(int, numbers):
    data = bytes([number]) * 1000

    def fetch():
        time.sleep(0.02)
        print("fetched", number, flush=True)
        return data

    view = cache.read(hashlib.sha256(data).hexdigest(), 1000, fetch)
    assert bytes(view) == data
    del view
    held = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another reader may evict it now
            held += entry.stat().st_size
    assert held <= max_bytes, held
"""


def content(number):
    return bytes([number]) * SIZE


def digest(number):
    return hashlib.sha256(content(number)).hexdigest()


class Fetched(list):
    """The numbers of the shards that were fetched."""

    def read(self, cache, number):
        def fetch():
            self.append(number)
            return content(number)

        return cache.read(digest(number), SIZE, fetch)


def cache_in(folder, max_shards):
    return ShardCache(CacheConfig(dir=str(folder), max_bytes=max_shards * SIZE))


def held_by(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def start_reader(folder, numbers, *, max_shards=100, **environment):
    arguments = [str(folder), str(max_shards * SIZE), ",".join(map(str, numbers))]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_shard_is_fetched_once_and_read_as_it_is(tmp_path):
    fetched = Fetched()
    for _ in range(3):
        assert bytes(fetched.read(cache_in(tmp_path, 4), 7)) == content(7)
    assert fetched == [7]
    assert held_by(tmp_path) == [f"{digest(7)}.tar"]


def test_the_least_recently_read_shard_goes_first(tmp_path):
    fetched, cache = Fetched(), cache_in(tmp_path, 3)
    for number in (1, 2, 3, 1, 4):  # 4 needs room: 2 was read longest ago
        fetched.read(cache, number)
        time.sleep(0.01)
    assert held_by(tmp_path) == sorted(f"{digest(n)}.tar" for n in (1, 3, 4))
    fetched.read(cache, 2)  # 3 goes: evicting by time of writing would take 1
    assert held_by(tmp_path) == sorted(f"{digest(n)}.tar" for n in (1, 2, 4))
    assert fetched == [1, 2, 3, 4, 2]


def test_what_is_in_use_is_not_evicted_and_its_bytes_count(tmp_path):
    fetched, cache = Fetched(), cache_in(tmp_path, 2)
    in_use = [fetched.read(cache, number) for number in (1, 2)]
    with pytest.raises(CacheTooSmall, match="may hold 2000 bytes, of which 2000 are in use"):
        fetched.read(cache, 3)
    assert held_by(tmp_path) == sorted(f"{digest(n)}.tar" for n in (1, 2))
    part_of_it = in_use.pop(0)[10:20]  # a view of a part keeps the file in use
    in_use.clear()
    assert bytes(fetched.read(cache, 3)) == content(3)
    assert held_by(tmp_path) == sorted(f"{digest(n)}.tar" for n in (1, 3))
    assert bytes(part_of_it) == content(1)[10:20]


@pytest.mark.parametrize("wrong", [b"", content(9), content(1) + b"x"])
def test_wrong_bytes_are_refused_and_leave_nothing(tmp_path, wrong):
    cache = cache_in(tmp_path, 4)
    with pytest.raises(CorruptShard, match=digest(1)):
        cache.read(digest(1), SIZE, lambda: wrong)
    assert held_by(tmp_path) == []
    fetched = Fetched()
    assert bytes(fetched.read(cache, 1)) == content(1)


def test_a_shard_that_was_cut_on_the_disk_is_fetched_again(tmp_path):
    fetched, cache = Fetched(), cache_in(tmp_path, 4)
    fetched.read(cache, 1)
    (tmp_path / f"{digest(1)}.tar").write_bytes(b"cut")
    assert bytes(fetched.read(cache, 1)) == content(1)
    assert fetched == [1, 1]


def test_processes_share_what_one_of_them_fetched(tmp_path):
    readers = [start_reader(tmp_path, range(6)) for _ in range(3)]
    output = "".join(reader.communicate(timeout=60)[0] for reader in readers)
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert sorted(output.split("\n")) == ["", *(f"fetched {n}" for n in range(6))]


def test_processes_together_stay_below_the_limit(tmp_path):
    # Each process has one shard in use and another coming; the readers assert the limit.
    orders = [[1, 2, 3, 4, 5, 6], [4, 5, 6, 1, 2, 3], [6, 5, 4, 3, 2, 1]]
    readers = [start_reader(tmp_path, order, max_shards=4) for order in orders]
    for reader in readers:
        reader.communicate(timeout=60)
        assert reader.returncode == 0
    assert len(held_by(tmp_path)) <= 4


@pytest.mark.parametrize("moment", ["cache.fetched", "cache.written"])
def test_a_kill_leaves_no_half_shard_and_no_lost_room(tmp_path, moment):
    killed = start_reader(tmp_path, [1], SELFTRAIN_CRASH_AT=moment)
    assert killed.wait(timeout=60) == -9
    assert held_by(tmp_path) == [f"{digest(1)}.part"]
    # The part takes the room of one shard; another shard gets it, and 1 is fetched again.
    fetched, cache = Fetched(), cache_in(tmp_path, 1)
    assert bytes(fetched.read(cache, 2)) == content(2)
    assert held_by(tmp_path) == [f"{digest(2)}.tar"]
    assert bytes(fetched.read(cache, 1)) == content(1)
    assert held_by(tmp_path) == [f"{digest(1)}.tar"]
    assert fetched == [2, 1]


def test_a_shard_is_taken_up_where_another_process_was_killed(tmp_path):
    assert start_reader(tmp_path, [1], SELFTRAIN_CRASH_AT="cache.written").wait(timeout=60) == -9
    fetched = Fetched()
    assert bytes(fetched.read(cache_in(tmp_path, 1), 1)) == content(1)
    assert fetched == [1]  # what a killed process wrote is not trusted
    assert held_by(tmp_path) == [f"{digest(1)}.tar"]


def test_a_cache_smaller_than_what_is_read_at_a_time_is_refused(tmp_path):
    config = CacheConfig(dir=str(tmp_path), max_bytes=999)
    with pytest.raises(CacheTooSmall, match=r"max_bytes=999 is less than the 1000 bytes"):
        refuse_small_cache(config, open_bytes=1000, corpus_bytes=5000)
    refuse_small_cache(
        CacheConfig(dir=str(tmp_path), max_bytes=1000), open_bytes=1000, corpus_bytes=1
    )


def test_a_disk_smaller_than_the_cache_is_refused_with_the_numbers(tmp_path):
    much = 2**60
    config = CacheConfig(dir=str(tmp_path / "new"), max_bytes=much)
    with pytest.raises(CacheTooSmall, match=rf"bytes free and the cache holds 0; {2**59} are"):
        refuse_small_cache(config, open_bytes=1, corpus_bytes=2**59)
    # What fits is enough, however large the limit is.
    refuse_small_cache(config, open_bytes=1, corpus_bytes=1000)


def test_a_shard_evicted_while_the_cache_is_measured_counts_nothing(tmp_path):
    (tmp_path / f"{digest(1)}.tar").symlink_to("evicted")  # listed, and gone when it is looked at
    config = CacheConfig(dir=str(tmp_path), max_bytes=1000)
    refuse_small_cache(config, open_bytes=1, corpus_bytes=1000)


def test_a_part_gets_its_name_only_while_nobody_counts_the_bytes(tmp_path):
    # Renamed during a listing it could be missing under both names, and the limit be exceeded.
    cache, seen, counting = cache_in(tmp_path, 2), [], []

    def stop_counting():
        time.sleep(0.2)
        seen.extend(held_by(tmp_path))
        os.close(counting.pop())

    def fetch():
        counting.append(os.open(tmp_path / "lock", os.O_RDWR))
        fcntl.flock(counting[0], fcntl.LOCK_EX)
        threading.Thread(target=stop_counting).start()
        return content(1)

    assert bytes(cache.read(digest(1), SIZE, fetch)) == content(1)
    assert seen == [f"{digest(1)}.part"]
    assert held_by(tmp_path) == [f"{digest(1)}.tar"]
