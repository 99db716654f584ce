"""Tests of sharding: splits, determinism, balance, and what webdataset reads from our shards."""

import hashlib
import io
import json
import random
from collections import Counter
from typing import Any

import pytest
import webdataset
from PIL import Image

from storage import objects
from storage.corpus import read_samples
from storage.indexing import corpus_from_index, index_shards
from storage.patterns import expand_shards
from tasks.images import BadImage
from tasks.sharding import SPLITS, shard_dataset
from tasks.sources import SourceImage


def png(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def make_images(counts, kind="PNG", prefix=""):
    images = []
    for label, count in counts.items():
        for i in range(count):
            number = len(images)
            path = f"{prefix}{label}/{i:04d}.{kind.lower()}"
            images.append(SourceImage(path, label, lambda n=number: png(n, kind)))
    return images


IMAGES = make_images({"cat": 30, "dog": 20, "emu": 10})


def split_paths(out, split):
    lines = (out / split / "sources.csv").read_text().splitlines()[1:]
    return [line.split(",", 1)[1] for line in lines]


def split_labels(out, split):
    return Counter(path.split("/")[0] for path in split_paths(out, split))


def all_files(out):
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in out.rglob("*")
        if p.is_file()
    }


def test_splits_have_the_sizes_asked_for_and_share_no_image(tmp_path):
    summary = shard_dataset(IMAGES, str(tmp_path), labels_per_class=4, dev=6, test=9, shard_size=10)
    assert {s: summary.splits[s].num_samples for s in SPLITS} == {
        "labeled": 12,
        "dev": 6,
        "test": 9,
        "unlabeled": 33,
    }
    assert {s: summary.splits[s].num_shards for s in SPLITS} == {
        "labeled": 2,
        "dev": 1,
        "test": 1,
        "unlabeled": 4,
    }
    paths = [path for split in SPLITS for path in split_paths(tmp_path, split)]
    assert sorted(paths) == sorted(image.path for image in IMAGES)
    assert split_labels(tmp_path, "labeled") == {"cat": 4, "dog": 4, "emu": 4}
    assert split_labels(tmp_path, "dev") == {"cat": 2, "dog": 2, "emu": 2}
    assert summary.splits["dev"].class_counts == {"cat": 2, "dog": 2, "emu": 2}
    assert json.loads((tmp_path / "dataset.json").read_text())["schema"] == 1


def test_webdataset_reads_our_shards_as_we_read_them(tmp_path):
    summary = shard_dataset(IMAGES, str(tmp_path), labels_per_class=5, dev=3, test=4, shard_size=7)
    for split in SPLITS:
        pattern = summary.splits[split].pattern
        assert pattern is not None
        urls = expand_shards(pattern)
        corpus, locations = corpus_from_index(index_shards(urls))
        assert corpus.class_names == ("cat", "dog", "emu")
        for url in urls:
            stem = url.rpartition("/")[2].removesuffix(".tar")
            dataset = webdataset.WebDataset(url, shardshuffle=False)  # type: ignore[attr-defined]
            theirs = [(f"{stem}/{s['__key__']}", s["png"], int(s["cls"])) for s in dataset]
            ours = [(s.key, bytes(s.image), s.label) for s in read_samples(corpus, locations, stem)]
            assert ours == theirs


def test_labels_and_bytes_belong_to_their_paths(tmp_path):
    by_path = {image.path: image for image in IMAGES}
    summary = shard_dataset(IMAGES, str(tmp_path), labels_per_class=5, dev=3, test=4)
    for split in SPLITS:
        corpus, locations = corpus_from_index(index_shards([summary.splits[split].pattern or ""]))
        samples = read_samples(corpus, locations, f"{split}-000000")
        for sample, path in zip(samples, split_paths(tmp_path, split), strict=True):
            assert bytes(sample.image) == by_path[path].load()
            assert ("cat", "dog", "emu")[sample.label or 0] == by_path[path].label


def test_bytes_do_not_depend_on_the_order_of_listing_or_the_time(tmp_path):
    shuffled = IMAGES[:]
    random.Random(5).shuffle(shuffled)
    for name, images in (("a", IMAGES), ("b", shuffled)):
        shard_dataset(images, str(tmp_path / name), labels_per_class=3, dev=3, test=5, seed=7)
    a, b = all_files(tmp_path / "a"), all_files(tmp_path / "b")
    del a["dataset.json"], b["dataset.json"]  # holds the URL
    assert a == b


def test_bytes_are_those_of_every_version(tmp_path):
    images = [SourceImage(f"x/{i}.jpg", "x", lambda i=i: b"\xff\xd8\xff%d" % i) for i in range(5)]
    shard_dataset(images, str(tmp_path), labels_per_class=2, dev=1, seed=1)
    # Recorded when written; a change means other splits from the same command.
    assert split_paths(tmp_path, "labeled") == ["x/2.jpg", "x/3.jpg"]
    assert split_paths(tmp_path, "dev") == ["x/1.jpg"]
    assert split_paths(tmp_path, "unlabeled") == ["x/0.jpg", "x/4.jpg"]
    assert all_files(tmp_path)["labeled/labeled-000000.tar"] == (
        "548b5e29eda64fec23b8fe9487bd27abf82d84266c31278888b6a3829953183d"
    )


def test_another_seed_draws_others(tmp_path):
    for seed in (0, 1):
        shard_dataset(IMAGES, str(tmp_path / str(seed)), labels_per_class=4, dev=6, seed=seed)
    assert set(split_paths(tmp_path / "0", "labeled")) != set(
        split_paths(tmp_path / "1", "labeled")
    )


def test_more_labels_contain_the_fewer(tmp_path):
    for k in (2, 5):
        shard_dataset(IMAGES, str(tmp_path / str(k)), labels_per_class=k, dev=0)
    assert set(split_paths(tmp_path / "2", "labeled")) < set(split_paths(tmp_path / "5", "labeled"))


def test_total_of_labels_is_spread_evenly_when_balanced(tmp_path):
    shard_dataset(IMAGES, str(tmp_path), labels=8, dev=4)
    # 8 over 3 classes: 2 each, and 1 more for two of them; 4 likewise.
    assert sorted(split_labels(tmp_path, "labeled").values()) == [2, 3, 3]
    assert sorted(split_labels(tmp_path, "dev").values()) == [1, 1, 2]


def test_labels_as_found_follow_the_classes_as_they_are(tmp_path):
    images = make_images({"common": 900, "rare": 100})
    shard_dataset(images, str(tmp_path), labels=200, dev=100, balanced=False)
    for split, size in (("labeled", 200), ("dev", 100)):
        labels = split_labels(tmp_path, split)
        assert sum(labels.values()) == size
        assert 0.03 * size < labels["rare"] < 0.2 * size


def test_unlabelled_samples_are_shuffled_over_shards(tmp_path):
    images = make_images({"a": 50, "b": 50})
    summary = shard_dataset(images, str(tmp_path), labels_per_class=1, dev=2, shard_size=16)
    index = index_shards(expand_shards(summary.splits["unlabeled"].pattern or ""))
    assert all(len(shard.label_counts or {}) == 2 for shard in index.shards)


def test_truth_of_unlabelled_samples_is_left_out_on_request(tmp_path):
    summary = shard_dataset(IMAGES, str(tmp_path), labels_per_class=4, dev=3, keep_truth=False)
    for split, has_labels in (("unlabeled", False), ("labeled", True), ("dev", True)):
        index = index_shards([summary.splits[split].pattern or ""])
        assert (index.shards[0].label_counts is not None) == has_labels


def test_images_without_label_are_unlabelled_and_never_drawn(tmp_path):
    unknown = [SourceImage(f"u/{i}", None, lambda i=i: png(1000 + i)) for i in range(40)]
    summary = shard_dataset([*IMAGES, *unknown], str(tmp_path), labels_per_class=10, dev=0, test=30)
    assert summary.splits["unlabeled"].num_samples == 40
    assert {path.split("/")[0] for path in split_paths(tmp_path, "unlabeled")} == {"u"}


def test_too_few_images_of_a_class_name_the_class(tmp_path):
    with pytest.raises(
        ValueError, match=r"labelled samples in 1 of 3 classes: 'emu' \(10 left, 11"
    ):
        shard_dataset(IMAGES, str(tmp_path), labels_per_class=11, dev=0)
    with pytest.raises(ValueError, match=r"dev samples in 1 of 3 classes: 'emu' \(2 left, 3"):
        shard_dataset(IMAGES, str(tmp_path), labels_per_class=8, dev=9)
    with pytest.raises(ValueError, match="100 test samples are asked for, 54 images"):
        shard_dataset(IMAGES, str(tmp_path), labels_per_class=1, dev=3, test=100)
    with pytest.raises(ValueError, match="61 labelled samples are asked for, 60 images"):
        shard_dataset(IMAGES, str(tmp_path), labels=61, dev=0, balanced=False)
    assert not list(tmp_path.iterdir())


def test_separate_test_images_are_all_taken_or_drawn_from(tmp_path):
    test_images = make_images({"cat": 4, "dog": 6}, prefix="test/")
    summary = shard_dataset(
        IMAGES, str(tmp_path / "all"), labels_per_class=2, dev=3, test_images=test_images
    )
    assert summary.splits["test"].num_samples == 10
    assert summary.splits["unlabeled"].num_samples == 60 - 6 - 3
    drawn = shard_dataset(
        IMAGES, str(tmp_path / "some"), labels_per_class=2, dev=3, test=5, test_images=test_images
    )
    assert drawn.splits["test"].num_samples == 5
    assert all(p.startswith("test/") for p in split_paths(tmp_path / "some", "test"))


def test_kept_formats_keep_their_bytes_and_others_become_png(tmp_path):
    images = [
        SourceImage(f"x/{kind}", "x", lambda k=kind: png(5, k)) for kind in ("JPEG", "WEBP", "BMP")
    ]
    shard_dataset(images, str(tmp_path), labels_per_class=3, dev=0)
    corpus, locations = corpus_from_index(
        index_shards([str(tmp_path / "labeled/labeled-000000.tar")])
    )
    samples = read_samples(corpus, locations, "labeled-000000")
    found = dict(zip(split_paths(tmp_path, "labeled"), samples, strict=True))
    assert bytes(found["x/JPEG"].image) == png(5, "JPEG")
    assert found["x/JPEG"].image_extension == "jpg"
    assert bytes(found["x/WEBP"].image) == png(5, "WEBP")
    assert found["x/BMP"].image_extension == "png"
    with Image.open(io.BytesIO(found["x/BMP"].image)) as image:
        assert image.getpixel((0, 0)) == (5, 0, 7)


def test_file_that_is_no_image_is_refused_naming_its_path(tmp_path):
    images = [SourceImage("x/bad.jpg", "x", lambda: b"%!PS")]
    with pytest.raises(BadImage, match=r"x/bad\.jpg: not .*\. Repair it; or remove it, and"):
        shard_dataset(images, str(tmp_path), labels_per_class=1, dev=0)


def test_class_numbers_follow_given_names(tmp_path):
    names = ["yak", "emu", "dog", "cat"]
    summary = shard_dataset(
        IMAGES, str(tmp_path), labels=6, dev=0, balanced=False, class_names=names
    )
    assert summary.class_names == tuple(names)
    content = json.loads((tmp_path / "unlabeled" / "classes.json").read_text())
    assert content == {"schema": 1, "class_names": names}
    with pytest.raises(ValueError, match="1 labels are not in class_names, such as 'emu'"):
        shard_dataset(IMAGES, str(tmp_path / "x"), labels=6, dev=0, class_names=["cat", "dog"])


def test_folder_of_another_data_set_is_left_alone(tmp_path):
    shard_dataset(IMAGES, str(tmp_path), labels_per_class=4, dev=3, shard_size=10)
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match="shards of another data set, such as"):
        shard_dataset(IMAGES, str(tmp_path), labels_per_class=4, dev=3, shard_size=1000)
    with pytest.raises(ValueError, match="holds another data set"):
        shard_dataset(IMAGES, str(tmp_path), labels_per_class=4, dev=3, shard_size=10, seed=1)
    assert all_files(tmp_path) == before


def test_interrupted_call_can_be_repeated(tmp_path):
    def stop(done, total):
        assert total == 60
        if done > 20:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"labels_per_class": 4, "dev": 3, "shard_size": 10}
    with pytest.raises(KeyboardInterrupt):
        shard_dataset(IMAGES, str(tmp_path), progress=stop, **options)
    again = shard_dataset(IMAGES, str(tmp_path), **options)
    assert again == shard_dataset(IMAGES, str(tmp_path), **options)
    assert again.splits["unlabeled"].num_samples == 45


def test_shards_are_written_to_an_object_store():
    summary = shard_dataset(IMAGES, "memory://sharding/d", labels_per_class=2, dev=3, shard_size=20)
    assert summary.splits["unlabeled"].pattern == (
        "memory://sharding/d/unlabeled/unlabeled-{000000..000002}.tar"
    )
    assert index_shards(expand_shards("memory://sharding/d/unlabeled")).shards[0].num_samples == 20
    assert objects.object_exists("memory://sharding/d/dataset.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either labels_per_class or labels"),
        ({"labels": 1, "labels_per_class": 1}, "either labels_per_class or labels"),
        ({"labels": 1, "shard_size": 0}, "shard_size must be at least 1"),
        ({"labels": -1}, "at least 0"),
        ({"labels": 3, "class_names": ["cat", "cat", "dog", "emu"]}, "unique"),
    ],
)
def test_contradicting_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        shard_dataset(IMAGES, str(tmp_path), **{"dev": 0, **options})


def test_two_images_of_one_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2 images have the path 'cat/0000\.png'"):
        shard_dataset([*IMAGES, IMAGES[0]], str(tmp_path), labels=3, dev=0)
