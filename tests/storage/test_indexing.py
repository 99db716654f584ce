"""Tests of the index: what is read, what is reused, what is refused."""

import io
import json
import logging
import os
from collections import Counter
from itertools import pairwise

import pytest
from webdataset.writer import TarWriter

from storage import indexing, objects
from storage.corpus import Corpus, EmptyCorpus, MissingShard, Shard
from storage.indexing import (
    ShardIndex,
    corpus_from_index,
    index_shards,
    read_index,
    sorted_by_class,
    write_index,
)
from storage.manifest import UnknownSchema, sealed
from storage.samples import CorruptShard


def write_shard(path, labels, text="x"):
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        for i, label in enumerate(labels):
            sample = {"__key__": f"{i:03d}", "jpg": f"{text}{i}".encode()}
            writer.write(sample if label is None else {**sample, "cls": b"%d" % label})
    path.write_bytes(buffer.getvalue())
    return str(path)


@pytest.fixture
def shards(tmp_path):
    return [write_shard(tmp_path / f"t-{i}.tar", [0, 1, i], text=f"s{i}-") for i in range(5)]


@pytest.fixture
def reads(monkeypatch):
    counts = Counter()
    read = objects.read_object

    def counted(url, **options):
        counts[url.rpartition("/")[2]] += 1
        return read(url, **options)

    monkeypatch.setattr(objects, "read_object", counted)
    return counts


def tars_read(reads):
    return sum(n for name, n in reads.items() if name.endswith(".tar"))


def test_index_holds_digest_counts_and_bytes(shards):
    import hashlib

    index = index_shards(shards)
    with open(shards[2], "rb") as file:
        data = file.read()
    entry = index.entries[2]
    assert entry.url == shards[2]
    assert entry.shard.digest == hashlib.sha256(data).hexdigest()
    assert (entry.shard.stem, entry.shard.num_samples) == ("t-2", 3)
    assert entry.size == entry.shard.num_bytes == len(data)
    assert entry.shard.label_counts == {0: 1, 1: 1, 2: 1}
    assert index.class_names is None


def test_index_does_not_depend_on_the_number_of_workers(shards):
    assert index_shards(shards, workers=1) == index_shards(shards, workers=8)


def test_unlabelled_shard_has_no_counts(tmp_path):
    index = index_shards([write_shard(tmp_path / "u.tar", [None, None])])
    assert index.shards[0].label_counts is None
    assert not corpus_from_index(index)[0].is_labeled


def test_unchanged_shards_are_not_read_again(shards, tmp_path, reads):
    first = index_shards(shards)
    assert tars_read(reads) == 5
    reads.clear()
    new = write_shard(tmp_path / "t-9.tar", [1, 1])
    second = index_shards([*shards, new], previous=first)
    assert reads["t-9.tar"] == 1
    assert tars_read(reads) == 1
    assert second.entries[:5] == first.entries


def test_changed_shard_is_read_again(shards, tmp_path, reads):
    first = index_shards(shards)
    reads.clear()
    write_shard(tmp_path / "t-1.tar", [0, 0, 0, 0], text="new")
    second = index_shards(shards, previous=first)
    assert reads["t-1.tar"] == 1
    assert tars_read(reads) == 1
    assert second.entries[1].shard.num_samples == 4


def test_shard_that_is_no_longer_asked_for_leaves_the_index(shards):
    first = index_shards(shards)
    assert index_shards(shards[1:], previous=first).entries == first.entries[1:]


def test_interrupted_index_goes_on_where_it_was(shards, tmp_path, reads):
    saved = []

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_shards(shards, workers=1, progress=stop, save=saved.append)
    assert len(saved[-1].entries) == 3
    reads.clear()
    index = index_shards(shards, previous=saved[-1])
    assert tars_read(reads) == 2
    assert index == index_shards(shards)


def test_index_is_saved_every_64_shards(tmp_path):
    urls = [write_shard(tmp_path / f"t-{i:03d}.tar", [0], text=str(i)) for i in range(130)]
    saved = []
    index_shards(urls, save=saved.append)
    sizes = [len(index.entries) for index in saved]
    assert len(sizes) >= 2
    assert all(0 < b - a <= 64 for a, b in pairwise([0, *sizes]))


def test_saved_index_keeps_old_entries_of_shards_not_yet_looked_at(shards):
    first = index_shards(shards)
    saved = []

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_shards(shards, previous=first, workers=1, progress=stop, save=saved.append)
    assert saved[-1].entries == first.entries


def test_verify_reads_every_shard(shards, reads):
    first = index_shards(shards)
    reads.clear()
    assert index_shards(shards, previous=first, verify=True) == first
    assert tars_read(reads) == 5


def test_verify_finds_a_shard_that_changed_under_the_same_size_and_time(shards):
    first = index_shards(shards)
    status = os.stat(shards[3])
    with open(shards[3], "r+b") as file:
        file.seek(512 * 3)
        file.write(b"!")
    os.utime(shards[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert index_shards(shards, previous=first) == first
    with pytest.raises(CorruptShard, match=r"shard t-3 at .*damaged at rest"):
        index_shards(shards, previous=first, verify=True)


def test_two_shards_of_one_stem_are_refused_naming_both_urls(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write_shard(tmp_path / "a" / "t.tar", [0], text="1")
    two = write_shard(tmp_path / "b" / "t.tar", [0], text="2")
    with pytest.raises(ValueError, match=f"same stem 't': {one} and {two}. Rename one"):
        index_shards([one, two])


def test_two_shards_of_equal_content_are_refused_naming_both_urls(tmp_path):
    one = write_shard(tmp_path / "x.tar", [0])
    two = write_shard(tmp_path / "y.tar", [0])
    with pytest.raises(ValueError, match=f"same content '[0-9a-f]+': {one} and {two}"):
        index_shards([one, two])


def test_missing_shard_names_its_url(shards, tmp_path):
    with pytest.raises(MissingShard, match=r"shard gone: nothing at .*gone\.tar"):
        index_shards([*shards, str(tmp_path / "gone.tar")])


def test_all_bad_shards_are_named_and_the_good_ones_saved(shards, tmp_path):
    for i in (0, 4):
        with open(shards[i], "r+b") as file:
            file.truncate(1024)
    saved = []
    with pytest.raises(CorruptShard, match=r"2 of 5 shards cannot be used: .*t-0.*t-4"):
        index_shards(shards, save=saved.append)
    assert [e.shard.stem for e in saved[-1].entries] == ["t-1", "t-2", "t-3"]


def test_bad_shard_is_named_with_its_url(tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(CorruptShard, match=r"shard bad: .* \(at .*bad\.tar\)"):
        index_shards([str(path)])


def test_empty_corpus_is_refused(tmp_path):
    with pytest.raises(EmptyCorpus, match="list of URLs is empty"):
        index_shards([])
    with pytest.raises(EmptyCorpus, match="1 shards and no sample"):
        corpus_from_index(index_shards([write_shard(tmp_path / "e.tar", [])]))


def test_progress_counts_up_to_all_shards(shards):
    seen = []
    index_shards(shards, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_class_names_come_from_the_file_beside_the_shards(shards, tmp_path):
    names = [f"c{i}" for i in range(5)]
    (tmp_path / "classes.json").write_text(json.dumps({"schema": 1, "class_names": names}))
    index = index_shards(shards)
    assert index.class_names == tuple(names)
    corpus, locations = corpus_from_index(index)
    assert corpus == Corpus.of(index.shards, names)
    assert locations == {f"t-{i}": url for i, url in enumerate(shards)}


@pytest.mark.parametrize("text", ['["a"]', '{"class_names": ["a"]}', '{"schema": 1}', "no json"])
def test_unreadable_class_names_are_an_error(shards, tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes\.json"):
        index_shards(shards)


def test_folders_with_different_class_names_are_refused(tmp_path):
    urls = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        urls.append(write_shard(tmp_path / folder / f"{folder}.tar", [0], text=folder))
        content = {"schema": 1, "class_names": [folder]}
        (tmp_path / folder / "classes.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a/classes\.json and .*b/classes\.json"):
        index_shards(urls)


def one_class_shards(labels):
    return [
        Shard(f"s{i}", f"{i:064x}", 2, 1024, {label: 2} if label >= 0 else {0: 1, 1: 1})
        for i, label in enumerate(labels)
    ]


def test_shards_sorted_by_class_are_warned_of(tmp_path, caplog):
    urls = [write_shard(tmp_path / f"t-{i}.tar", [i // 2] * 3, text=str(i)) for i in range(4)]
    with caplog.at_level(logging.WARNING, logger=indexing.__name__):
        index = index_shards(urls)
    assert "4 of 4 labelled shards hold one class only" in caplog.text
    assert sorted_by_class(index.shards) is not None


def test_mixed_shards_or_a_single_class_are_not_warned_of():
    assert sorted_by_class(one_class_shards([-1, -1, 0, 1])) is None  # half is not most
    assert sorted_by_class(one_class_shards([-1, 0, 1])) is not None
    assert sorted_by_class(one_class_shards([1, 1, 1])) is None
    assert sorted_by_class([Shard("u", "a" * 64, 2, 1024)]) is None
    assert sorted_by_class([]) is None


def test_written_index_reads_back_equal(shards, tmp_path):
    (tmp_path / "classes.json").write_text('{"schema": 1, "class_names": ["a","b","c","d","e"]}')
    index = index_shards(shards)
    url = str(tmp_path / "index.json")
    assert read_index(url) is None
    write_index(url, ShardIndex(()))
    write_index(url, index)
    assert read_index(url) == index


def test_index_of_a_newer_version_is_refused(tmp_path):
    (tmp_path / "i.json").write_bytes(sealed({"schema": 2, "shards": [], "class_names": None}))
    with pytest.raises(UnknownSchema):
        read_index(str(tmp_path / "i.json"))


def test_remote_shards_are_indexed_and_reused(shards, reads):
    urls = []
    for url in shards[:2]:
        with open(url, "rb") as file:
            urls.append(f"memory://indexing/{url.rpartition('/')[2]}")
            objects.write_object(urls[-1], file.read(), "replace")
    first = index_shards(urls)
    assert [s.digest for s in first.shards] == [s.digest for s in index_shards(shards[:2]).shards]
    reads.clear()
    assert index_shards(urls, previous=first) == first
    assert tars_read(reads) == 0
