"""Tests of shard patterns, with braceexpand (what webdataset uses) as the oracle."""

import braceexpand
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import objects
from storage.patterns import below_root, expand_braces, expand_shards


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.mark.parametrize(
    "pattern",
    [
        "a.tar",
        "t-{00000..00012}.tar",
        "t-{0..3}.tar",
        "t-{08..11}.tar",
        "t-{3..1}.tar",
        "t-{0..10..3}.tar",
        "t-{a..e}.tar",
        "{a,b}-{0..1}.tar",
        "x{a,b{1,2},c}y",
        "x{,s}.tar",
        "x{one}.tar",
        "{x{1..2}}.tar",
        "t-{-2..1}.tar",
        "t-{0001..10}.tar",
    ],
)
def test_braces_mean_what_they_mean_to_webdataset(pattern):
    assert list(expand_braces(pattern)) == list(braceexpand.braceexpand(pattern))


@given(
    st.lists(st.sampled_from(["a", "-", "{x,y}", "{1..3}", "{07..11}", "{p,{q,r}}"]), max_size=4)
)
def test_any_combination_of_braces_expands_as_braceexpand_does(parts):
    pattern = "".join(parts)
    assert list(expand_braces(pattern)) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["a{0..3.tar", "a}.tar", "{a}}b"])
def test_unbalanced_brace_is_refused(pattern):
    with pytest.raises(ValueError, match="brace"):
        list(expand_braces(pattern))


def test_remote_pattern_keeps_its_order_and_opens_nothing():
    assert expand_shards("s3://b/p/t-{09..11}.tar") == [
        "s3://b/p/t-09.tar",
        "s3://b/p/t-10.tar",
        "s3://b/p/t-11.tar",
    ]


@pytest.mark.parametrize(
    "entry",
    [
        "pipe:touch MARKER; cat x.tar",
        "pipe:curl http://x/{0..3}.tar",
        "a.tar::b.tar",
        "simplecache::s3://b/x.tar",
        "{pipe:touch MARKER,a}.tar",
        "file:x.tar",
        "-rf.tar",
    ],
)
def test_commands_and_chained_urls_are_refused_before_anything_runs(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="refused"):
        expand_shards(entry)
    assert not list(tmp_path.iterdir())


def test_command_in_a_list_file_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a.tar\npipe:cat b.tar\n")
    with pytest.raises(ValueError, match="refused"):
        expand_shards(str(tmp_path / "list.txt"))


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expand_shards("d/{a,b}.tar") == [str(tmp_path / "d/a.tar"), str(tmp_path / "d/b.tar")]


def test_folder_stands_for_all_tars_below_it_sorted(tmp_path):
    touch(tmp_path, "b.tar", "a.tar", "deep/c.tar", "classes.json", "note.txt")
    assert expand_shards(str(tmp_path)) == [
        str(tmp_path / n) for n in ("a.tar", "b.tar", "deep/c.tar")
    ]


def test_folder_of_a_remote_store_lists_its_tars():
    for name in ("t/b.tar", "t/a.tar", "t/x.json"):
        objects.write_object(f"memory://patterns/{name}", b"x", "replace")
    urls = ["memory://patterns/t/a.tar", "memory://patterns/t/b.tar"]
    assert expand_shards("memory://patterns/t") == urls
    assert expand_shards("memory://patterns/t/") == urls
    assert expand_shards("memory://patterns/t/*.tar") == urls


def test_star_stays_within_a_folder_and_two_stars_do_not(tmp_path):
    touch(tmp_path, "a1.tar", "a2.tar", "b1.tar", "deep/a3.tar", "a4.txt")
    base = str(tmp_path)
    assert expand_shards(f"{base}/a*.tar") == [f"{base}/a1.tar", f"{base}/a2.tar"]
    assert expand_shards(f"{base}/**/a*.tar") == [
        f"{base}/a1.tar",
        f"{base}/a2.tar",
        f"{base}/deep/a3.tar",
    ]
    assert expand_shards(f"{base}/?1.tar") == [f"{base}/a1.tar", f"{base}/b1.tar"]
    assert expand_shards(f"{base}/[!a]1.tar") == [f"{base}/b1.tar"]
    assert expand_shards(f"{base}/a[2-9].tar") == [f"{base}/a2.tar"]


def test_list_file_skips_comments_and_resolves_against_its_folder(tmp_path):
    listing = tmp_path / "shards.txt"
    listing.write_text("# made today\n\nx-{0..1}.tar\ns3://b/y.tar\n/abs/z.tar\n")
    assert expand_shards(str(listing)) == [
        str(tmp_path / "x-0.tar"),
        str(tmp_path / "x-1.tar"),
        "s3://b/y.tar",
        "/abs/z.tar",
    ]


def test_remote_list_file_resolves_against_its_folder():
    objects.write_object("memory://lists/a/l.txt", b"x-{0..1}.tar\n", "replace")
    assert expand_shards("memory://lists/a/l.txt") == [
        "memory://lists/a/x-0.tar",
        "memory://lists/a/x-1.tar",
    ]


def test_commas_join_entries_but_not_inside_braces():
    assert expand_shards("/a/{x,y}.tar, /b/z.tar") == ["/a/x.tar", "/a/y.tar", "/b/z.tar"]
    assert expand_shards(["/a.tar", "/b.tar,/c.tar"]) == ["/a.tar", "/b.tar", "/c.tar"]


@pytest.mark.parametrize("pattern", ["", [], " , ", ["", ""]])
def test_empty_pattern_is_a_clear_error(pattern):
    with pytest.raises(ValueError, match="no shard: the pattern"):
        expand_shards(pattern)


def test_folder_or_glob_without_a_tar_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        expand_shards(str(tmp_path))
    with pytest.raises(ValueError, match="nothing matches"):
        expand_shards(f"{tmp_path}/*.tar")
    with pytest.raises(ValueError, match="does not exist"):
        expand_shards(f"{tmp_path}/none.txt")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.json", "nowhere"])
def test_what_is_no_tar_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=r"is neither a \.tar file"):
        expand_shards(f"/tmp/{name}")


def test_list_in_a_list_is_refused(tmp_path):
    (tmp_path / "outer.txt").write_text("inner.txt\n")
    (tmp_path / "inner.txt").write_text("a.tar\n")
    with pytest.raises(ValueError, match=r"in the list .*outer\.txt"):
        expand_shards(str(tmp_path / "outer.txt"))


def test_range_of_too_many_shards_is_refused():
    with pytest.raises(ValueError, match="more than 1000000 shards"):
        expand_shards("/a/{0..99999999}.tar")


@pytest.mark.parametrize(
    ("pattern", "root", "expected"),
    [
        ("a.tar", "", "a.tar"),
        ("a.tar", "s3://b/p", "s3://b/p/a.tar"),
        ("a-{0,1}.tar, b", "/data/", "/data/a-{0,1}.tar,/data/b"),
        ("s3://b/a.tar,/x/b.tar,~/c.tar,d.tar", "r", "s3://b/a.tar,/x/b.tar,~/c.tar,r/d.tar"),
    ],
)
def test_a_root_stands_before_every_relative_entry(pattern, root, expected):
    assert below_root(pattern, root) == expected
