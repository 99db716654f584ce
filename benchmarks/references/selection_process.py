"""What a process has taken so far."""

import resource
import time


def peak_bytes() -> int:
    """Return the peak of resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_seconds() -> float:
    """Return the time on the cores so far, of all threads."""
    return time.process_time()
