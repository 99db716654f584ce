"""What a process and its children have taken so far."""

import os
import resource
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_ASIDE = "aside-"
_POLL_SECONDS = 0.5  # looks at processes take milliseconds each, which others are not charged


def peak_bytes() -> int:
    """Return the peak of resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_seconds() -> float:
    """Return the time on the cores so far, of all threads and of all children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def set_aside(folder: Path) -> None:
    """Move what an earlier run wrote out of the way, for `remove_set_aside` to remove.

    ext4 keeps inodes that were deleted in the last minutes from being used again, by a search that
    whoever creates files then pays for.
    """
    with suppress(FileNotFoundError):
        folder.rename(folder.with_name(f"{_ASIDE}{time.time_ns()}"))


def remove_set_aside(folder: Path) -> None:
    """Remove, at any depth below a folder, what was set aside."""
    for aside in list(folder.rglob(f"{_ASIDE}*")):
        shutil.rmtree(aside)


class PeakOfAll:
    """Measures the peak of memory of this process and of all that descend from it, while entered.

    The sum of both peaks, though they may come at different times. Descendants count with their
    proportional share of what several of them map (PSS), this process with all that is resident.

    Attributes:
        bytes_before: of this process, when this was made.
        num_children: the largest number of other processes.
    """

    def __init__(self) -> None:
        self.bytes_before = peak_bytes()
        self.num_children = 0
        self._children_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakOfAll":
        """Begin to measure."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End measuring."""
        self._ended.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """The sum of the peaks so far."""
        return peak_bytes() + self._children_bytes

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            children = _descendants(os.getpid())
            total = sum(_pss_bytes(child) for child in children)
            self._children_bytes = max(self._children_bytes, total)
            self.num_children = max(self.num_children, len(children))


def _pss_bytes(process: int) -> int:
    """Return the proportional share of memory of a process; 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _descendants(process: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            child, rest = status.read_text().split(" (", 1)
            children.setdefault(int(rest.rpartition(") ")[2].split()[1]), []).append(int(child))
    found = children.get(process, [])
    for one in found:
        found += children.get(one, [])
    return found
