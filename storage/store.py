"""A store: relative, validated paths under one URL, written whole and never changed."""

import contextlib
import errno
import hashlib
import re
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from storage import local_files, objects
from storage.objects import CorruptObject, ObjectStat, join_url
from storage.retries import RetriesExhausted, RetryPolicy

__all__ = [
    "CorruptObject",
    "ObjectsTogether",
    "Store",
    "StoreNotWritable",
    "conditional_create_works",
    "open_store",
]

_PATH = re.compile(r"[A-Za-z0-9._/=-]{1,512}")
_CHECK_SECONDS = 20.0
_Names: TypeAlias = list[str]  # inside Store, `list` is the method


class StoreNotWritable(OSError):
    """The store cannot be written to."""


@dataclass(frozen=True)
class Store:
    """Objects under one URL; safe to share between threads and to send to processes.

    Attributes:
        url: an absolute folder or a URL, without a slash at the end.
    """

    url: str

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return objects.local_path(self.url) is not None

    def url_of(self, path: str) -> str:
        """Return the URL of a path in the store."""
        return join_url(self.url, checked_path(path))

    def read(self, path: str, *, sha256: str | None = None) -> bytes:
        """Return the bytes of an object.

        Raises: FileNotFoundError; CorruptObject if the checksum differs, also when read again.
        """
        return objects.read_object(self.url_of(path), sha256=sha256)

    def open(self, path: str, *, size: int) -> BinaryIO:
        """Open an object for reads of parts of it, which nothing verifies.

        Raises: FileNotFoundError, at once or at the first read.
        """
        return objects.open_object(self.url_of(path), size=size)

    def read_soon(self, path: str) -> None:
        """Have a local disk begin to read an object that is read soon; nothing on other stores."""
        objects.read_soon(self.url_of(path))

    def exists(self, path: str) -> bool:
        """Return whether there is an object under this path."""
        return objects.object_exists(self.url_of(path))

    def stat(self, path: str) -> ObjectStat:
        """Return size and version of an object; FileNotFoundError if there is none."""
        return objects.stat_object(self.url_of(path))

    def put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Write an object whose name tells its content: writing it again is harmless."""
        objects.write_object(self.url_of(path), data, "immutable")

    @contextlib.contextmanager
    def writing_together(self) -> "Generator[ObjectsTogether]":
        """Have many objects put for less than one by one: they are there when this is left.

        Left by an error, those that were not committed are not there, or not all of them.
        """
        files = local_files.FilesTogether()
        try:
            yield (together := ObjectsTogether(self, files))
            together.commit()
        finally:
            files.discard()

    def create(self, path: str, data: bytes) -> bytes:
        """Write an object if none is there, and return what is there now: that is the truth.

        It looks first, so that stores without conditional writes keep what they have, too.
        """
        url = self.url_of(path)
        with contextlib.suppress(FileNotFoundError):
            return objects.read_object(url)
        # After FileExistsError, be it of our own lost acknowledgement, what is there decides.
        with contextlib.suppress(FileExistsError):
            objects.write_object(url, data, "create")
        return objects.read_object(url)

    def replace(self, path: str, data: bytes) -> None:
        """Write a view, which may change; never used for results."""
        objects.write_object(self.url_of(path), data, "replace")

    def list(self, folder: str = "") -> _Names:
        """Return the sorted paths, relative to the store, of all objects below a folder."""
        base = self.url_of(folder) if folder else self.url
        prefix = folder.strip("/") + "/" if folder else ""
        return [prefix + name for name in objects.list_objects(base)]

    def folders(self, folder: str = "") -> _Names:
        """Return the sorted names of the folders directly below a folder."""
        return objects.list_folders(self.url_of(folder) if folder else self.url)

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is no error."""
        objects.delete_object(self.url_of(path))

    def put_file(self, path: str, local: Path, sha256: str | None = None) -> str:
        """Write a local file's bytes as an immutable object and return their SHA-256.

        Raises: CorruptObject if the file is not what the given checksum names.
        """
        data = local.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256:
            raise CorruptObject(f"{local}: its bytes have sha256 {found}, not {sha256}")
        self.put(path, data)
        return found

    def fetch_file(self, path: str, local: Path, sha256: str) -> None:
        """Write a verified object to a local file, whole or not at all."""
        local_files.write_atomically(local, self.read(path, sha256=sha256), exclusive=False)


class ObjectsTogether:
    """Puts objects that need not be there before all of them are: see `Store.writing_together`."""

    def __init__(self, store: Store, files: local_files.FilesTogether) -> None:
        """Take the store and what writes files of a local one."""
        self._store, self._files = store, files

    def put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        """Write an object as `Store.put` does; on a local disk it is there after `commit`."""
        local = objects.local_path(self._store.url_of(path))
        if local is None:
            self._store.put(path, data)
        else:
            self._files.write(local, data)

    def commit(self) -> None:
        """Have all be there, safe from a power cut, that were put before."""
        self._files.commit()


def open_store(url: str, *, check_writable: bool = False) -> Store:
    """Return the store under a folder or URL.

    Args:
        url: a folder (relative ones are taken from here), ``file://``, ``s3://bucket/prefix``,
            ``memory://name`` (this process only) or another fsspec URL.
        check_writable: write and delete a small object now, so that a run that could not commit
            fails before its first stage.

    Raises:
        ValueError: the URL holds credentials, is chained, or of an unknown kind.
        StoreNotWritable: naming the URL, the cause and what to do.
    """
    local = objects.local_path(url)
    store = Store(str(local) if local is not None else url.rstrip("/"))
    if check_writable:
        _check_writable(store)
    return store


def conditional_create_works(store: Store) -> bool:
    """Return whether the store refuses to create an object that is there.

    A fact for provenance: nothing relies on it, but where it is False two drivers with results
    that are not bit-equal should not share a stage.
    """
    url = store.url_of(f"probes/{uuid.uuid4().hex}")
    try:
        objects.write_object(url, b"first", "create")
        try:
            objects.write_object(url, b"second", "create")
        except FileExistsError:
            return True
        return False
    finally:
        objects.delete_object(url)


def checked_path(path: str) -> str:
    """Return the path, or raise ValueError if it could lead out of the store."""
    if not _PATH.fullmatch(path):
        raise ValueError(
            f"path {path!r}: only letters, digits and . _ / = - are allowed, 1 to 512 of them"
        )
    if path.startswith("/") or any(part in {"", ".", ".."} for part in path.split("/")):
        raise ValueError(f"path {path!r}: must be relative, without empty, '.' or '..' parts")
    return path


def _check_writable(store: Store) -> None:
    configured = RetryPolicy.from_environment()
    policy = RetryPolicy(budget_seconds=min(_CHECK_SECONDS, configured.budget_seconds))
    url = store.url_of(f"probes/{uuid.uuid4().hex}")
    probe = uuid.uuid4().bytes
    try:
        objects.write_object(url, probe, policy=policy)
        found = objects.read_object(url, policy=policy)
        objects.delete_object(url, policy=policy)
    except (OSError, CorruptObject) as error:
        raise StoreNotWritable(
            getattr(error, "errno", None) or errno.EIO,
            f"the store {store.url} cannot be written to: {error}. {_remedy(store, error)}",
        ) from error
    if found != probe:
        raise StoreNotWritable(
            errno.EIO,
            f"the store {store.url} returned other bytes than were written; do not use it",
        )


def _remedy(store: Store, error: Exception) -> str:
    if objects.local_path(store.url) is not None:
        return "Choose a folder that you may write to with --store or SELFTRAIN_STORE"
    if isinstance(error, RetriesExhausted):
        return "Check the network, AWS_ENDPOINT_URL and the region"
    if isinstance(error, FileNotFoundError):
        return "Create the bucket first, or correct its name with --store or SELFTRAIN_STORE"
    return "Check the credentials and the bucket's policy (read, write, list, delete)"
