"""A node's cache of whole shards, shared by its processes: files by digest, oldest use out first.

Whatever is killed, and whenever, leaves a cache that is right: a shard has its name only when all
of its bytes, checked against the digest, are on the disk. All locks are the kernel's (flock), which
end with the process; no file has to be cleaned up by hand. The folder must be on a local disk.

* `<digest>.tar`: a whole shard. Who reads it holds a shared lock, and only what is not locked is
  evicted, so that the bytes on the disk never exceed `max_bytes`.
* `<digest>.part`: a shard that is being fetched, at its full size from the first moment, which
  reserves the room. Who fetches holds an exclusive lock; a part without one is left over.
* `lock`: held while room is made, and while a part gets its name.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from storage import crash_points
from storage.samples import CorruptShard

_WHOLE, _PART = ".tar", ".part"


class CacheConfig(BaseModel):
    """Where a node keeps the shards that it has read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: str = Field(
        min_length=1,
        description="Folder on a local disk of the node; all processes of the node share it.",
    )
    max_bytes: int = Field(
        ge=1, description="Most that the folder may hold; the least recently read shards go first."
    )


class CacheTooSmall(OSError):
    """The cache, or the disk that it is on, cannot hold what is read at a time."""


class ShardCache:
    """The shards in one folder; safe for threads and processes alike.

    Args:
        config: where, and how much.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._folder = Path(config.dir)
        self._max_bytes = config.max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, digest: str, num_bytes: int, fetch: Callable[[], bytes]) -> memoryview:
        """Return a shard as a mapped file, fetching it if it is not there.

        Of several that want the same shard one fetches and the others wait for it. The file stays
        on the disk as long as the view, or a part of it, is in use.

        Args:
            digest: sha256 of the shard.
            num_bytes: its size.
            fetch: reads it from where it lies.
        Raises: CorruptShard if what is fetched has another size or digest; CacheTooSmall if what is
            in use leaves no room for it.
        """
        while True:
            found = self._mapped(digest, num_bytes)
            if found is not None:
                return found
            with self._claimed(digest) as part:
                # Another process may have finished it while this one waited.
                is_there = (self._folder / f"{digest}{_WHOLE}").exists()
                if part is not None and not is_there:
                    self._fill(part, digest, num_bytes, fetch)

    def _mapped(self, digest: str, num_bytes: int) -> memoryview | None:
        path = self._folder / f"{digest}{_WHOLE}"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            # The lock belongs to the open file, which the mapping keeps open.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_at(descriptor, path):
                return None  # evicted before the lock was there
            if os.fstat(descriptor).st_size != num_bytes:
                path.unlink(missing_ok=True)  # cut by hand or by a broken disk
                return None
            os.utime(descriptor)  # last use; the disk may be mounted without access times
            return memoryview(mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _claimed(self, digest: str) -> Generator[int | None]:
        """Give the locked part of a shard to one process; None to those that waited in vain."""
        path = self._folder / f"{digest}{_PART}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):
                yield None
                return
            try:
                yield descriptor
            finally:
                # After a success it was renamed, and another's part may have the name.
                if _is_at(descriptor, path):
                    path.unlink()
        finally:
            os.close(descriptor)

    def _fill(self, part: int, digest: str, num_bytes: int, fetch: Callable[[], bytes]) -> None:
        self._reserve(part, digest, num_bytes)
        data = fetch()
        if len(data) != num_bytes or hashlib.sha256(data).hexdigest() != digest:
            raise CorruptShard(
                f"what was fetched for shard {digest} has {len(data)} bytes and another digest, or "
                f"not its {num_bytes} bytes. Put the shard back, or index the corpus again"
            )
        crash_points.reach("cache.fetched")
        view = memoryview(data)
        written = 0
        while written < num_bytes:
            written += os.pwrite(part, view[written : written + 2**26], written)
        os.fsync(part)
        crash_points.reach("cache.written")
        # Who adds up what is there must find it under one of its two names.
        with _locked(self._folder / "lock"):
            os.rename(self._folder / f"{digest}{_PART}", self._folder / f"{digest}{_WHOLE}")

    def _reserve(self, part: int, digest: str, num_bytes: int) -> None:
        """Make room by evicting what is not in use, and take it."""
        with _locked(self._folder / "lock"):
            os.ftruncate(part, 0)  # what a killed process left counts no longer
            files = self._files(keep=f"{digest}{_PART}")
            taken = sum(file.num_bytes for file in files)
            for file in files:
                if taken + num_bytes <= self._max_bytes:
                    break
                if _removed_if_unused(file.path):
                    taken -= file.num_bytes
            if taken + num_bytes > self._max_bytes:
                raise CacheTooSmall(
                    f"the shard cache {self._folder} may hold {self._max_bytes} bytes, of which "
                    f"{taken} are in use; a shard of {num_bytes} bytes does not fit. Raise "
                    "cache.max_bytes"
                )
            try:
                os.posix_fallocate(part, 0, num_bytes)
            except OSError as error:
                raise CacheTooSmall(
                    f"the disk of the shard cache {self._folder} has no room for a shard of "
                    f"{num_bytes} bytes ({error.strerror}): free some, or lower cache.max_bytes"
                ) from error

    def _files(self, *, keep: str) -> list["_File"]:
        """Return what takes room, the parts first and then by last use; not the part `keep`."""
        found: list[tuple[bool, int, _File]] = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith((_WHOLE, _PART)) and entry.name != keep:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    is_whole = entry.name.endswith(_WHOLE)
                    file = _File(Path(entry.path), status.st_size)
                    found.append((is_whole, status.st_mtime_ns, file))
        return [file for _, _, file in sorted(found, key=lambda one: one[:2])]


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int


def refuse_small_cache(config: CacheConfig, *, open_bytes: int, corpus_bytes: int) -> None:
    """Refuse a cache that would thrash or fill its disk, before anything is read.

    Args:
        config: of the cache.
        open_bytes: of the shards that are read at a time.
        corpus_bytes: of all shards.
    Raises: CacheTooSmall, with the numbers.
    """
    if config.max_bytes < open_bytes:
        raise CacheTooSmall(
            f"cache.max_bytes={config.max_bytes} is less than the {open_bytes} bytes of the shards "
            "that are read at a time: every step would fetch shards anew. Raise it to at least "
            f"{open_bytes}, or write smaller shards"
        )
    Path(config.dir).mkdir(parents=True, exist_ok=True)
    there = 0
    for entry in os.scandir(config.dir):
        if entry.name.endswith(_WHOLE):
            with contextlib.suppress(FileNotFoundError):  # another process may evict it now
                there += entry.stat().st_size
    free, needed = shutil.disk_usage(config.dir).free, min(config.max_bytes, corpus_bytes)
    if free + there < needed:
        raise CacheTooSmall(
            f"the disk of cache.dir={config.dir} has {free} bytes free and the cache holds {there};"
            f" {needed} are needed (the smaller of cache.max_bytes={config.max_bytes} and the "
            f"{corpus_bytes} bytes of the shards). Lower cache.max_bytes, or use another disk"
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _removed_if_unused(path: Path) -> bool:
    """Delete a file unless a process reads it or fetches into it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        if _is_at(descriptor, path):
            path.unlink()
        return True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
