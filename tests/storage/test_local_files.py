"""Files appear whole or not at all, and errors say what to do."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from storage import local_files
from storage.local_files import FilesTogether, leftovers, write_atomically
from storage.objects import list_objects


def test_a_written_file_holds_the_bytes_and_no_temporary_file_stays(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"bytes", exclusive=True)
    assert path.read_bytes() == b"bytes"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_exclusive_write_never_replaces(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_is_not_exclusive_replaces(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, b"first", exclusive=False)
    write_atomically(path, b"second", exclusive=False)
    assert path.read_bytes() == b"second"


def test_of_16_exclusive_writers_one_wins(tmp_path: Path):
    path = tmp_path / "new" / "file"
    barrier, winners = Barrier(16), []

    def write(index: int) -> None:
        barrier.wait()
        try:
            write_atomically(path, str(index).encode(), exclusive=True)
            winners.append(index)
        except FileExistsError:
            pass

    threads = [Thread(target=write, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert path.read_bytes() == str(winners[0]).encode()
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        (errno.ENOSPC, OSError, "the disk is full: free space or move the store"),
        (errno.EACCES, PermissionError, "no permission: check the owner and mode"),
        (errno.EROFS, OSError, "mounted read-only"),
    ],
)
def test_a_failed_write_leaves_nothing_and_names_path_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[OSError], remedy: str
):
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local_files.os, "fsync", fail)
    path = tmp_path / "file"
    with pytest.raises(kind, match=remedy) as caught:
        write_atomically(path, b"bytes", exclusive=False)
    assert caught.value.errno == code
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real_open = os.open

    def open_full(path: Any, flags: int, mode: int = 0o777) -> int:
        # The kernel's own ENOSPC, from the device that is always full.
        if flags & os.O_EXCL:
            return real_open("/dev/full", os.O_WRONLY)
        return real_open(path, flags, mode)

    monkeypatch.setattr(local_files.os, "open", open_full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        write_atomically(tmp_path / "file", b"x" * 50_000, exclusive=False)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_files_written_together_appear_together(tmp_path: Path):
    files = FilesTogether()
    for name in ("a", "b"):
        files.write(tmp_path / "folder" / name, name.encode() * 10_000)
    assert all(file.name.startswith(".tmp-") for file in (tmp_path / "folder").iterdir())
    files.commit()
    assert sorted(os.listdir(tmp_path / "folder")) == ["a", "b"]
    assert (tmp_path / "folder" / "b").read_bytes() == b"b" * 10_000
    files.discard()
    files.commit()
    assert sorted(os.listdir(tmp_path / "folder")) == ["a", "b"]


def test_files_that_are_not_committed_are_gone(tmp_path: Path):
    files = FilesTogether()
    files.write(tmp_path / "file", b"bytes")
    num_open = len(os.listdir("/proc/self/fd"))
    files.discard()
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == num_open - 1


def test_files_of_which_one_cannot_be_made_safe_do_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = FilesTogether()
    for name in ("a", "b"):
        files.write(tmp_path / name, b"bytes")
    synced: list[int] = []

    def fail_second(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local_files.os, "fsync", fail_second)
    with pytest.raises(OSError, match=r"file safe.*the disk is full.*/b"):
        files.commit()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_file_that_a_full_disk_cut_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = FilesTogether()
    files.write(tmp_path / "a", b"bytes")
    monkeypatch.setattr(local_files, "_create", lambda path: os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError, match="the disk is full"):
        files.write(tmp_path / "b", b"x" * 50_000)
    files.commit()
    assert os.listdir(tmp_path) == ["a"]


def test_a_path_below_a_file_is_an_error_that_says_so(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="a part of the path is a file"):
        write_atomically(tmp_path / "file" / "below", b"x", exclusive=True)


def test_without_hard_links_an_exclusive_write_still_never_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(local_files.os, "link", no_links)
    path = tmp_path / "file"
    write_atomically(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_leftovers_are_old_temporary_files_only(tmp_path: Path):
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    old, young = folder / ".tmp-old", folder / ".tmp-young"
    for file in (old, young, folder / "data"):
        file.write_bytes(b"x")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    assert leftovers(tmp_path, older_than_seconds=3600) == [old]


def test_a_writer_killed_in_the_middle_leaves_only_a_temporary_file(tmp_path: Path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from storage import local_files\n"
        "local_files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "local_files.write_atomically(Path(sys.argv[1]), b'bytes', exclusive=True)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file")],
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=60,
    )
    assert killed.returncode == -9
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".tmp-")] == []
    assert leftovers(tmp_path, older_than_seconds=0) == list(tmp_path.iterdir())
    assert list_objects(str(tmp_path)) == []
