"""Whole objects under any URL, and the faults of real object stores."""

import errno
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from storage import objects
from storage.objects import (
    CorruptObject,
    delete_object,
    join_url,
    list_folders,
    list_objects,
    object_exists,
    read_object,
    stat_object,
    write_object,
)
from storage.retries import RetriesExhausted, RetryPolicy
from storage.store import Store, conditional_create_works


class ClientError(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.response = {
            "ResponseMetadata": {"HTTPStatusCode": status},
            "Error": {"Code": code},
        }


def answered(error: OSError, status: int, code: str) -> OSError:
    """Return the error as s3fs raises it, with botocore's as its cause."""
    error.__cause__ = ClientError(status, code)
    return error


class FaultyS3:
    """A dictionary in the place of s3fs that misbehaves as planned.

    faults: raised before anything is done, one a call. lost_acknowledgements: writes that are
    done and reported as failed. flips: reads that return one flipped bit. names_condition:
    whether a 412 becomes FileExistsError (AWS) or EINVAL (Swift, Ceph). conditional: "honoured",
    "ignored" (rclone) or "refused" (501).
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: list[Exception] = []
        self.lost_acknowledgements = 0
        self.flips = 0
        self.names_condition = True
        self.conditional = "honoured"
        self.calls: list[str] = []

    def _begin(self, call: str) -> None:
        self.calls.append(call)
        if self.faults:
            raise self.faults.pop(0)

    def cat_file(self, path: str) -> bytes:
        self._begin("cat_file")
        if path not in self.objects:
            raise answered(FileNotFoundError("no such key"), 404, "NoSuchKey")
        data = bytearray(self.objects[path])
        if self.flips:
            self.flips -= 1
            data[len(data) // 2] ^= 2
        return bytes(data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        self._begin(f"pipe_file {mode}")
        if mode == "create" and self.conditional == "refused":
            raise answered(OSError(errno.ENOSYS, "not implemented"), 501, "NotImplemented")
        if mode == "create" and self.conditional == "honoured" and path in self.objects:
            error = (
                FileExistsError("exists")
                if self.names_condition
                else OSError(errno.EINVAL, "At least one of the pre-conditions did not hold")
            )
            raise answered(error, 412, "PreconditionFailed")
        self.objects[path] = value
        if self.lost_acknowledgements:
            self.lost_acknowledgements -= 1
            raise answered(OSError(errno.EIO, "internal error"), 500, "InternalError")

    def rm_file(self, path: str) -> None:
        self.objects.pop(path, None)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyS3:
    suite = FaultyS3()

    def file_system_of(_: str) -> Any:
        return suite

    def no_wait(operation: Any, what: str, *, policy: RetryPolicy | None = None) -> Any:
        return real(operation, what, policy=policy, sleep=lambda _: None)

    real = objects.retrying
    monkeypatch.setattr(objects, "file_system_of", file_system_of)
    monkeypatch.setattr(objects, "retrying", no_wait)
    return suite


def test_objects_are_written_read_looked_at_listed_and_deleted(store_url: str):
    url = join_url(store_url, "a/b", "c.bin")
    assert not object_exists(url)
    write_object(url, b"bytes")
    assert read_object(url) == b"bytes"
    assert read_object(url, sha256=hashlib.sha256(b"bytes").hexdigest()) == b"bytes"
    assert object_exists(url)
    assert stat_object(url).size == 5
    write_object(join_url(store_url, "a/d"), b"x")
    write_object(join_url(store_url, "ab/e"), b"x")
    assert list_objects(store_url) == ["a/b/c.bin", "a/d", "ab/e"]
    assert list_objects(join_url(store_url, "a")) == ["b/c.bin", "d"]
    assert list_folders(store_url) == ["a", "ab"]
    assert list_folders(join_url(store_url, "a")) == ["b"]
    delete_object(url)
    delete_object(url)
    assert not object_exists(url)
    assert list_objects(store_url) == ["a/d", "ab/e"]


def test_what_is_not_there_is_an_error_naming_it_and_lists_as_empty(store_url: str):
    url = join_url(store_url, "missing")
    with pytest.raises(FileNotFoundError) as caught:
        read_object(url)
    assert url in str(caught.value)
    with pytest.raises(FileNotFoundError):
        stat_object(url)
    assert list_objects(url) == []
    assert list_folders(url) == []


def test_a_folder_is_no_object_and_an_object_is_no_folder(store_url: str):
    write_object(join_url(store_url, "folder/file"), b"x")
    assert not object_exists(join_url(store_url, "folder"))
    assert list_objects(join_url(store_url, "folder/file")) == []
    assert list_folders(join_url(store_url, "folder/file")) == []


def test_creating_fails_where_something_is_and_keeps_it(store_url: str):
    url = join_url(store_url, "one")
    write_object(url, b"first", "create")
    with pytest.raises(FileExistsError):
        write_object(url, b"second", "create")
    assert read_object(url) == b"first"


def test_the_version_changes_with_the_contents(store_url: str):
    url = join_url(store_url, "view")
    write_object(url, b"first", "replace")
    before = stat_object(url)
    write_object(url, b"other", "replace")
    assert stat_object(url).size == before.size
    assert stat_object(url).version != before.version


def test_an_empty_object_is_never_created_exclusively(store_url: str):
    with pytest.raises(ValueError, match="cannot be created exclusively"):
        write_object(join_url(store_url, "marker"), b"", "create")


def test_writing_an_immutable_object_again_mends_a_damaged_one(store_url: str):
    url = join_url(store_url, "data")
    sha256 = hashlib.sha256(b"good").hexdigest()
    write_object(url, b"g00d", "replace")
    with pytest.raises(CorruptObject, match=f"but {sha256} was written"):
        read_object(url, sha256=sha256)
    write_object(url, b"good")
    assert read_object(url, sha256=sha256) == b"good"


@pytest.mark.s3
def test_an_object_of_several_parts_comes_back_whole(s3_url: str):
    data = bytes(range(256)) * (110 * 2**20 // 256)  # above s3fs's limit of 100 MiB for one PUT
    write_object(join_url(s3_url, "large"), data, "create")
    assert read_object(join_url(s3_url, "large")) == data


def test_temporary_files_of_running_writers_are_not_listed(tmp_path: Path):
    write_object(str(tmp_path / "a" / "data"), b"x")
    (tmp_path / "a" / ".tmp-123").write_bytes(b"half")
    assert list_objects(str(tmp_path)) == ["a/data"]


def test_local_paths_and_file_urls_name_the_same_object(tmp_path: Path):
    write_object(f"file://{tmp_path}/x", b"x")
    assert read_object(str(tmp_path / "x")) == b"x"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("simplecache::s3://b/k", "chained URLs"),
        ("pipe:touch /tmp/x", "commands are never run"),
        ("s3://key:secret@bucket/k", "credentials do not belong in a URL"),
        ("nonsense://b/k", "unknown kind of store"),
        ("", "an empty string is no path"),
    ],
)
def test_urls_that_are_not_taken_are_refused_before_anything_is_opened(url: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_object(url)
    assert "secret" not in str(caught.value)


def test_transient_faults_are_tried_again(faulty: FaultyS3):
    busy = [answered(OSError(errno.EBUSY, "slow down"), 503, "SlowDown") for _ in range(4)]
    faulty.faults = [*busy, ConnectionResetError()]
    write_object("s3://b/k", b"data")
    assert faulty.objects == {"s3://b/k": b"data"}
    assert len(faulty.calls) == 6


def test_an_outage_ends_in_an_error_that_names_the_object(faulty: FaultyS3):
    faulty.faults = [TimeoutError("no answer")] * 3
    with pytest.raises(RetriesExhausted, match=r"could not read s3://b/k: 1 tries"):
        read_object("s3://b/k", policy=RetryPolicy(budget_seconds=0))


def test_a_refused_request_is_not_repeated_and_names_the_object(faulty: FaultyS3):
    faulty.faults = [answered(PermissionError("Access Denied"), 403, "AccessDenied")]
    with pytest.raises(PermissionError, match="AccessDenied") as caught:
        read_object("s3://b/k")
    assert "s3://b/k" in str(caught.value)
    assert faulty.calls == ["cat_file"]


@pytest.mark.parametrize("names_condition", [True, False])
def test_a_lost_acknowledgement_of_a_create_is_harmless(faulty: FaultyS3, names_condition: bool):
    faulty.names_condition = names_condition
    faulty.lost_acknowledgements = 1
    # The bytes were stored, the answer was lost, the second try is told that they exist.
    assert Store("s3://b").create("k", b"ours") == b"ours"
    assert faulty.calls == ["cat_file", "pipe_file create", "pipe_file create", "cat_file"]


def test_a_lost_acknowledgement_of_a_put_is_harmless(faulty: FaultyS3):
    faulty.lost_acknowledgements = 3
    Store("s3://b").put("k", b"ours")
    assert faulty.objects == {"s3://b/k": b"ours"}


def test_bits_that_flip_on_the_way_are_read_again(faulty: FaultyS3):
    write_object("s3://b/k", b"data")
    sha256 = hashlib.sha256(b"data").hexdigest()
    faulty.flips = 2
    assert read_object("s3://b/k", sha256=sha256) == b"data"
    # Negative control: without a checksum the flip goes through.
    faulty.flips = 1
    assert read_object("s3://b/k") != b"data"


@pytest.mark.parametrize(
    ("conditional", "works"), [("honoured", True), ("ignored", False), ("refused", False)]
)
def test_stores_without_conditional_writes_are_recognised_and_keep_what_they_have(
    faulty: FaultyS3, conditional: str, works: bool
):
    faulty.conditional = conditional
    store = Store("s3://b")
    assert conditional_create_works(store) is works
    assert faulty.objects == {}
    assert store.create("k", b"first") == b"first"
    assert store.create("k", b"second") == b"first"


def test_missing_credentials_are_an_error_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID"):
        read_object("s3://bucket/key")


@pytest.mark.s3
def test_threads_share_one_file_system(s3_url: str):
    results: list[bytes] = []

    def work(index: int) -> None:
        url = join_url(s3_url, f"object-{index}")
        write_object(url, b"%d" % index)
        results.append(read_object(url))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(b"%d" % i for i in range(32))
