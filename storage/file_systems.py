"""The file system behind a URL: which URLs are taken, and how S3 is spoken to."""

# ruff: noqa: D102 (the methods of the protocol are described by fsspec)

import os
from collections.abc import Callable
from typing import Any, Protocol, cast

_LOCAL_SCHEMES = {"file", "local"}

_file_systems: dict[tuple[object, ...], "FileSystem"] = {}


class FileSystem(Protocol):
    """What we use of fsspec, which has no types of its own."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> object: ...
    def info(self, path: str) -> dict[str, Any]: ...
    def find(self, path: str) -> list[str]: ...
    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]: ...
    def rm_file(self, path: str) -> None: ...
    def modified(self, path: str) -> object: ...
    def split_path(self, path: str) -> tuple[str, str, object]: ...
    def call_s3(self, method: str, **kwargs: str) -> dict[str, Any]: ...


def holds_credentials(url: str) -> bool:
    """Return whether something stands before the @ of a host; in a path an @ is a letter."""
    scheme, mark, rest = url.partition("://")
    return bool(mark) and scheme not in _LOCAL_SCHEMES and "@" in rest.split("/", 1)[0]


def split_url(url: str) -> tuple[str, str]:
    """Return scheme and path (local) or scheme and the whole URL (anything else)."""
    if "::" in url:
        raise ValueError(f"{url!r}: chained URLs (::) are not supported; give the object's own URL")
    if url.startswith("pipe:"):
        raise ValueError(f"{url!r}: commands are never run; give a path or a URL")
    scheme, mark, rest = url.partition("://")
    if not mark:
        if not url:
            raise ValueError("an empty string is no path; give a folder or a URL")
        return "file", os.path.abspath(url)
    if scheme in _LOCAL_SCHEMES:
        return "file", os.path.abspath(rest)
    if holds_credentials(url):
        raise ValueError(
            f"{scheme}://...: credentials do not belong in a URL, which is stored and shown; set "
            "them in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...) or use a role"
        )
    return ("s3" if scheme == "s3a" else scheme), url


def file_system_of(scheme: str) -> FileSystem:
    """Return this process's file system; a forked child and a changed environment get their own."""
    # Here, for it takes a while, and processes that read a local store start without it.
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    if scheme not in fsspec.available_protocols():
        raise ValueError(
            f"{scheme}://: unknown kind of store; use a folder, s3://bucket/prefix or another "
            "protocol of fsspec whose package is installed"
        )
    options: dict[str, Any] = {"skip_instance_cache": True}
    environment: tuple[str, ...] = ()
    if scheme == "s3":
        environment = tuple(f"{k}={v}" for k, v in sorted(os.environ.items()) if k[:4] == "AWS_")
        # Stale listings hide other writers' objects for ever. The retries
        # are ours: s3fs and botocore would multiply them.
        options["use_listings_cache"] = False
        options["config_kwargs"] = {
            "retries": {"max_attempts": 2, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 30,
            "max_pool_connections": 64,
        }
    key = (scheme, os.getpid(), environment)
    if key not in _file_systems:
        make = cast("Callable[..., FileSystem]", fsspec.filesystem)  # pyright: ignore[reportUnknownMemberType]
        file_system = make(scheme, **options)
        if scheme == "s3":
            file_system.retries = 2  # pyright: ignore[reportAttributeAccessIssue]
        # Two threads may both come here; without a lock, a fork cannot leave one held for ever.
        _file_systems.setdefault(key, file_system)
    return _file_systems[key]
