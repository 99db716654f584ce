"""The store: paths, create-once, checksums, races, and stores that cannot be used."""

import errno
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import local_files, objects
from storage.addresses import sha256_hex
from storage.store import (
    CorruptObject,
    Store,
    StoreNotWritable,
    checked_path,
    conditional_create_works,
    open_store,
)


def test_create_returns_what_is_there(store: Store):
    assert store.create("a/record.json", b"first") == b"first"
    assert store.create("a/record.json", b"second") == b"first"
    assert store.read("a/record.json") == b"first"


def test_of_16_racing_creators_one_wins_and_all_read_the_same(store: Store):
    barrier = Barrier(16)

    def create(index: int) -> bytes:
        barrier.wait()
        return store.create("race/record.json", b"writer %d" % index)

    with ThreadPoolExecutor(16) as pool:
        results = set(pool.map(create, range(16)))
    assert results == {store.read("race/record.json")}


def test_of_16_racing_exclusive_writes_all_but_one_are_refused(store: Store):
    barrier = Barrier(16)
    url = store.url_of("race/one")

    def write(index: int) -> bool:
        barrier.wait()
        try:
            objects.write_object(url, b"writer %d" % index, "create")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(write, range(16))) == 1


def test_put_replace_and_delete(store: Store):
    store.put("d/object", b"data")
    store.put("d/object", b"data")
    store.replace("view.json", b"old")
    store.replace("view.json", b"new")
    assert store.read("view.json") == b"new"
    assert store.exists("d/object")
    assert store.stat("d/object").size == 4
    store.delete("d/object")
    store.delete("d/object")
    assert not store.exists("d/object")


def test_objects_put_together_are_there_at_the_end_and_on_disk_not_before(store: Store):
    with store.writing_together() as together:
        together.put("d/a", b"a")
        assert store.exists("d/a") is not store.is_local
        together.commit()
        assert store.read("d/a") == b"a"
        together.put("d/b", b"b")
    assert store.read("d/b") == b"b"
    store.read_soon("d/b")
    store.read_soon("d/not-there")


def test_objects_put_together_on_disk_are_given_up_by_an_error(local_store: Store):
    def fail():
        with local_store.writing_together() as together:
            together.put("d/a", b"a")
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        fail()
    assert local_store.list() == []


def test_list_returns_paths_relative_to_the_store(store: Store):
    for path in ("b/2", "b/1", "b/c/3", "bb/4", "a"):
        store.put(path, b"x")
    assert store.list() == ["a", "b/1", "b/2", "b/c/3", "bb/4"]
    assert store.list("b") == ["b/1", "b/2", "b/c/3"]
    assert store.list("none") == []
    assert store.folders() == ["b", "bb"]
    assert store.folders("b") == ["c"]


def test_bytes_that_are_not_what_the_checksum_names_are_refused(store: Store):
    store.replace("data", b"bytez")
    with pytest.raises(CorruptObject, match=sha256_hex(b"bytes")):
        store.read("data", sha256=sha256_hex(b"bytes"))


def test_files_are_stored_and_fetched_with_their_checksum(store: Store, tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(b"weights")
    digest = store.put_file("w/file", source)
    assert digest == sha256_hex(b"weights")
    store.fetch_file("w/file", target, digest)
    assert target.read_bytes() == b"weights"
    with pytest.raises(CorruptObject):
        store.fetch_file("w/file", tmp_path / "other", sha256_hex(b"else"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(CorruptObject, match="source"):
        store.put_file("w/file", source, sha256_hex(b"else"))


def test_a_writable_store_passes_the_check_and_keeps_nothing_of_it(store_url: str):
    store = open_store(store_url, check_writable=True)
    assert conditional_create_works(store)
    assert store.list() == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "a/../b",
        "..",
        "a//b",
        "./a",
        "a/",
        "a b",
        "pipe:touch x",
        "simplecache::s3://b",
        "s3://other/key",
        "a\nb",
        "ä",
        "x" * 513,
    ],
)
def test_paths_that_could_leave_the_store_are_refused(local_store: Store, path: str):
    calls: list[Callable[[], object]] = [
        lambda: local_store.read(path),
        lambda: local_store.put(path, b"x"),
        lambda: local_store.create(path, b"x"),
        lambda: local_store.delete(path),
        lambda: local_store.exists(path),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^path "):
            call()


@given(st.text())
def test_an_accepted_path_stays_below_the_store(text: str):
    try:
        path = checked_path(text)
    except ValueError:
        return
    assert os.path.normpath(f"/store/{path}").startswith("/store/")


def test_a_relative_folder_is_pinned_when_the_store_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    store = open_store("here")
    monkeypatch.chdir("/")
    store.put("a", b"x")
    assert (tmp_path / "here" / "a").read_bytes() == b"x"
    assert open_store(f"file://{tmp_path}/here/") == store


def test_a_store_below_a_file_is_not_writable(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreNotWritable, match=f"{tmp_path}/file/store cannot be written to") as e:
        open_store(str(tmp_path / "file" / "store"), check_writable=True)
    assert "--store" in str(e.value)


def test_a_store_where_the_kernel_forbids_writing_is_not_writable():
    # /proc refuses even root, as whom tests may run.
    with pytest.raises(StoreNotWritable, match="/proc/store cannot be written to"):
        open_store("/proc/store", check_writable=True)


@pytest.mark.parametrize(
    ("code", "text"),
    [(errno.EACCES, "no permission"), (errno.ENOSPC, "the disk is full")],
)
def test_the_check_names_store_cause_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
):
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local_files.os, "fsync", fail)
    with pytest.raises(StoreNotWritable, match=text) as caught:
        open_store(str(tmp_path), check_writable=True)
    assert caught.value.errno == code
    assert str(tmp_path) in str(caught.value)
    assert "--store or SELFTRAIN_STORE" in str(caught.value)


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_not_writable_and_says_so(s3_url: str):
    missing = f"s3://missing-{uuid.uuid4().hex[:8]}"
    with pytest.raises(StoreNotWritable, match="Create the bucket first") as caught:
        open_store(missing, check_writable=True)
    assert missing in str(caught.value)


def test_an_unreachable_store_is_not_writable_and_names_the_endpoint_switch(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("SELFTRAIN_RETRY_SECONDS", "0")
    with pytest.raises(StoreNotWritable, match="AWS_ENDPOINT_URL") as caught:
        open_store("s3://bucket", check_writable=True)
    assert "canary-secret" not in str(caught.value)
