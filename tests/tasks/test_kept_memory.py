"""Freed memory is used again, without the kernel."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import kept_memory

_SCRIPT = """
import resource
from tasks.kept_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 30_000_000  # written to, and freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
print(keep_freed_memory())
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's malloc")
def test_what_was_freed_is_allocated_again_without_page_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    is_kept, given_back, kept = done.stdout.split()
    assert is_kept == "True"
    # 7,324 pages of 4 KiB; some ten where pages are huge.
    assert int(given_back) > 10
    assert int(kept) <= int(given_back) // 5


def test_a_system_without_such_a_setting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "_LIBC", object())
    assert not kept_memory.keep_freed_memory()


def test_a_bound_of_the_system_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldLibc:
        def __init__(self) -> None:
            self.taken: list[tuple[int, int]] = []

        def mallopt(self, name: int, value: int) -> int:
            if name == -3 and value > 32 << 20:
                return 0
            self.taken.append((name, value))
            return 1

    libc = OldLibc()
    monkeypatch.setattr(kept_memory, "_LIBC", libc)
    assert kept_memory.keep_freed_memory()
    assert libc.taken == [(-3, 32 << 20), (-1, 1 << 30)]
