"""The server that the processes which decode are forked from; imports nothing large itself."""

import multiprocessing
from multiprocessing import forkserver
from typing import Any

# Forks of a process that has a GPU and threads may hang; those of a server that has neither do not.
CONTEXT = "forkserver"


def start_decode_server() -> None:
    """Start the server, which imports torch beside this process; a second call does nothing."""
    context: Any = multiprocessing.get_context(CONTEXT)
    context.set_forkserver_preload(["__main__", "tasks.decode_processes"])
    forkserver.ensure_running()
