"""Read, write, list and delete whole objects under any fsspec URL."""

import contextlib
import errno
import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from storage import local_files
from storage.file_systems import FileSystem, file_system_of, split_url
from storage.retries import RetryPolicy, http_status, retrying

WriteMode = Literal["immutable", "create", "replace"]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# Reads of an object whose checksum differs: bits flip on the way, but bytes
# that are wrong three times are wrong at rest.
CHECKSUM_READS = 3
# Of an object that is read in parts: a Parquet footer and the pages next to it come in one request.
_RANGE_BUFFER_BYTES = 64 * 1024
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_memory_lock = threading.Lock()
_warned_unconditional = False


class CorruptObject(Exception):
    """The bytes of an object are not those that its checksum names."""


@dataclass(frozen=True)
class ObjectStat:
    """Size in bytes and a version that changes when the object does (ETag or mtime)."""

    size: int
    version: str


def join_url(base: str, *parts: str) -> str:
    """Return the URL of something below a base URL; parts may hold slashes."""
    if base.endswith("://"):
        return base + "/".join(part.strip("/") for part in parts)
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def read_object(url: str, *, sha256: str | None = None, policy: RetryPolicy | None = None) -> bytes:
    """Return all bytes of an object.

    Args:
        url: a path or URL.
        sha256: what the bytes must hash to; different bytes are read again, then refused.
        policy: how long to go on trying; None reads the environment.

    Raises:
        FileNotFoundError: there is no such object.
        CorruptObject: the checksum still differs after `CHECKSUM_READS` reads.
    """
    scheme, path = split_url(url)
    if scheme == "file":
        read: Callable[[], bytes] = Path(path).read_bytes
    else:
        file_system = file_system_of(scheme)

        def read() -> bytes:
            return file_system.cat_file(path)

    found = ""
    for _ in range(CHECKSUM_READS):
        data = _run(read, "read", url, policy)
        if sha256 is None:
            return data
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
        _log.warning("%s: read %d bytes with sha256 %s, not %s", url, len(data), found, sha256)
    raise CorruptObject(
        f"{url}: its bytes have sha256 {found}, but {sha256} was written ({CHECKSUM_READS} reads "
        "agree that it differs). The object is damaged; delete it and run again to have it "
        "written anew"
    )


def open_object(url: str, *, size: int, policy: RetryPolicy | None = None) -> BinaryIO:
    """Open an object of a known size for reads of parts of it, each tried again as a whole.

    Raises: FileNotFoundError if there is no such object, at once or at the first read.
    """
    scheme, path = split_url(url)
    if scheme == "file":
        return _run(lambda: Path(path).open("rb"), "open", url, policy)
    file_system = file_system_of(scheme)

    def read_range(start: int, end: int) -> bytes:
        return _run(
            lambda: file_system.cat_file(path, start=start, end=end), "read part of", url, policy
        )

    return cast("BinaryIO", io.BufferedReader(_Ranges(read_range, size), _RANGE_BUFFER_BYTES))


def read_soon(url: str) -> None:
    """Have a local disk begin to read a file into memory; nothing where there is none."""
    path = local_path(url)
    if path is None:
        return
    with contextlib.suppress(OSError):  # whoever reads it finds out
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


class _Ranges(io.RawIOBase):
    """An object as a file, each read a request of its own."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._position = read_range, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._read_range(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def write_object(
    url: str,
    data: bytes | bytearray | memoryview,
    mode: WriteMode = "immutable",
    *,
    policy: RetryPolicy | None = None,
) -> None:
    """Write an object whole or not at all.

    Args:
        url: a path or URL.
        data: the whole contents.
        mode: ``immutable``: the name holds the checksum, so writing it again is harmless (and
            mends a damaged object). ``create``: fail if it is there. ``replace``: a view that may
            change.
        policy: how long to go on trying; None reads the environment.

    Raises:
        FileExistsError: mode ``create`` and something is there, be it our own bytes whose
            acknowledgement was lost: the caller reads back. A store without conditional writes
            may overwrite instead.
    """
    if mode == "create" and len(data) == 0:
        # s3fs truncates the existing object.
        raise ValueError(f"{url}: an empty object cannot be created exclusively")
    scheme, path = split_url(url)
    if scheme == "file":
        local_files.write_atomically(Path(path), data, exclusive=mode == "create")
        return
    file_system = file_system_of(scheme)
    payload = bytes(data)

    def write() -> None:
        if mode != "create":
            file_system.pipe_file(path, payload)
            return
        # fsspec's memory file system looks first and then writes.
        with _memory_lock if scheme == "memory" else contextlib.nullcontext():
            _create(file_system, path, payload, url)

    _run(write, "write", url, policy)


def object_exists(url: str, *, policy: RetryPolicy | None = None) -> bool:
    """Return whether there is an object (not a folder) under this very name."""
    try:
        stat_object(url, policy=policy)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    return True


def stat_object(url: str, *, policy: RetryPolicy | None = None) -> ObjectStat:
    """Return size and version of an object.

    Raises: FileNotFoundError if there is none; IsADirectoryError for a folder.
    """
    scheme, path = split_url(url)
    if scheme == "file":

        def stat() -> ObjectStat:
            status = os.stat(path)
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "is a folder", path)
            return ObjectStat(status.st_size, str(status.st_mtime_ns))

        return _run(stat, "look at", url, policy)
    file_system = file_system_of(scheme)

    def look() -> ObjectStat:
        if scheme == "s3":
            bucket, key, _ = file_system.split_path(path)
            if not key:
                raise IsADirectoryError(errno.EISDIR, "is a bucket", url)
            head = file_system.call_s3("head_object", Bucket=bucket, Key=key)
            return ObjectStat(int(head["ContentLength"]), str(head["ETag"]))
        info = file_system.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder", url)
        version: Any = info.get("ETag") or info.get("etag") or info.get("mtime")
        return ObjectStat(int(info["size"]), str(version or file_system.modified(path)))

    return _run(look, "look at", url, policy)


def list_objects(url_folder: str, *, policy: RetryPolicy | None = None) -> list[str]:
    """Return the sorted paths, relative to the folder, of all objects below it.

    A folder that is not there is empty. Temporary files of running writers are left out.
    """
    scheme, path = split_url(url_folder)
    if scheme == "file":
        return _run(lambda: _walk(Path(path)), "list", url_folder, policy)
    file_system = file_system_of(scheme)
    prefix = path.split("://", 1)[1].strip("/") + "/"

    def find() -> list[str]:
        try:
            names = file_system.find(path)
        except FileNotFoundError:
            return []
        bare = (name.lstrip("/") for name in names)
        return sorted(
            name.removeprefix(prefix)
            for name in bare
            if name.startswith(prefix) and not name.endswith("/")
        )

    return _run(find, "list", url_folder, policy)


def list_folders(url_folder: str, *, policy: RetryPolicy | None = None) -> list[str]:
    """Return the sorted names of the folders directly below a folder; none if it is not there."""
    scheme, path = split_url(url_folder)
    if scheme == "file":

        def children() -> list[str]:
            try:
                return sorted(child.name for child in Path(path).iterdir() if child.is_dir())
            except (FileNotFoundError, NotADirectoryError):
                return []

        return _run(children, "list", url_folder, policy)
    file_system = file_system_of(scheme)
    own = path.split("://", 1)[1].strip("/")

    def listing() -> list[str]:
        try:
            entries = file_system.ls(path, detail=True)
        except FileNotFoundError:
            return []
        names = (str(e["name"]).strip("/") for e in entries if e["type"] == "directory")
        return sorted(name.rsplit("/", 1)[-1] for name in names if name != own)

    return _run(listing, "list", url_folder, policy)


def delete_object(url: str, *, policy: RetryPolicy | None = None) -> None:
    """Delete an object; one that is not there is no error."""
    scheme, path = split_url(url)
    with contextlib.suppress(FileNotFoundError):
        if scheme == "file":
            _run(lambda: Path(path).unlink(missing_ok=True), "delete", url, policy)
        else:
            file_system = file_system_of(scheme)
            _run(lambda: file_system.rm_file(path), "delete", url, policy)


def local_path(url: str) -> Path | None:
    """Return the path on this machine that a URL names, None for a remote one."""
    scheme, path = split_url(url)
    return Path(path) if scheme == "file" else None


def _create(file_system: FileSystem, path: str, data: bytes, url: str) -> None:
    global _warned_unconditional
    try:
        file_system.pipe_file(path, data, mode="create")
    except OSError as error:
        status, _ = http_status(error)
        if status == 412:
            # Swift and Ceph do not name the condition, so s3fs does not know what it was.
            raise FileExistsError(errno.EEXIST, "object exists", url) from error
        if status != 501:
            raise
        if not _warned_unconditional:
            _warned_unconditional = True
            _log.warning("%s: the store knows no conditional writes; writing without", url)
        file_system.pipe_file(path, data)


def _walk(folder: Path) -> list[str]:
    found: list[str] = []
    for parent, _, names in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        found.extend(
            (relative / name).as_posix()
            for name in names
            if not name.startswith(local_files.TEMPORARY_PREFIX)
        )
    return sorted(found)


def _run(operation: Callable[[], _T], verb: str, url: str, policy: RetryPolicy | None) -> _T:
    """Run an operation with retries; its permanent errors name the URL."""
    if "://" not in url or url.startswith(("file://", "local://")):
        return operation()
    try:
        return retrying(operation, f"{verb} {url}", policy=policy)
    except (FileNotFoundError, FileExistsError, PermissionError) as error:
        if url in str(error):
            raise
        status, code = http_status(error)
        detail = f" ({code or status})" if status is not None else ""
        codes: Mapping[type[OSError], int] = {
            FileNotFoundError: errno.ENOENT,
            FileExistsError: errno.EEXIST,
            PermissionError: errno.EACCES,
        }
        number = next(n for kind, n in codes.items() if isinstance(error, kind))
        raise OSError(number, f"cannot {verb}: {error}{detail}", url) from error
    except Exception as error:
        if type(error).__name__ not in _NO_CREDENTIALS:
            raise
        raise PermissionError(
            errno.EACCES,
            f"cannot {verb}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or run where a role gives them",
            url,
        ) from error
