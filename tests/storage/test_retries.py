"""What is tried again, for how long, and what never is."""

import errno
import logging

import pytest

from storage.retries import (
    RetriesExhausted,
    RetryPolicy,
    http_status,
    is_transient,
    num_retries,
    retrying,
)


class ClientError(Exception):
    """What botocore raises: an answer of the server with an error code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.response = {
            "ResponseMetadata": {"HTTPStatusCode": status},
            "Error": {"Code": code},
        }


def as_s3fs_raises(status: int, code: str) -> OSError:
    error = OSError(errno.EINVAL, "translated")
    error.__cause__ = ClientError(status, code)
    return error


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [
        (400, "InvalidArgument", False),
        (401, "Unauthorized", False),
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
        (405, "MethodNotAllowed", False),
        (412, "PreconditionFailed", False),
        (501, "NotImplemented", False),
        (400, "RequestTimeout", True),
        (400, "BadDigest", True),
        (409, "ConditionalRequestConflict", True),
        (429, "TooManyRequests", True),
        (500, "InternalError", True),
        (503, "SlowDown", True),
    ],
)
def test_the_servers_answer_decides_whether_to_try_again(status: int, code: str, transient: bool):
    assert is_transient(ClientError(status, code)) is transient
    assert is_transient(as_s3fs_raises(status, code)) is transient
    assert http_status(as_s3fs_raises(status, code)) == (status, code)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError(),
        FileExistsError(),
        IsADirectoryError(),
        NotADirectoryError(),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.EDQUOT, "quota"),
        ValueError("ours"),
        RetriesExhausted(errno.EIO, "already tried"),
    ],
)
def test_errors_that_another_try_cannot_mend_are_raised_at_once(error: Exception):
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        retrying(fail, "read x")
    assert caught.value is error
    assert len(calls) == 1


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), OSError("whatever")])
def test_network_errors_are_tried_again_counted_and_logged(
    error: Exception, caplog: pytest.LogCaptureFixture
):
    clock, faults = Clock(), [error, error]
    before = num_retries()

    def flaky() -> str:
        if faults:
            raise faults.pop()
        return "ok"

    with caplog.at_level(logging.WARNING):
        assert retrying(flaky, "read x", sleep=clock.sleep, clock=clock) == "ok"
    assert num_retries() - before == 2
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        "read x: try 1 failed",
        "read x: try 2 failed",
    ]


def test_botocores_network_errors_are_transient_and_missing_credentials_are_not():
    from aiohttp import ClientPayloadError
    from botocore.exceptions import (
        EndpointConnectionError,
        FlexibleChecksumError,
        NoCredentialsError,
        ReadTimeoutError,
    )

    assert is_transient(EndpointConnectionError(endpoint_url="http://x"))
    assert is_transient(ReadTimeoutError(endpoint_url="http://x"))
    assert is_transient(FlexibleChecksumError(error_msg="differs"))
    assert is_transient(ClientPayloadError())
    assert not is_transient(NoCredentialsError())


def test_the_budget_is_time_and_its_end_names_the_operation_and_the_switch():
    clock, calls = Clock(), []

    def fail() -> None:
        calls.append(1)
        clock.now += 1.0
        raise TimeoutError("too slow")

    policy = RetryPolicy(budget_seconds=60, base_seconds=1, cap_seconds=8)
    with pytest.raises(RetriesExhausted, match="could not read s3://b/k") as caught:
        retrying(fail, "read s3://b/k", policy=policy, sleep=clock.sleep, clock=clock)
    assert "SELFTRAIN_RETRY_SECONDS" in str(caught.value)
    assert "too slow" in str(caught.value)
    # Never sleeps past the budget; one last try follows it.
    assert 60 <= clock.now - 1000.0 <= 62
    # Waits lie in [0, min(8, 2**n)].
    assert all(0 <= w <= min(8, 2.0**n) for n, w in enumerate(clock.waits))
    assert len(calls) == len(clock.waits) + 1


def test_a_budget_of_zero_tries_once():
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise TimeoutError

    with pytest.raises(RetriesExhausted):
        retrying(fail, "x", policy=RetryPolicy(budget_seconds=0))
    assert len(calls) == 1


def test_the_budget_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SELFTRAIN_RETRY_SECONDS", raising=False)
    assert RetryPolicy.from_environment().budget_seconds == 600
    monkeypatch.setenv("SELFTRAIN_RETRY_SECONDS", "7.5")
    assert RetryPolicy.from_environment().budget_seconds == 7.5
    for wrong in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("SELFTRAIN_RETRY_SECONDS", wrong)
        with pytest.raises(ValueError, match=f"SELFTRAIN_RETRY_SECONDS='{wrong}'"):
            RetryPolicy.from_environment()
