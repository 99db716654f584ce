"""Files that appear whole or not at all on a local or network file system."""

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
# What file systems without hard links (FAT, some FUSE mounts) answer to link().
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or move the store to a larger one",
    errno.EDQUOT: "the disk quota is used up: free space or raise the quota",
    errno.EROFS: "the file system is mounted read-only: choose another store",
    errno.EACCES: "no permission: check the owner and mode of the folder, or choose another store",
    errno.EPERM: "not permitted: check the owner and mode of the folder, or choose another store",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another store",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter folder",
}


def write_atomically(path: Path, data: bytes | bytearray | memoryview, *, exclusive: bool) -> None:
    """Write a file that other processes see whole or not at all, and that survives a power cut.

    The bytes go to a temporary file in the same folder, which is synced and then linked
    (exclusive) or renamed into place; the folder is synced after. A failed write leaves nothing
    behind; a killed one leaves at most a temporary file (see `leftovers`).

    Args:
        path: parent folders are created.
        data: the whole contents.
        exclusive: fail if the file is there; otherwise replace it.

    Raises:
        FileExistsError: exclusive, and the file is there. Of several writers exactly one wins.
        OSError: with the errno of the cause, the final path and what to do about it.
    """
    temporary = _temporary_of(path)
    try:
        _make_folder(path.parent)
        try:
            _write_synced(temporary, data)
            if exclusive:
                _link_exclusively(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise explained(error, path, f"cannot write {len(data)} bytes") from error


class FilesTogether:
    """Files that are written one by one, and of which other processes see none before `commit`.

    A sync waits for the disk, and with most file systems for all that was written before. So the
    disk begins to write each file at once, and all are synced at the end: of many small files that
    takes less than half as long as syncing each when it is written. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written: list[tuple[int, Path, Path]] = []

    def write(self, path: Path, data: bytes | bytearray | memoryview) -> None:
        """Write a file of a name that tells its content; it appears with `commit`.

        Raises: OSError, with the errno of the cause, the final path and what to do about it.
        """
        temporary = _temporary_of(path)
        with _telling(path, f"cannot write {len(data)} bytes"):
            _make_folder(path.parent)
            written = _create(temporary), temporary, path
            try:
                _write_all(written[0], data)
                # Linux begins to write out what is said to be of no more use.
                os.posix_fadvise(written[0], 0, 0, os.POSIX_FADV_DONTNEED)
            except BaseException:
                _remove([written])
                raise
        with self._lock:
            self._written.append(written)

    def commit(self) -> None:
        """Make safe what was written, then visible. Raises: OSError as `write` does."""
        with self._lock:
            files, self._written = self._written, []
        remaining = list(files)
        try:
            for descriptor, _, path in files:
                with _telling(path, "cannot make a file safe"):
                    os.fsync(descriptor)
            for descriptor, temporary, path in files:
                with _telling(path, "cannot name a file"):
                    os.replace(temporary, path)
                os.close(descriptor)
                remaining.pop(0)
            for folder in {path.parent for _, _, path in files}:
                with _telling(folder, "cannot make a folder safe"):
                    _sync_folder(folder)
        finally:
            _remove(remaining)

    def discard(self) -> None:
        """Remove what was written and not committed."""
        with self._lock:
            files, self._written = self._written, []
        _remove(files)


def _remove(files: Sequence[tuple[int, Path, Path]]) -> None:
    for descriptor, temporary, _ in files:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _telling(path: Path, what: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise explained(error, path, what) from error


def explained(error: OSError, path: Path, what: str) -> OSError:
    """Return the error again, of the same class and errno, naming the path and a remedy."""
    code = error.errno or errno.EIO
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(code)
    text = f"{what}: {reason}" + (f" ({remedy})" if remedy else "")
    return OSError(code, text, str(path))


def leftovers(folder: Path, *, older_than_seconds: float) -> list[Path]:
    """Return the temporary files below a folder that killed writers left, oldest first.

    Args:
        folder: searched with all its subfolders.
        older_than_seconds: by modification time; longer than any write takes.
    """
    limit = time.time() - older_than_seconds
    found: list[tuple[float, Path]] = []
    for file in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            modified = file.stat().st_mtime
            if modified <= limit and file.is_file():
                found.append((modified, file))
    return [file for _, file in sorted(found)]


def _temporary_of(path: Path) -> Path:
    return path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"


def _create(path: Path) -> int:
    # os.open, not tempfile: the file's mode then follows the user's umask.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _write_synced(path: Path, data: bytes | bytearray | memoryview) -> None:
    descriptor = _create(path)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _link_exclusively(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Still whole or not at all; that only one writer wins is lost, and readers read back.
        if path.exists():
            raise FileExistsError(errno.EEXIST, "file exists", str(path)) from error
        os.replace(temporary, path)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    # Another writer may create it in between; a file of that name fails below, in open().
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Have the names of the files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; they do so on their own.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}:
            raise
    finally:
        os.close(descriptor)
