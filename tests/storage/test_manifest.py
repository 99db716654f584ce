"""Sealed records and manifests: golden bytes, damage, mismatch, the winner's manifest."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.manifest import (
    CorruptRecord,
    InputReference,
    Manifest,
    ManifestMismatch,
    StoredObject,
    UnknownSchema,
    commit_manifest,
    create_record,
    put_object,
    read_manifest,
    read_provenance,
    read_record,
    read_stored,
    sealed,
    unsealed,
    write_provenance,
)
from storage.store import CorruptObject, Store

FOLDER = "models/abc"

# The released forms; a change of these bytes needs a new schema number and a migration.
GOLDEN_SEALED = (
    b'{"a":[1,2.5,null],"schema":1,'
    b'"sha256":"41569f28f1b15ad0aa13ed63814325bc76ad4b0d96de2c2fafb66042226bdc80"}'
)
GOLDEN_MANIFEST = (
    b'{"counts":{"samples":7},"fingerprint":"abc",'
    b'"inputs":{"teacher":{"fingerprint":"t","manifest_sha256":"m"}},"kind":"train",'
    b'"objects":[{"name":"model","path":"models/abc/model-s.safetensors","sha256":"s","size":3}],'
    b'"schema":1,"settings":{"lr":0.1},'
    b'"sha256":"f53bf35c0620649f4dbc061da5b413e6b605895c526c80318ff7238f0da1541f",'
    b'"stage_version":2}'
)


def a_manifest(**changes: Any) -> Manifest:
    manifest = Manifest(
        kind="train",
        fingerprint="abc",
        stage_version=2,
        settings={"lr": 0.1},
        inputs={"teacher": InputReference("t", "m")},
        objects=(StoredObject("model", "models/abc/model-s.safetensors", 3, "s"),),
        counts={"samples": 7},
    )
    return replace(manifest, **changes)


def test_a_sealed_record_is_these_bytes():
    assert sealed({"schema": 1, "a": [1, 2.5, None]}) == GOLDEN_SEALED
    assert unsealed(GOLDEN_SEALED, where="x") == {"schema": 1, "a": [1, 2.5, None]}


def test_a_manifest_is_these_bytes_and_is_read_back(local_store: Store):
    commit_manifest(local_store, FOLDER, a_manifest())
    assert local_store.read(f"{FOLDER}/manifest.json") == GOLDEN_MANIFEST
    assert read_manifest(local_store, FOLDER) == a_manifest()
    assert a_manifest().sha256 == json.loads(GOLDEN_MANIFEST)["sha256"]


@given(st.integers(0, len(GOLDEN_MANIFEST) - 1), st.integers(0, 7))
def test_every_flipped_bit_of_a_manifest_is_noticed(position: int, bit: int):
    damaged = bytearray(GOLDEN_MANIFEST)
    damaged[position] ^= 1 << bit
    with pytest.raises(CorruptRecord, match=r"^here: "):
        unsealed(bytes(damaged), where="here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"a":1}',
        GOLDEN_SEALED[:-1],
        GOLDEN_SEALED + b" x",
        b'{"a":NaN,"sha256":"0"}',
        b'{"a":1e999,"sha256":"0"}',
        b"[" * 200_000,
        b'{"a":' + b"1" * 6000 + b"}",
        GOLDEN_SEALED[:-1] + b',"a":[1,2.5,null]}',
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_sealed_would_not_have_written_is_refused(data: bytes):
    with pytest.raises(CorruptRecord, match=r"^here: "):
        unsealed(data, where="here")


def test_duplicate_keys_are_named():
    with pytest.raises(CorruptRecord, match=r"duplicate keys \['a'\]"):
        unsealed(b'{"a":1,"a":1}', where="here")


def test_a_body_cannot_bring_its_own_seal():
    with pytest.raises(ValueError, match="sha256"):
        sealed({"sha256": "x"})


def test_the_first_record_stays(store: Store):
    assert create_record(store, "r/1.json", {"by": "first"}) == {"by": "first"}
    assert create_record(store, "r/1.json", {"by": "second"}) == {"by": "first"}
    assert read_record(store, "r/1.json") == {"by": "first"}
    assert read_record(store, "r/2.json") is None


def test_a_damaged_record_names_its_place(store: Store):
    store.replace("r/1.json", sealed({"a": 1}).replace(b'"a":1', b'"a":2'))
    with pytest.raises(CorruptRecord, match="it is damaged or was edited") as caught:
        read_record(store, "r/1.json")
    assert store.url_of("r/1.json") in str(caught.value)
    with pytest.raises(CorruptRecord):
        create_record(store, "r/1.json", {"a": 1})


def test_a_bit_that_flips_on_the_way_is_read_again(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
):
    good = sealed({"a": 1})
    answers = [good.replace(b"a", b"c", 1), good]
    monkeypatch.setattr(Store, "read", lambda *_, **__: answers.pop(0))
    assert read_record(local_store, "r/1.json") == {"a": 1}
    assert answers == []


def test_data_objects_carry_their_checksum_in_the_name(store: Store):
    stored = put_object(store, FOLDER, "model", b"abc", "safetensors", crash_kind="train")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert stored == StoredObject("model", f"{FOLDER}/model-{digest}.safetensors", 3, digest)
    assert read_stored(store, stored) == b"abc"


def test_damaged_data_objects_are_noticed(store: Store):
    stored = put_object(store, FOLDER, "model", b"abc", "bin")
    store.replace(stored.path, b"abd")
    with pytest.raises(CorruptObject, match="sha256"):
        read_stored(store, stored)
    store.replace(stored.path, b"abc")
    with pytest.raises(CorruptObject, match="3 bytes, but its manifest says 4"):
        read_stored(store, replace(stored, size=4))


def test_a_stage_without_manifest_is_not_finished(store: Store):
    put_object(store, FOLDER, "model", b"abc", "bin")
    assert read_manifest(store, FOLDER) is None


def test_of_two_drivers_both_get_the_winners_manifest(store: Store):
    first = a_manifest(counts={"samples": 7})
    second = a_manifest(counts={"samples": 8})
    assert commit_manifest(store, FOLDER, first) == first
    assert commit_manifest(store, FOLDER, second) == first


def test_of_16_racing_commits_all_return_the_same_manifest(store: Store):
    def commit(index: int) -> Manifest:
        return commit_manifest(store, FOLDER, a_manifest(counts={"writer": index}))

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(commit, range(16)))
    assert all(result == results[0] for result in results)
    assert read_manifest(store, FOLDER) == results[0]


@pytest.mark.parametrize(
    ("changes", "key", "found", "wanted"),
    [
        ({"fingerprint": "xyz"}, "fingerprint", "'abc'", "'xyz'"),
        ({"kind": "label"}, "kind", "'train'", "'label'"),
        ({"stage_version": 3}, "stage_version", "2", "3"),
        ({"settings": {"lr": 0.2}}, "settings", "{'lr': 0.1}", "{'lr': 0.2}"),
        ({"inputs": {"teacher": InputReference("u", "m")}}, "inputs", "'t'", "'u'"),
    ],
)
def test_a_manifest_of_something_else_is_an_error_that_names_both_values(
    local_store: Store, changes: dict[str, Any], key: str, found: str, wanted: str
):
    commit_manifest(local_store, FOLDER, a_manifest())
    with pytest.raises(ManifestMismatch) as caught:
        commit_manifest(local_store, FOLDER, a_manifest(**changes))
    message = str(caught.value)
    assert f": {key} is " in message
    assert found in message
    assert wanted in message
    assert f"{FOLDER}/manifest.json" in message


def test_reading_a_manifest_with_another_fingerprint_is_an_error(store: Store):
    commit_manifest(store, FOLDER, a_manifest())
    assert read_manifest(store, FOLDER, expect_fingerprint="abc") == a_manifest()
    with pytest.raises(ManifestMismatch, match="fingerprint is 'abc', but 'xyz' is asked for"):
        read_manifest(store, FOLDER, expect_fingerprint="xyz")


def test_a_newer_schema_is_refused_with_advice(local_store: Store):
    body = unsealed(GOLDEN_MANIFEST, where="x") | {"schema": 2, "new": 1}
    local_store.put(f"{FOLDER}/manifest.json", sealed(body))
    with pytest.raises(
        UnknownSchema, match=r"has schema 2, but .* reads up to 1; update selftrain"
    ):
        read_manifest(local_store, FOLDER)


@pytest.mark.parametrize(
    "change", [{"schema": "1"}, {"schema": 0}, {"kind": None}, {"extra": 1}, {"objects": [{}]}]
)
def test_a_sealed_record_that_is_no_manifest_is_refused(local_store: Store, change: dict[str, Any]):
    body = unsealed(GOLDEN_MANIFEST, where="x") | change
    local_store.put(f"{FOLDER}/manifest.json", sealed(body))
    with pytest.raises(CorruptRecord):
        read_manifest(local_store, FOLDER)


def test_an_unknown_object_lists_the_known_ones():
    assert a_manifest().object("model").size == 3
    with pytest.raises(KeyError, match="no object 'metrics'; known: model"):
        a_manifest().object("metrics")


def test_provenance_may_be_written_again(store: Store, caplog: pytest.LogCaptureFixture):
    assert read_provenance(store, FOLDER) is None
    write_provenance(store, FOLDER, {"seconds": 1.5})
    write_provenance(store, FOLDER, {"seconds": 2.5, "host": "a"})
    assert read_provenance(store, FOLDER) == {"seconds": 2.5, "host": "a"}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_full_disk_commits_nothing_and_a_later_try_does(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
):
    import errno

    from storage import local_files

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "fsync", full)
        with pytest.raises(OSError, match="the disk is full"):
            put_object(local_store, FOLDER, "model", b"abc", "bin")
        with pytest.raises(OSError, match=r"the disk is full.*manifest\.json"):
            commit_manifest(local_store, FOLDER, a_manifest())
    assert local_store.list() == []
    assert read_manifest(local_store, FOLDER) is None
    assert commit_manifest(local_store, FOLDER, a_manifest()) == a_manifest()
