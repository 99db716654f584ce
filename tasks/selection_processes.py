"""Who carries out a selection's passes over groups: this process's threads, or worker processes.

Reading, ranking and writing many files is in good part Python's own work, which threads of one
process do in turns (Python's lock); processes do it side by side.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Literal, TypeVar

from tasks.children import end_of_output

T = TypeVar("T")

# A worker may die of its machine; where so many die at one group, they die of the group.
DEATHS_AT_ONE_GROUP = 3

# Processes need about a second to start. Below so many shards, each of which costs Python's own
# work, and so many rows, most of whose work threads do side by side, two threads are sooner done.
_SHARDS_WORTH_PROCESSES, _ROWS_WORTH_PROCESSES = 300, 10_000_000

_SHARDS_OF_A_GROUP, _MOST_GROUPS = 32, 100
_SHARED_GROUPS = 32
"""At least, of a corpus that processes share and that has as many shards."""

_THREADS = 2
_LAST_WORDS_SECONDS, _GRACE_SECONDS = 1.0, 5.0
_COMMAND = [sys.executable, "-m", "tasks.selection_worker"]
_ENVIRONMENT = {
    # One core each: threads of libraries would stand in the way of the other workers.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # Arrays of up to megabytes come and go: their pages are kept, for the kernel clears each new
    # one; in few arenas, for what is kept is kept in each.
    "MALLOC_MMAP_THRESHOLD_": str(2**24),
    "MALLOC_TRIM_THRESHOLD_": str(2**25),
    "MALLOC_ARENA_MAX": "2",
    # To look for plugins in all that is installed would be a tenth of the time that a start takes.
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
}


class SelectionWorkerLost(RuntimeError):
    """Worker processes died again and again at one group of shards."""


class SelectionStopped(RuntimeError):
    """The selection was stopped on request; what is recorded is kept."""


def selection_groups(stems: Sequence[str], *, num_rows: int) -> list[list[str]]:
    """Return the shards of a selection in groups, each carried out by one worker in one pass.

    They depend on the corpus alone: a group's record is found by its shards.

    Args:
        stems: of the corpus's shards, in its order.
        num_rows: of the corpus.
    """
    size = max(_SHARDS_OF_A_GROUP, -(-len(stems) // _MOST_GROUPS))
    if _is_worth_processes(len(stems), num_rows):
        # Else all but one worker wait long for the last group of each pass.
        size = min(size, -(-len(stems) // _SHARED_GROUPS))
    return [list(stems[start : start + size]) for start in range(0, len(stems), size)]


class SelectionThreads:
    """Carries out passes in the calling threads: for corpora too small to be worth processes."""

    num_workers = _THREADS

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return `function(*arguments)`. Raises: what it raises."""
        return function(*arguments)

    run_at_once = run

    def close(self) -> None:
        """Nothing runs."""


class SelectionProcesses:
    """Processes that carry out passes, one at a time each; they are started at once.

    They are killed with this process, and when the pool is closed.
    """

    def __init__(self, num_workers: int, descriptors: Sequence[int] = ()) -> None:
        """Start the workers; they need most of a second until they carry out anything.

        Args:
            num_workers: how many.
            descriptors: of open files that they have, too, under the same numbers.
        """
        self._descriptors = tuple(descriptors)
        self.num_workers = num_workers
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._servers: list[_Server] = []
        # Children die with the thread that forked them (PR_SET_PDEATHSIG): all are forked by this
        # one, which lives until `close`.
        self._forking = ThreadPoolExecutor(1, thread_name_prefix="fork-selection-workers")
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._in_this_process = threading.Lock()
        for worker in self._started(num_workers):
            self._free.put(worker)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Have a worker call a function of the modules that it imports, and return what that does.

        A worker that dies is replaced, and the function called again: it must bear that.

        Args:
            function: by whose name the worker finds it.
            arguments: are sent to the worker.
        Raises: what the function raises; SelectionWorkerLost; SelectionStopped after `close`.
        """
        order = pickle.dumps((function, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        worker, last_server = self._free.get(), None
        try:
            for _ in range(DEATHS_AT_ONE_GROUP):
                if worker is None:
                    [worker] = self._started(1)
                last_server = worker.server
                try:
                    result, error = worker.ask(order)
                except BaseException as ending:
                    # Also where it lives: its answer would be taken for that to the next order.
                    worker.connection.close()
                    worker = None
                    if not isinstance(ending, EOFError | OSError):
                        raise
                    continue
                if error is not None:
                    raise error
                return result
        finally:
            self._free.put(worker)
        if self._closing.is_set():
            raise SelectionStopped("stopped while this group was selected")
        raise SelectionWorkerLost(
            f"{DEATHS_AT_ONE_GROUP} worker processes in a row died at one group of shards. If the"
            " machine is out of memory, set engine.processes lower (0: no processes); what is"
            " recorded is kept, and the next run goes on there\n--- end of their output ---\n"
            f"{last_server and last_server.end_of_output()}"
        )

    def run_at_once(self, function: Callable[..., T], *arguments: Any) -> T:
        """Do as `run` does, but for what harms nobody in this process: call it here at the start.

        While workers start, which one core does, one thread at a time need not wait for them.
        """
        worker = self._free.get()
        self._free.put(worker)
        is_ready = worker is None or worker.is_ready()
        if is_ready or not self._in_this_process.acquire(blocking=False):
            return self.run(function, *arguments)
        try:
            return function(*arguments)
        finally:
            self._in_this_process.release()

    def close(self) -> None:
        """End all workers, at once: what they have not recorded is done again the next time."""
        with self._lock:
            self._closing.set()
            num_free = 0
            with suppress(queue.Empty):
                while True:
                    worker = self._free.get_nowait()
                    num_free += 1
                    if worker is not None:
                        worker.connection.close()  # upon which it ends
            self._free.put(None)  # or who comes late would wait for ever
            is_busy = num_free < self.num_workers
            for server in self._servers:
                server.end(0 if is_busy else _GRACE_SECONDS)
        self._forking.shutdown()

    def _started(self, num_workers: int) -> "list[_Worker]":
        with self._lock:
            if self._closing.is_set():
                raise SelectionStopped("stopped before this group was selected")
            server, workers = self._forking.submit(_start, num_workers, self._descriptors).result()
            self._servers.append(server)
            return workers


SelectionWorkers = SelectionThreads | SelectionProcesses


def selection_workers(
    processes: int | Literal["auto"],
    *,
    num_rows: int,
    groups: Sequence[Sequence[str]],
    descriptors: Sequence[int] = (),
) -> SelectionWorkers:
    """Return who carries out the passes of a selection; the caller closes it.

    Args:
        processes: worker processes at most, of which one alone saves nothing; auto: one for each
            core, none for a small corpus.
        num_rows: of the corpus.
        groups: of its shards, from `selection_groups`.
        descriptors: of open files that workers read or write under the same numbers.
    """
    if processes == "auto":
        is_worth_processes = _is_worth_processes(sum(map(len, groups)), num_rows)
        processes = len(os.sched_getaffinity(0)) if is_worth_processes else 0
    count = min(processes, len(groups))
    return SelectionProcesses(count, descriptors) if count > 1 else SelectionThreads()


def _is_worth_processes(num_shards: int, num_rows: int) -> bool:
    return num_shards >= _SHARDS_WORTH_PROCESSES or num_rows >= _ROWS_WORTH_PROCESSES


class _Server:
    """The process that has forked some workers, and what all of them print."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
        self._process, self._log = process, log

    def end(self, grace_seconds: float) -> None:
        """Kill it with its workers, unless all have ended when the grace has passed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_seconds)
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end_of_output(self) -> str:
        """Return the end of what was printed, and of what ended workers."""
        with suppress(subprocess.TimeoutExpired):  # where other workers live
            self._process.wait(_LAST_WORDS_SECONDS)
        return end_of_output(self._log)


class _Worker:
    """One worker process, seen from here."""

    def __init__(self, connection: Connection, server: _Server) -> None:
        self.connection, self.server = connection, server
        self._has_begun = False

    def is_ready(self) -> bool:
        """Return whether an order would be carried out, or fail, at once."""
        return self._has_begun or self.connection.poll()

    def ask(self, order: bytes) -> Any:
        """Return the answer to an order. Raises: EOFError, OSError if the worker dies over it."""
        if not self._has_begun:
            self.connection.recv_bytes()
            self._has_begun = True
        self.connection.send_bytes(order)
        return pickle.loads(self.connection.recv_bytes())


def _start(num_workers: int, shared: Sequence[int]) -> tuple[_Server, list[_Worker]]:
    """Start a process that forks so many workers, which share some open files with this one."""
    with ExitStack() as theirs_open:
        pairs = [Pipe() for _ in range(num_workers)]
        for _, theirs in pairs:
            theirs_open.enter_context(theirs)
        descriptors = [theirs.fileno() for _, theirs in pairs]
        # Output goes to a file: a pipe that nobody empties would block the workers.
        log: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 - lives as long as the workers
            prefix="selftrain-selection-workers-"
        )
        process = subprocess.Popen(
            [*_COMMAND, str(os.getpid()), *map(str, descriptors)],
            env=dict(os.environ) | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[*descriptors, *shared],
            start_new_session=True,
            # No `preexec_fn`, with which this whole process would be forked: it dies with this
            # thread by its own doing.
        )
    server = _Server(process, log)
    return server, [_Worker(ours, server) for ours, _ in pairs]
