"""Start `selftrain` again and again, each time in a fork of one process that has done the imports.

Importing Prefect and torch takes longer than a killed run takes to get to where it is killed. What
is forked is a whole run all the same: a process of its own, with an environment of its own, that
starts workers as ever and that SIGKILL ends.

`python forked_drivers.py`: one JSON object a line. In: {"arguments": [...], "environment": {...}}.
Out: {"pid": ...}, and when that process has ended, {"returncode": ...}, negative after a signal.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class ForkedDriver:
    """The run that is going on; one at a time."""

    def __init__(self, server: "subprocess.Popen[bytes]", order: Mapping[str, Any]) -> None:
        assert server.stdin is not None
        self._server = server
        server.stdin.write(json.dumps(order).encode() + b"\n")
        server.stdin.flush()
        self.pid = int(self._answer(timeout=60)["pid"])

    def wait(self, timeout: float) -> int:
        """Return its exit code, as Popen.wait does.

        Raises: TimeoutError after `timeout` seconds.
        """
        return int(self._answer(timeout)["returncode"])

    def _answer(self, timeout: float) -> dict[str, Any]:
        answers = self._server.stdout
        assert answers is not None
        if not select.select([answers], [], [], timeout)[0]:
            raise TimeoutError(f"no answer within {timeout} s")
        return json.loads(answers.readline())


class ForkedDrivers:
    """Starts runs in forks; made by `forked_drivers`."""

    def __init__(self, server: "subprocess.Popen[bytes]") -> None:
        self._server = server

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> ForkedDriver:
        """Run `selftrain ARGUMENTS` with these environment variables on top of the others.

        `SELFTRAIN_CRASH_PID` is set to the process id of the run: a crash point in a worker kills
        the driver with it, as a lost machine would.
        """
        order = {"arguments": list(arguments), "environment": dict(environment or {})}
        return ForkedDriver(self._server, order)


@contextmanager
def forked_drivers() -> Iterator[ForkedDrivers]:
    """Yield what starts runs, in the environment of now; whatever runs at the end is killed."""
    # Unbuffered, so that `select` sees all that is there.
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    try:
        yield ForkedDrivers(server)
    finally:
        server.kill()
        server.wait()


def _serve() -> None:
    # What a run imports, and nothing that starts a thread: a fork has the one that forks alone.
    import flows.cli
    import flows.loading
    import flows.opening
    import flows.running
    from tasks.children import die_with_parent

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    orders = os.fdopen(os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    for line in orders:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            os.environ.update(order["environment"], SELFTRAIN_CRASH_PID=str(os.getpid()))
            sys.argv = ["selftrain", *order["arguments"]]
            flows.cli.main()
            raise AssertionError("main ends by SystemExit")
        print(json.dumps({"pid": pid}), file=answers)
        status = os.waitpid(pid, 0)[1]
        print(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}), file=answers)


if __name__ == "__main__":
    _serve()
