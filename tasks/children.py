"""Child processes that never outlive the run they work for."""

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import IO

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_SHOWN_BYTES = 4000

# Loaded now: to load a library between fork and exec can deadlock in a process with threads.
_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that forked it ends; for `preexec_fn`.

    SIGKILL and not SIGTERM: an orphan that wrote a last checkpoint would write while a resumed
    run already reads. Elsewhere than on Linux a killed run's children live until their work ends.
    """
    with suppress(OSError, AttributeError):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """Do as `die_with_parent` does, and end this process now if that parent is gone already."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(0)


def end_of_output(log: IO[bytes]) -> str:
    """Return the end of what children have printed into a file of theirs."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _SHOWN_BYTES))
    return log.read().decode(errors="replace").strip() or "(nothing)"


def stop_process_group(
    process: "subprocess.Popen[bytes]", *, grace_seconds: float, until_empty: bool = False
) -> None:
    """Send SIGTERM to the process's group, then SIGKILL once the grace has passed.

    Args:
        process: leads its group.
        grace_seconds: for what the group does upon SIGTERM.
        until_empty: give the grace to members that outlive the process as well; by default its own
            end is enough.
    """
    if process.poll() is not None and not until_empty:
        return
    deadline = time.monotonic() + grace_seconds
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            if process.poll() is not None and not until_empty:
                return
            os.killpg(process.pid, 0)
            time.sleep(_POLL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
