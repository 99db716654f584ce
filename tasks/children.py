"""Child processes that never outlive the run they work for."""

import ctypes
import os
import signal
import subprocess
from contextlib import suppress

_PR_SET_PDEATHSIG = 1

# Loaded now: to load a library between fork and exec can deadlock in a process with threads.
_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that forked it ends; for `preexec_fn`.

    SIGKILL and not SIGTERM: an orphan that wrote a last checkpoint would write while a resumed
    run already reads. Elsewhere than on Linux a killed run's children live until their work ends.
    """
    with suppress(OSError, AttributeError):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_process_group(process: "subprocess.Popen[bytes]", *, grace_seconds: float) -> None:
    """Send SIGTERM to the process's group, then SIGKILL once the grace has passed."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=grace_seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
