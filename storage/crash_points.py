"""Named places at which a test may have a process killed, to prove that a resume mends it."""

import os
import signal
import threading

_lock = threading.Lock()
_num_reached: dict[str, int] = {}


def reach(name: str) -> None:
    """Kill this process with SIGKILL if the environment asks for it; otherwise do nothing.

    "Killed at any moment" can only be tested if the moments can be chosen: between the data
    objects and the manifest, for one. With ``SELFTRAIN_CRASH_AT=<name>`` the process dies the
    first time it comes here, with ``<name>#<n>`` the n-th time (from 1). If ``SELFTRAIN_CRASH_PID``
    is set, that process (a driver, say) is killed before.
    """
    wanted = os.environ.get("SELFTRAIN_CRASH_AT")
    if not wanted:
        return
    place, _, number = wanted.partition("#")
    if place != name:
        return
    with _lock:
        _num_reached[name] = _num_reached.get(name, 0) + 1
        if _num_reached[name] != int(number or 1):
            return
        other = os.environ.get("SELFTRAIN_CRASH_PID")
        if other:
            os.kill(int(other), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
