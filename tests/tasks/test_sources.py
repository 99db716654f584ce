"""Tests of sources: folders, archives, tables and CIFAR-10, made here."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from storage import objects
from tasks.sources import (
    read_archive,
    read_cifar10,
    read_image_folder,
    read_source,
    read_table,
)

FILES = {
    "train/cat/b.jpg": b"cat-b",
    "train/cat/a.JPG": b"cat-a",
    "train/dog/deep/c.png": b"dog-c",
    "test/dog/0.jpg": b"dog-0",
    "train/cat/notes.txt": b"x",
    "train/cat/.hidden.jpg": b"x",
    "__MACOSX/train/cat/b.jpg": b"x",
}
FLAT = {"cat/0.webp": b"1", "dog/0.gif": b"2", "loose.png": b"3"}


def write_folder(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def write_archive(path, files, mode, prefix=""):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def facts(images):
    return [(i.path, i.label, i.load()) for i in images]


TRAIN = [
    ("train/cat/a.JPG", "cat", b"cat-a"),
    ("train/cat/b.jpg", "cat", b"cat-b"),
    ("train/dog/deep/c.png", "dog", b"dog-c"),
]


def test_folder_lists_one_split_sorted_by_path(tmp_path):
    folder = write_folder(tmp_path, FILES)
    assert facts(read_image_folder(folder, split="train")) == TRAIN
    assert facts(read_source(folder, split="test")) == [("test/dog/0.jpg", "dog", b"dog-0")]


def test_folder_without_splits_takes_labels_from_the_first_folder(tmp_path):
    assert facts(read_source(write_folder(tmp_path, FLAT))) == [
        ("cat/0.webp", "cat", b"1"),
        ("dog/0.gif", "dog", b"2"),
        ("loose.png", None, b"3"),
    ]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")],
)
@pytest.mark.parametrize("prefix", ["", "./"])
def test_archive_lists_what_the_folder_lists(tmp_path, name, mode, prefix):
    archive = write_archive(tmp_path / name, FILES, mode, prefix)
    assert facts(read_source(archive, split="train")) == TRAIN
    assert facts(read_archive(archive, split="test")) == [("test/dog/0.jpg", "dog", b"dog-0")]
    flat = write_archive(tmp_path / f"flat-{name}", FLAT, mode, prefix)
    assert facts(read_source(flat)) == facts(read_source(write_folder(tmp_path / "f", FLAT)))


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_split_must_be_chosen_where_there_are_some_and_only_there(tmp_path, kind):
    def make(files, name):
        if kind == "folder":
            return write_folder(tmp_path / name, files)
        return write_archive(tmp_path / f"{name}.tar.gz", files, "w:gz")

    with pytest.raises(ValueError, match="has the splits test, train: choose one"):
        read_source(make(FILES, "splits"))
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        read_source(make(FILES, "splits"), split="dev")
    with pytest.raises(ValueError, match="it has no splits"):
        read_source(make(FLAT, "flat"), split="train")
    with pytest.raises(ValueError, match=r"no image with one of .*\. Put labelled images into"):
        read_source(make({"a/x.txt": b""}, "none"))


def test_cut_archive_is_refused(tmp_path):
    path = tmp_path / "a.tar.gz"
    write_archive(
        path, {f"c/{i}.jpg": bytes(np.random.default_rng(i).bytes(999)) for i in range(9)}, "w:gz"
    )
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="not a whole tar archive"):
        read_archive(path)
    with pytest.raises(ValueError, match="no such archive"):
        read_archive(tmp_path / "none.tar")


def test_member_that_leaves_the_archive_is_refused(tmp_path):
    archive = write_archive(tmp_path / "a.tar", {"../c/x.jpg": b"1"}, "w")
    with pytest.raises(ValueError, match="leaves the archive"):
        read_archive(archive)


def test_csv_paths_resolve_against_the_folder_of_the_table(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", {"img/a.jpg": b"1", "img/b.jpg": b"2"})
    elsewhere = tmp_path / "else.jpg"
    elsewhere.write_bytes(b"3")
    table = tmp_path / "data" / "labels.csv"
    table.write_text(f'path,label,extra\nimg/a.jpg,cat,1\nimg/b.jpg,,2\n{elsewhere},"big, dog",3\n')
    expected = [
        ("img/a.jpg", "cat", b"1"),
        ("img/b.jpg", None, b"2"),
        (str(elsewhere), "big, dog", b"3"),
    ]
    assert facts(read_source(str(table))) == expected
    monkeypatch.chdir(tmp_path / "data")
    assert facts(read_table("labels.csv")) == expected


def test_parquet_table_reads_as_csv_does(tmp_path):
    write_folder(tmp_path, {"a.jpg": b"1", "b.jpg": b"2"})
    table = pa.table({"path": ["a.jpg", "b.jpg"], "label": pa.array([7, None], pa.int64())})
    pq.write_table(table, tmp_path / "t.parquet")
    assert facts(read_source(str(tmp_path / "t.parquet"))) == [
        ("a.jpg", "7", b"1"),
        ("b.jpg", None, b"2"),
    ]


def test_table_and_images_may_lie_in_an_object_store():
    objects.write_object("memory://tables/d/t.csv", b"path,label\nx/a.jpg,cat\n", "replace")
    objects.write_object("memory://tables/d/x/a.jpg", b"1", "replace")
    assert facts(read_table("memory://tables/d/t.csv")) == [("x/a.jpg", "cat", b"1")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\na.jpg,cat\n",
            "no column 'path'; it has file, label. The columns must be called",
        ),
        ("path,label\na.jpg,cat\na.jpg,dog\n", r"row 2: path 'a\.jpg' is empty or came before"),
        ("path,label\n,cat\n", "row 1: path ''"),
        ("path,label\n", "no row"),
        ("", "no column 'path'; it has none"),
    ],
)
def test_bad_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.csv")


def test_missing_table_or_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such table"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("path\ngone.jpg\n")
    with pytest.raises(ValueError, match=r"t\.csv names .*gone\.jpg, which does not exist"):
        read_table(tmp_path / "t.csv")[0].load()


def test_table_has_no_splits_and_unknown_sources_are_listed(tmp_path):
    with pytest.raises(ValueError, match="a table has no splits"):
        read_source(str(tmp_path / "t.csv"), split="train")
    with pytest.raises(ValueError, match="neither cifar10, an existing folder"):
        read_source(str(tmp_path / "nowhere"))


def test_cifar10_comes_through_torchvision_as_png(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)

    class FakeCifar10:
        classes = ("airplane", "automobile")

        def __init__(self, root, train, download):
            assert (root, train, download) == (str(tmp_path), False, True)
            self.data, self.targets = pixels, [1, 0, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar10)
    images = read_source(f"cifar10:{tmp_path}", split="test")
    assert [(i.path, i.label) for i in images] == [
        ("test/automobile/00000.png", "automobile"),
        ("test/airplane/00001.png", "airplane"),
        ("test/automobile/00002.png", "automobile"),
    ]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images[2].load()))), pixels[2])
    with pytest.raises(ValueError, match="has no split 'dev'"):
        read_cifar10(tmp_path, split="dev")
