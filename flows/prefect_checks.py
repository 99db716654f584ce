"""Checks of the Prefect server that runs would use."""

import base64
import ipaddress
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import prefect
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL
from pydantic import SecretStr

from flows.checks import Check

_TIMEOUT_SECONDS = 10
_PATIENCE_SECONDS = 60  # with a busy server that is to be used, and not only looked at


class ServerOutOfReach(ConnectionError):
    """The Prefect server that is configured does not answer, or not to us.

    Attributes:
        found: what it does, with its address.
        remedy: what to do.
    """

    def __init__(self, found: str, remedy: str) -> None:
        """Say what the server does and what helps."""
        super().__init__(f"the Prefect server {found}. {remedy}")
        self.found = found
        self.remedy = remedy


def version_of_server(url: str, *, timeout_seconds: float = _PATIENCE_SECONDS) -> str:
    """Return the version of the server whose API is at `url`, which shows that it lets us in.

    Raises: ServerOutOfReach.
    """
    try:
        answer = httpx.get(f"{url}/admin/version", headers=_headers(), timeout=timeout_seconds)
    except httpx.HTTPError as error:
        raise ServerOutOfReach(
            f"{url} does not answer: {type(error).__name__}",
            "Start it, correct PREFECT_API_URL, or unset it: a run then starts its own",
        ) from error
    if answer.status_code in (401, 403):
        raise ServerOutOfReach(
            f"{url} asks for authentication (status {answer.status_code})",
            "Set PREFECT_API_AUTH_STRING to what the server has in PREFECT_SERVER_API_AUTH_STRING",
        )
    if not answer.is_success:
        raise ServerOutOfReach(
            f"{url}/admin/version answers with status {answer.status_code}",
            "PREFECT_API_URL must end in /api and name a Prefect server",
        )
    return str(answer.json())


def check_prefect() -> Iterator[Check]:
    """Ask the server that PREFECT_API_URL names whether it is there, which, and open to whom."""
    url = PREFECT_API_URL.value()
    if not url:
        yield Check(
            "Prefect server",
            "ok",
            f"none is configured: a run starts its own on loopback, Prefect {prefect.__version__},"
            " without analytics",
        )
        return
    try:
        version = version_of_server(url, timeout_seconds=_TIMEOUT_SECONDS)
    except ServerOutOfReach as error:
        yield Check("Prefect server", "fail", error.found, error.remedy)
        return
    headers = _headers()
    yield _check_version(url, version)
    yield from _check_access(url, has_credentials=bool(headers))
    yield from _check_settings(url, headers)


def _headers() -> dict[str, str]:
    auth, key = PREFECT_API_AUTH_STRING.value(), PREFECT_API_KEY.value()
    if auth is not None:
        encoded = base64.b64encode(_plain(auth).encode()).decode()
        return {"Authorization": f"Basic {encoded}"}
    return {} if key is None else {"Authorization": f"Bearer {_plain(key)}"}


def _plain(secret: SecretStr | str) -> str:
    """Return what a setting holds; temporary ones come back as they were given."""
    return secret if isinstance(secret, str) else secret.get_secret_value()


def _check_version(url: str, theirs: str) -> Check:
    ours = prefect.__version__
    found = f"{url}: Prefect {theirs}, here {ours}"
    if _minor(theirs) < _minor(ours):
        return Check(
            "Prefect server", "fail", found, f"Upgrade the server to {ours}: it is older than us"
        )
    if _minor(theirs) > _minor(ours):
        return Check("Prefect server", "warn", found, "Only servers of our own version are tested")
    return Check("Prefect server", "ok", found)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _check_access(url: str, *, has_credentials: bool) -> Iterator[Check]:
    """Ask once more without credentials: who may do so may start runs and read parameters."""
    answer = httpx.get(f"{url}/admin/version", timeout=_TIMEOUT_SECONDS)
    is_open = answer.is_success
    host = urlsplit(url).hostname or ""
    if is_open and not _is_loopback(host):
        yield Check(
            "Prefect authentication",
            "warn",
            f"{host} lets anyone in who reaches it",
            "Set PREFECT_SERVER_API_AUTH_STRING there and PREFECT_API_AUTH_STRING here, or keep it"
            " on a private network",
        )
    elif is_open and has_credentials:
        yield Check(
            "Prefect authentication",
            "warn",
            "credentials are set here, and the server does not ask for any",
            "Set PREFECT_SERVER_API_AUTH_STRING on the server",
        )
    else:
        what = "on loopback, without" if is_open else "the server asks for it"
        yield Check("Prefect authentication", "ok", what)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_settings(url: str, headers: dict[str, str]) -> Iterator[Check]:
    answer = httpx.get(f"{url}/admin/settings", headers=headers, timeout=_TIMEOUT_SECONDS)
    if not answer.is_success:  # an older or another server: then it is not known
        return
    settings: Any = answer.json()
    server = settings.get("server", {}) if isinstance(settings, dict) else {}
    yield from _check_analytics(server.get("analytics_enabled"))
    yield from _check_leases(server.get("concurrency", {}).get("lease_storage"))


def _check_analytics(is_on: bool | None) -> Iterator[Check]:
    if is_on is True:
        yield Check(
            "Prefect analytics",
            "warn",
            "the server sends usage data to Prefect",
            "Set PREFECT_SERVER_ANALYTICS_ENABLED=false and DO_NOT_TRACK=1 where it is started",
        )
    elif is_on is False:
        yield Check("Prefect analytics", "ok", "off")


def _check_leases(storage: str | None) -> Iterator[Check]:
    """Look at where the server keeps who holds which place in a concurrency limit."""
    if storage is None:
        return
    if storage.endswith(".memory"):
        yield Check(
            "Prefect leases",
            "warn",
            "kept in the server's memory: when it is started anew, runs of deployments crash within"
            " four minutes, and go on from their last checkpoint where they are started again",
            "Set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="
            "prefect.server.concurrency.lease_storage.filesystem where it is started",
        )
    else:
        yield Check("Prefect leases", "ok", storage.rpartition(".")[2])
