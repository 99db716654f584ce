"""The processes that carry out a selection's passes: `python -m tasks.selection_worker PID FD...`.

The process that is started imports what passes need, once, and forks a worker for each of the
connections it was given. Each worker carries out what comes over its connection until that ends.
All of them are killed with the process that started the first one.
"""

import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# What is asked for is found in these, by name, and imported here before there are several.
from tasks import selection_passes, selection_writing  # noqa: F401
from tasks.children import end_with_parent

Order = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments, as they are sent, pickled."""

READY = b"ready"
"""The first thing that a worker sends."""

Answer = tuple[Any, BaseException | None]
"""What it returned, or what it raised."""

# A file's keys are as many objects, none in a cycle: collecting after 700 took a twentieth of all.
_OBJECTS_BEFORE_COLLECTION = 100_000


def main(parent: int, descriptors: Sequence[int]) -> None:
    """Fork a worker for each connection, wait until all of them have ended, and end this process.

    Args:
        parent: process that has started this one.
        descriptors: of the workers' ends of the connections.
    """
    end_with_parent(parent)
    gc.freeze()  # or the first collection of each worker would copy what all of them share
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
    server = os.getpid()
    for own in descriptors:
        if os.fork() == 0:
            end_with_parent(server)
            _work(own, [other for other in descriptors if other != own])
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        worker, status = os.wait()
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            print(f"worker {worker} was ended by {name}", file=sys.stderr, flush=True)
    os._exit(0)  # somebody waits for it, and taking apart what was imported takes its time


def _work(own: int, others: Sequence[int]) -> None:
    """Carry out what comes over a connection, and end this process, which was forked."""
    status = 1
    try:
        for other in others:  # else it would not end with the worker at its end
            os.close(other)
        with Connection(own) as connection:
            _answer_all(connection)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # nobody asks any more
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _answer_all(connection: Connection) -> None:
    connection.send_bytes(READY)
    while True:
        connection.send_bytes(_carried_out(connection.recv_bytes()))


def _carried_out(order: bytes) -> bytes:
    """Return the pickled answer to a pickled order."""
    try:
        function, arguments = pickle.loads(order)
        return _pickled((function(*arguments), None))
    except Exception as error:
        # The traceback does not travel with an exception; a note does.
        error.add_note(f"in a process of the selection:\n{traceback.format_exc()}")
        try:
            answer = _pickled((None, error))
            pickle.loads(answer)  # some can be sent and not be made again
            return answer
        except Exception:
            return _pickled((None, RuntimeError(f"{type(error).__name__}: {error}")))


def _pickled(answer: Answer) -> bytes:
    return pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(number) for number in sys.argv[2:]])
