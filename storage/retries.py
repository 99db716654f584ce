"""Retry what a network or a busy object store may get right the next time."""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
_PERMANENT_ERRNO = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.EFBIG,
}
# Codes that S3 answers with status 400 although the same request may succeed when sent again:
# the body was cut or changed on the way.
_TRANSIENT_CODES = {
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "SlowDown",
}
_TRANSIENT_STATUS = {408, 409, 425, 429}
# By name: botocore and aiohttp come with s3fs, and importing them here would make every
# `import storage` pay for S3.
_TRANSIENT_CLASSES = {
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.FlexibleChecksumError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientError",
    "aiohttp.http_exceptions.HttpProcessingError",
}

_counter_lock = threading.Lock()
_num_retries = 0


class RetriesExhausted(OSError):
    """An operation kept failing for the whole retry budget."""


@dataclass(frozen=True)
class RetryPolicy:
    """Full-jitter exponential back-off, limited by time.

    The n-th wait is uniform in [0, min(cap, base * 2**n)] seconds. A budget of 0 tries once.
    """

    budget_seconds: float = 600.0
    base_seconds: float = 0.2
    cap_seconds: float = 20.0

    @staticmethod
    def from_environment() -> "RetryPolicy":
        """Return the policy with the budget of ``SELFTRAIN_RETRY_SECONDS`` (default 600)."""
        text = os.environ.get("SELFTRAIN_RETRY_SECONDS")
        if text is None:
            return RetryPolicy()
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            raise ValueError(
                f"SELFTRAIN_RETRY_SECONDS={text!r}: must be a finite number of seconds >= 0"
            )
        return RetryPolicy(budget_seconds=seconds)


def retrying(
    operation: Callable[[], _T],
    what: str,
    *,
    policy: RetryPolicy | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> _T:
    """Return what the operation returns, trying again while its errors look transient.

    Args:
        operation: must be harmless to repeat, also after it succeeded without our hearing of it.
        what: names the operation and its object in logs and errors, e.g. ``read s3://b/k``.
        policy: None reads the environment.
        sleep: waits; replaced in tests.
        clock: monotonic seconds; replaced in tests.

    Raises:
        RetriesExhausted: from the last error, when the budget is spent.
        Exception: any error that another try cannot mend, unchanged and at once.
    """
    policy = policy or RetryPolicy.from_environment()
    begin = clock()
    attempt = 0
    while True:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            attempt += 1
            elapsed = clock() - begin
            left = policy.budget_seconds - elapsed
            if left <= 0:
                raise RetriesExhausted(
                    errno.EIO,
                    f"could not {what}: {attempt} tries in {elapsed:.1f} s, the last one: "
                    f"{type(error).__name__}: {error}. Is the store reachable? "
                    "SELFTRAIN_RETRY_SECONDS sets how long to go on trying "
                    f"(now {policy.budget_seconds:g})",
                ) from error
            ceiling = min(policy.cap_seconds, policy.base_seconds * 2.0 ** min(attempt - 1, 30))
            wait = min(random.uniform(0, ceiling), left)
            _count_retry()
            _log.warning(
                "%s: try %d failed (%s: %s), again in %.1f s",
                what,
                attempt,
                type(error).__name__,
                error,
                wait,
            )
            sleep(wait)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed when it is sent again."""
    if isinstance(error, (RetriesExhausted, *_PERMANENT)):
        return False
    status, code = http_status(error)
    if status is not None:
        if code in _TRANSIENT_CODES:
            return True
        return status in _TRANSIENT_STATUS or (status >= 500 and status != 501)
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNO
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}
    return bool(names & _TRANSIENT_CLASSES)


def http_status(error: BaseException) -> tuple[int | None, str]:
    """Return the HTTP status and S3 error code behind an error; (None, "") where there is none.

    s3fs turns botocore's ClientError into an OSError and keeps the original as its cause.
    """
    for candidate in (error, error.__cause__):
        response: Any = getattr(candidate, "response", None)
        if isinstance(response, dict):
            answer = cast("dict[str, Any]", response)
            status: Any = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code: Any = answer.get("Error", {}).get("Code", "")
            if isinstance(status, int):
                return status, str(code)
    return None, ""


def num_retries() -> int:
    """Return how many times this process has tried an operation again."""
    return _num_retries


def _count_retry() -> None:
    global _num_retries
    with _counter_lock:
        _num_retries += 1
