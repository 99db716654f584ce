"""Tests of the tar reader, with webdataset as the oracle in both directions."""

import gzip
import io
import tarfile
from collections.abc import Sequence

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from storage.samples import (
    MAX_MEMBER_BYTES,
    CorruptShard,
    in_shard_key,
    iterate_samples,
)


def tar_of(members: Sequence[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def webdataset_samples(data: bytes, tmp_path) -> list[tuple[str, dict[str, bytes]]]:
    path = tmp_path / "oracle.tar"
    path.write_bytes(data)
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)  # type: ignore
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in dataset]


def ours(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for sample in iterate_samples(data, stem="s"):
        members = {sample.image_extension: bytes(sample.image)}
        if sample.label is not None:
            members["cls"] = str(sample.label).encode()
        found.append((in_shard_key(sample.key, "s"), members))
    return found


PLAIN = tar_of(
    [
        ("a/0.jpg", b"first"),
        ("a/0.cls", b"3"),
        ("a/1.JPEG", b"second" * 200),
        ("a/1.cls", b"0"),
        ("b.d/2.png", b""),
        ("3.webp", b"x" * 512),
    ]
)


def test_samples_keep_order_key_bytes_label_and_offset():
    samples = iterate_samples(PLAIN, stem="train-0")
    assert [s.key for s in samples] == ["train-0/a/0", "train-0/a/1", "train-0/b.d/2", "train-0/3"]
    assert [s.label for s in samples] == [3, 0, None, None]
    assert [s.image_extension for s in samples] == ["jpg", "jpeg", "png", "webp"]
    assert bytes(samples[0].image) == b"first"
    # The first header takes 512 bytes, so the first image begins right after it.
    assert samples[0].offset == 512
    for sample in samples:
        end = sample.offset + len(sample.image)
        assert PLAIN[sample.offset : end] == bytes(sample.image)


def test_plain_shard_reads_as_webdataset_reads_it(tmp_path):
    assert ours(PLAIN) == webdataset_samples(PLAIN, tmp_path)


def test_shard_of_webdatasets_writer_reads_the_same(tmp_path):
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False) as writer:
        for i in range(7):
            writer.write({"__key__": f"n/{i:04d}", "jpg": bytes([i]) * i * 300, "cls": b"%d" % i})
    assert ours(buffer.getvalue()) == webdataset_samples(buffer.getvalue(), tmp_path)
    assert len(ours(buffer.getvalue())) == 7


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["", "a/", "a.b/", "./", "a/b/"]),
        st.text("abc01._ ", min_size=1, max_size=6),
        st.sampled_from(["jpg", "PNG", "txt", "seg.png", "cls.txt"]),
    ),
    max_size=8,
)


@given(names=NAMES)
@settings(max_examples=150, deadline=None)
def test_any_names_that_we_accept_read_as_webdataset_reads_them(names, tmp_path_factory):
    members = [
        (f"{folder}{base}.{ext}", f"{folder}{base}{ext}".encode()) for folder, base, ext in names
    ]
    data = tar_of(members)
    try:
        mine = iterate_samples(data, stem="s")
    except CorruptShard:
        return
    theirs = webdataset_samples(data, tmp_path_factory.mktemp("oracle"))
    assert [in_shard_key(s.key, "s") for s in mine] == [key for key, _ in theirs]
    for sample, (_, content) in zip(mine, theirs, strict=True):
        assert content[sample.image_extension] == bytes(sample.image)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["n" * 180 + "/ü.jpg", "short.jpg", "é" * 90 + ".jpg"])
def test_long_and_accented_names_of_gnu_and_pax_tars_are_read(tar_format, name, tmp_path):
    data = tar_of([(name, b"image"), ("z.jpg", b"other")], tar_format)
    assert ours(data) == webdataset_samples(data, tmp_path)
    assert ours(data)[0][0] == name.removesuffix(".jpg")


def test_pax_times_of_pythons_default_format_do_no_harm():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.mtime = 3, 1.5
        tar.addfile(info, io.BytesIO(b"abc"))
    assert ours(buffer.getvalue()) == [("a", {"jpg": b"abc"})]


def test_tar_cut_at_any_block_never_gives_a_shorter_shard():
    whole = ours(PLAIN)
    refused = 0
    for cut in range(0, len(PLAIN), 512):
        try:
            found = ours(PLAIN[:cut])
        except CorruptShard:
            refused += 1
        else:
            assert found == whole
    # 6 headers and 1 + 1 + 3 + 1 + 0 + 1 = 7 blocks of content lie before the first zero block;
    # every cut up to there must be refused, the cut at 0 too: 6 + 7 + 1 = 14.
    assert refused == 14


def test_tar_cut_inside_a_block_is_refused():
    for cut in (1, 511, 513, 1025, 3000):
        with pytest.raises(CorruptShard, match="cut at byte"):
            iterate_samples(PLAIN[:cut], stem="s")


def test_zeroed_header_in_the_middle_is_refused_not_taken_for_the_end():
    damaged = bytearray(PLAIN)
    damaged[2048 : 2048 + 512] = bytes(512)
    with pytest.raises(CorruptShard, match="end-of-archive block at byte 2048"):
        iterate_samples(bytes(damaged), stem="s")


def test_flipped_bit_in_a_header_is_refused():
    for position in (0, 100, 130, 150, 160, 300):
        damaged = bytearray(PLAIN)
        damaged[position] ^= 0x10
        with pytest.raises(CorruptShard):
            iterate_samples(bytes(damaged), stem="s")


def test_key_that_comes_again_later_is_refused_naming_shard_and_key():
    data = tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")])
    with pytest.raises(CorruptShard, match=r"shard s7: key 'a' occurs twice"):
        iterate_samples(data, stem="s7")


def test_one_extension_twice_in_a_sample_is_refused():
    with pytest.raises(CorruptShard, match="two members with extension 'jpg'"):
        iterate_samples(tar_of([("a.jpg", b"1"), ("a.JPG", b"2")]), stem="s")


@pytest.mark.parametrize("content", [b"", b"cat", b"-1", b"1.0", b"1 2", b"9" * 11, b"9" * 5000])
def test_bad_class_number_is_refused(content):
    with pytest.raises(CorruptShard, match=r"'a.cls' holds"):
        iterate_samples(tar_of([("a.jpg", b"1"), ("a.cls", content)]), stem="s")


def test_class_number_with_line_end_is_read():
    samples = iterate_samples(tar_of([("a.jpg", b"1"), ("a.cls", b" 12\n")]), stem="s")
    assert samples[0].label == 12


def test_sample_without_image_is_counted_and_named():
    data = tar_of([("a.jpg", b"1"), ("b.cls", b"2"), ("c.json", b"{}")])
    with pytest.raises(CorruptShard, match=r"2 of 3 samples have no member of jpg.*first key 'b'"):
        iterate_samples(data, stem="s")


def test_count_other_than_the_corpus_says_is_refused():
    assert len(iterate_samples(PLAIN, stem="s", num_samples=4)) == 4
    with pytest.raises(CorruptShard, match="4 samples, but the corpus was indexed with 5"):
        iterate_samples(PLAIN, stem="s", num_samples=5)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.FIFOTYPE, "fifo"),
        (tarfile.GNUTYPE_SPARSE, "sparse file"),
    ],
)
def test_member_other_than_a_regular_file_is_refused(kind, word):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type = kind
        info.linkname = "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(CorruptShard, match=word):
        iterate_samples(buffer.getvalue(), stem="s")


def test_folders_in_a_tar_are_passed_over():
    buffer = io.BytesIO(PLAIN)
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert ours(buffer.getvalue()) == ours(PLAIN)


@pytest.mark.parametrize("name", ["../../etc/x.jpg", "/abs.jpg", "a/../b.jpg", "a\nb.jpg"])
def test_name_that_leaves_its_folder_or_has_control_characters_is_refused(name):
    with pytest.raises(CorruptShard, match="member name"):
        iterate_samples(tar_of([(name, b"1")]), stem="s")


def test_sparse_bomb_of_a_pax_header_is_refused_before_it_is_read():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.realsize": str(8 * 2**30)}
        tar.addfile(info)
    with pytest.raises(CorruptShard, match=r"GNU\.sparse"):
        iterate_samples(buffer.getvalue(), stem="s")


def test_oversized_pax_header_is_refused():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"comment": "x" * 100_000}
        tar.addfile(info)
    with pytest.raises(CorruptShard, match="limit is 65536"):
        iterate_samples(buffer.getvalue(), stem="s")


def test_member_over_the_size_limit_is_refused():
    data = tar_of([("a.jpg", bytes(MAX_MEMBER_BYTES + 1))])
    with pytest.raises(CorruptShard, match="limit is 67108864"):
        iterate_samples(data, stem="s")


def test_compressed_shard_is_refused_with_remedy():
    with pytest.raises(CorruptShard, match="decompress it"):
        iterate_samples(gzip.compress(PLAIN), stem="s")


def test_pickle_members_are_passed_over_unread(tmp_path):
    bomb = b"cposix\nsystem\n(S'touch " + str(tmp_path / "marker").encode() + b"'\ntR."
    data = tar_of([("a.jpg", b"1"), ("a.pkl", bomb), ("a.pyd", bomb), ("a.pth", bomb)])
    assert ours(data) == [("a", {"jpg": b"1"})]
    assert not (tmp_path / "marker").exists()


def test_of_several_images_the_first_kind_of_the_documented_order_is_taken():
    data = tar_of([("a.png", b"mask"), ("a.jpg", b"photo"), ("a.seg.png", b"x")])
    assert ours(data) == [("a", {"jpg": b"photo"})]


def test_key_of_another_shard_is_refused():
    with pytest.raises(ValueError, match="does not belong to shard 'other'"):
        in_shard_key("s/a", "other")
