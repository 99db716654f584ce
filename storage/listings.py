"""What lies below a folder of a store, with sizes and the times at which it was written."""

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from storage import local_files
from storage.file_systems import file_system_of, split_url
from storage.retries import retrying
from storage.store import Store

# Under which names fsspec's file systems tell when an object was written.
_TIMES = ("LastModified", "mtime", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object of a store.

    Attributes:
        path: relative to the store.
        size: in bytes.
        modified: seconds since 1970 by the store's clock; None where the store does not tell.
    """

    path: str
    size: int
    modified: float | None


def list_with_times(store: Store, folder: str) -> list[ListedObject]:
    """Return all objects below a folder, sorted by path; none if it is not there.

    Temporary files of running writers are left out.
    """
    scheme, path = split_url(store.url_of(folder))
    found = _walk(Path(path)) if scheme == "file" else _find(scheme, path)
    return sorted(
        (ListedObject(f"{folder}/{one.path}", one.size, one.modified) for one in found),
        key=lambda one: one.path,
    )


def time_of(store: Store) -> float:
    """Return the time by the store's own clock, seconds since 1970, by writing a small object.

    Raises: OSError if the store cannot be written to or does not tell times.
    """
    name = uuid.uuid4().hex
    path = f"probes/{name}"
    store.put(path, name.encode())
    try:
        times = [one.modified for one in list_with_times(store, "probes") if one.path == path]
    finally:
        store.delete(path)
    if not times or times[0] is None:
        raise OSError(f"{store.url}: does not tell when an object was written")
    return times[0]


def _walk(folder: Path) -> list[ListedObject]:
    found: list[ListedObject] = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.startswith(local_files.TEMPORARY_PREFIX):
                continue
            file = Path(parent) / name
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                status = file.stat()
                path = file.relative_to(folder).as_posix()
                found.append(ListedObject(path, status.st_size, status.st_mtime))
    return found


def _find(scheme: str, url: str) -> list[ListedObject]:
    # `detail` is no part of our protocol: nobody else asks for it.
    find = cast("Callable[..., dict[str, dict[str, Any]]]", file_system_of(scheme).find)
    prefix = url.split("://", 1)[1].strip("/") + "/"

    def listing() -> dict[str, dict[str, Any]]:
        try:
            return find(url, detail=True)
        except FileNotFoundError:
            return {}

    found: list[ListedObject] = []
    for full_name, info in retrying(listing, f"list {url}").items():
        name = full_name.lstrip("/")
        if name.startswith(prefix) and not name.endswith("/"):
            time = next((t for key in _TIMES if (t := _seconds(info.get(key))) is not None), None)
            found.append(ListedObject(name.removeprefix(prefix), int(info["size"] or 0), time))
    return found


def _seconds(time: object) -> float | None:
    if isinstance(time, datetime):
        return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
    return float(time) if isinstance(time, int | float) else None
