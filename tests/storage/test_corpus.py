"""Tests of corpora: identity, storage and verified reading of shards."""

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from storage.corpus import (
    Corpus,
    CorpusMismatch,
    EmptyCorpus,
    MissingShard,
    Shard,
    cached_corpus,
    corpus_digest,
    load_corpus,
    load_locations,
    read_samples,
    read_shard,
    save_corpus,
)
from storage.indexing import corpus_from_index, index_shards
from storage.manifest import CorruptRecord
from storage.samples import CorruptShard
from storage.store import open_store

A = Shard("a", "a" * 64, 3, 10240, {0: 2, 2: 1})
B = Shard("b", "b" * 64, 2, 20480, {1: 2})
C = Shard("c", "c" * 64, 4, 20480)


def shard_bytes(labels, offset=0):
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        for i, label in enumerate(labels):
            writer.write({"__key__": f"{i:03d}", "jpg": b"%d" % (i + offset), "cls": b"%d" % label})
    return buffer.getvalue()


def indexed(tmp_path, *labels):
    urls = []
    for i, each in enumerate(labels):
        path = tmp_path / f"s-{i}.tar"
        path.write_bytes(shard_bytes(each, offset=100 * i))
        urls.append(str(path))
    return corpus_from_index(index_shards(urls))


def test_digest_covers_stem_content_and_count_and_nothing_else():
    digest = corpus_digest([A, B])
    assert digest == corpus_digest([B, A])
    assert digest == corpus_digest([replace(A, label_counts=None, num_bytes=1), B])
    assert digest != corpus_digest([replace(A, stem="x"), B])
    assert digest != corpus_digest([replace(A, digest="d" * 64), B])
    assert digest != corpus_digest([replace(A, num_samples=4), B])
    assert digest != corpus_digest([A])


def test_digest_is_the_one_that_stores_already_hold():
    # sha256 of {"kind":"corpus","schema":1,"shards":[["a","aa..",3],["b","bb..",2]]}; a changed
    # value would orphan every stored corpus.
    import hashlib

    text = json.dumps(
        {"kind": "corpus", "schema": 1, "shards": [["a", "a" * 64, 3], ["b", "b" * 64, 2]]},
        separators=(",", ":"),
    )
    assert corpus_digest([B, A]) == hashlib.sha256(text.encode()).hexdigest()


@given(st.permutations([A, B, C]))
def test_corpus_does_not_depend_on_the_order_of_shards(shards):
    assert Corpus.of(shards) == Corpus.of([A, B, C])


def test_counts_merge_over_shards():
    corpus = Corpus.of([C, B, A])
    assert [s.stem for s in corpus.shards] == ["a", "b", "c"]
    assert corpus.num_samples == 9
    assert corpus.num_bytes == 51200
    assert corpus.label_counts() == {0: 2, 1: 2, 2: 1}
    assert not corpus.is_labeled  # c has no label
    assert Corpus.of([A, B]).is_labeled


def test_corpus_without_a_sample_is_refused():
    with pytest.raises(EmptyCorpus, match="0 shards"):
        Corpus.of([])
    with pytest.raises(EmptyCorpus, match="1 shards and no sample"):
        Corpus.of([Shard("a", "a" * 64, 0, 1024)])


def test_two_shards_of_one_stem_or_digest_are_refused():
    with pytest.raises(ValueError, match="2 shards have the stem 'a'"):
        Corpus.of([A, replace(B, stem="a")])
    with pytest.raises(ValueError, match="2 shards have the digest"):
        Corpus.of([A, replace(B, digest=A.digest)])


def test_label_without_a_name_is_refused():
    with pytest.raises(ValueError, match="class number 2 has no name: there are 2"):
        Corpus.of([A], ["cat", "dog"])
    with pytest.raises(ValueError, match="unique"):
        Corpus.of([A], ["cat", "dog", "cat"])


@pytest.mark.parametrize("stem", ["", "a/b", "a\nb", "x" * 201])
def test_bad_stem_is_refused(stem):
    with pytest.raises(ValueError, match="a stem has 1 to 200"):
        Shard(stem, "a" * 64, 1, 1)


def test_stored_corpus_reads_back_equal(tmp_path):
    store = open_store(str(tmp_path))
    corpus = Corpus.of([A, B], ["x", "y", "z"])
    save_corpus(store, corpus, {"a": "/d/a.tar", "b": "s3://x/b.tar"})
    assert load_corpus(store, corpus.digest) == corpus
    assert load_locations(store, corpus.digest) == {"a": "/d/a.tar", "b": "s3://x/b.tar"}


def test_a_cached_corpus_is_read_once_and_is_the_one_asked_for(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    one, two = Corpus.of([A, B]), Corpus.of([A, C])
    for corpus in (one, two):
        save_corpus(store, corpus, {shard.stem: f"/{shard.stem}.tar" for shard in corpus.shards})
    read = []
    monkeypatch.setattr(
        "storage.corpus.load_corpus",
        lambda store, digest: read.append(digest) or load_corpus(store, digest),
    )

    found = [cached_corpus(store, digest) for digest in (one.digest, one.digest, two.digest)]

    assert found == [one, one, two]
    assert read == [one.digest, two.digest]


def test_moved_shards_change_the_locations_and_nothing_else(tmp_path):
    store = open_store(str(tmp_path))
    corpus = Corpus.of([A])
    save_corpus(store, corpus, {"a": "/old/a.tar"})
    before = store.read(f"corpora/{corpus.digest}.json")
    save_corpus(store, corpus, {"a": "/new/a.tar"})
    assert load_locations(store, corpus.digest) == {"a": "/new/a.tar"}
    assert store.read(f"corpora/{corpus.digest}.json") == before


def test_other_class_names_for_the_same_shards_are_an_error_naming_both(tmp_path):
    store = open_store(str(tmp_path))
    save_corpus(store, Corpus.of([A], ["x", "y", "z"]), {"a": "/a.tar"})
    with pytest.raises(CorpusMismatch, match=r"\['x', 'y', 'z'\], not \['x', 'z', 'y'\]"):
        save_corpus(store, Corpus.of([A], ["x", "z", "y"]), {"a": "/a.tar"})
    with pytest.raises(CorpusMismatch, match="not unknown"):
        save_corpus(store, Corpus.of([A]), {"a": "/a.tar"})


def test_locations_must_name_each_shard(tmp_path):
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['x'\]"):
        save_corpus(open_store(str(tmp_path)), Corpus.of([A, B]), {"a": "/a.tar", "x": "/x.tar"})


def test_unknown_corpus_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="selftrain data index"):
        load_corpus(open_store(str(tmp_path)), "f" * 64)
    with pytest.raises(FileNotFoundError, match="selftrain data index"):
        load_locations(open_store(str(tmp_path)), "f" * 64)


def test_damaged_corpus_record_is_refused(tmp_path):
    store = open_store(str(tmp_path))
    corpus = Corpus.of([A])
    save_corpus(store, corpus, {"a": "/a.tar"})
    path = tmp_path / "corpora" / f"{corpus.digest}.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"num_samples":3', b'"num_samples":5'))
    with pytest.raises(CorruptRecord):
        load_corpus(store, corpus.digest)


def test_corpus_under_another_corpus_digest_is_refused(tmp_path):
    store = open_store(str(tmp_path))
    save_corpus(store, Corpus.of([A]), {"a": "/a.tar"})
    record = store.read(f"corpora/{Corpus.of([A]).digest}.json")
    store.create("corpora/" + "e" * 64 + ".json", record)
    with pytest.raises(CorpusMismatch, match="holds digest"):
        load_corpus(store, "e" * 64)


def test_shards_read_verified(tmp_path):
    corpus, locations = indexed(tmp_path, [0, 1], [1, 1, 0])
    assert read_shard(corpus, locations, "s-1") == (tmp_path / "s-1.tar").read_bytes()
    samples = read_samples(corpus, locations, "s-1")
    assert [(s.key, s.label) for s in samples] == [("s-1/000", 1), ("s-1/001", 1), ("s-1/002", 0)]


def test_missing_shard_names_stem_url_and_remedy(tmp_path):
    corpus, locations = indexed(tmp_path, [0, 1])
    (tmp_path / "s-0.tar").unlink()
    with pytest.raises(
        MissingShard, match=r"shard s-0: nothing at .*s-0\.tar\. Put the shard back"
    ):
        read_shard(corpus, locations, "s-0")
    with pytest.raises(MissingShard, match="no location is known"):
        read_shard(corpus, {}, "s-0")
    with pytest.raises(ValueError, match="has no shard 'zz'"):
        read_shard(corpus, locations, "zz")


def test_shard_that_changed_since_it_was_indexed_is_refused(tmp_path):
    corpus, locations = indexed(tmp_path, [0, 1])
    (tmp_path / "s-0.tar").write_bytes(shard_bytes([1, 1]))
    with pytest.raises(CorruptShard, match=r"shard s-0 at .* is not what was indexed"):
        read_shard(corpus, locations, "s-0")


def test_flipped_bit_in_an_image_is_caught(tmp_path):
    corpus, locations = indexed(tmp_path, [0, 1])
    path = tmp_path / "s-0.tar"
    data = bytearray(path.read_bytes())
    data[1024 + 512] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard):
        read_samples(corpus, locations, "s-0")
