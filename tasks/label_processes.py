"""Labelling on this machine: long-lived worker processes, replaced when they die."""

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any

import torch

from tasks.children import die_with_parent, end_of_output
from tasks.label_jobs import LabelJob, label_group
from tasks.labeling import LabelingStopped

OnShard = Callable[[int], None]
"""Called with the number of samples of every shard that is committed, from any thread."""

# A worker may die of its machine; one that dies so often without finishing a shard dies of it.
DEATHS_AT_ONE_SHARD = 3

_COMMAND = [sys.executable, "-m", "tasks.label_worker"]
_STOP_GRACE_SECONDS = 20
_POLL_SECONDS = 1.0


class LabelWorkerLost(RuntimeError):
    """Worker processes died again and again at one shard."""


class LabelingRefused(ValueError):
    """A worker found input or settings at fault; another try would fail alike."""


class LabelingFailed(RuntimeError):
    """A worker could not label its group and lives on."""


class ThisProcess:
    """Labels in the calling thread: for corpora too small to be worth a process, and debuggers."""

    num_workers = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._stopping = threading.Event()

    def label(self, job: LabelJob, stems: Sequence[str], on_shard: OnShard) -> None:
        """Label a group. Raises: what labelling raises; LabelingStopped after `stop`."""
        if self._stopping.is_set():
            raise LabelingStopped("stopped before this group began")
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            for number, num_samples in enumerate(label_group(job, stems), start=1):
                on_shard(num_samples)
                if self._stopping.is_set():
                    raise LabelingStopped(f"stopped after {number} shards of this group")
        finally:
            torch.set_num_threads(threads_before)

    def stop(self) -> None:
        """Have every group end after its present shard."""
        self._stopping.set()

    def close(self) -> None:
        """Nothing runs."""


class WorkerProcesses:
    """Processes that label groups, one each at a time; started as they are needed.

    Each loads the model once. They are killed with this process and stop between shards.
    """

    def __init__(self, num_workers: int, *, threads: int, gpus: Sequence[str] = ()) -> None:
        """Prepare workers.

        Args:
            num_workers: how many at most.
            threads: CPU threads of each, or beside a GPU processes that decode for it.
            gpus: as CUDA_VISIBLE_DEVICES names them, one for each worker; none: on the CPU.
        """
        assert not gpus or len(gpus) >= num_workers, "refused by whoever counted"
        self.num_workers = num_workers
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[int, _Worker] = {}
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(num_workers):
            self._free.put(slot)
        # Beside a GPU the cores are for decoding, by processes of each worker's own.
        threads, decoders = (1, threads) if gpus else (threads, 0)
        self._environments = [
            _environment(threads, gpus[i] if gpus else "") for i in range(num_workers)
        ]
        self._options = ["--threads", str(threads), "--decoders", str(decoders)]
        # Children die with the thread that forked them (PR_SET_PDEATHSIG): all are forked by this
        # one, which lives until `close`.
        self._forking = ThreadPoolExecutor(1, thread_name_prefix="fork-label-workers")

    def label(self, job: LabelJob, stems: Sequence[str], on_shard: OnShard) -> None:
        """Have a free worker label a group; a worker that dies is replaced and sent it again.

        Raises: LabelWorkerLost, LabelingRefused, LabelingFailed; LabelingStopped after `stop`.
        """
        slot = self._free.get()
        try:
            self._label(slot, job, list(stems), on_shard)
        finally:
            self._free.put(slot)

    def _label(self, slot: int, job: LabelJob, stems: list[str], on_shard: OnShard) -> None:
        num_done, deaths = 0, 0
        while True:
            worker = self._worker(slot)
            last: dict[str, Any] = {}
            num_answers = 0
            try:
                # The whole group each time: shards that are recorded are passed over, and come
                # first, whatever their place.
                for last in worker.label(job, stems):
                    num_answers += "done" in last
                    if num_answers > num_done:
                        num_done, deaths = num_answers, 0
                        on_shard(last["done"])
            except BaseException:
                worker.end(0)  # or its answers would be taken for those to the next group
                raise
            match last.get("ended"):
                case "ok":
                    return
                case "stopped":
                    raise LabelingStopped(f"stopped after {num_done} shards of this group")
                case "refused":
                    raise LabelingRefused(last["message"])
                case "failed":
                    raise LabelingFailed(
                        f"{last['error']}: {last['message']}\n--- end of the worker's output ---\n"
                        f"{worker.end_of_output()}"
                    )
                case _:
                    deaths += 1
                    how = worker.bury()
            if num_done == len(stems):
                return
            if self._stopping.is_set():
                raise LabelingStopped(f"stopped after {num_done} shards of this group")
            if deaths == DEATHS_AT_ONE_SHARD:
                # Its answer may have been lost with the worker, and the next shards are read ahead.
                raise LabelWorkerLost(
                    f"{deaths} worker processes in a row died at shard {stems[num_done]} or soon"
                    f" after it, the last {how}. If the machine is out of memory, set"
                    " engine.processes or labeling.batch_size lower; what is labelled is kept, and"
                    f" the next run goes on there\n--- end of its output ---\n"
                    f"{worker.end_of_output()}"
                )

    def _worker(self, slot: int) -> "_Worker":
        """Return the slot's worker, started anew if it has none that lives."""
        with self._lock:
            worker = self._running.get(slot)
            if worker is not None and worker.is_alive():
                return worker
            if self._stopping.is_set():
                raise LabelingStopped("stopped before this group began")
            self._running[slot] = self._forking.submit(
                _Worker, self._options, self._environments[slot]
            ).result()
            return self._running[slot]

    def stop(self) -> None:
        """Have every worker end after its present shard, by force if that takes too long."""
        self._stopping.set()
        with self._lock:
            workers = list(self._running.values())
        for worker in workers:
            worker.ask_to_stop()
        deadline = time.monotonic() + _STOP_GRACE_SECONDS
        for worker in workers:
            worker.end(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End all workers, which have nothing to do, and wait for them."""
        self._stopping.set()
        workers = list(self._running.values())
        for worker in workers:
            worker.close_input()  # of all before the first is waited for: they end side by side
        for worker in workers:
            worker.end(_STOP_GRACE_SECONDS)
        self._forking.shutdown()


LocalWorkers = ThisProcess | WorkerProcesses


class _Worker:
    """One worker process and the pipes to it."""

    def __init__(self, options: Sequence[str], environment: dict[str, str]) -> None:
        self._ending = threading.Lock()
        self._is_ended = False
        # Output goes to a file: a pipe that nobody empties would block the worker.
        self._log: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 - lives as long as the worker
            prefix="selftrain-label-worker-"
        )
        self._process = subprocess.Popen(
            [*_COMMAND, *options],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def label(self, job: LabelJob, stems: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Send a group and yield the answers; the last has "ended", unless the worker dies."""
        order = json.dumps({"job": job.to_json(), "stems": list(stems)})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # died, or was asked to stop, in between
            return
        for line in self._lines():
            answer = json.loads(line)
            yield answer
            if "ended" in answer:
                return

    def _lines(self) -> Iterator[bytes]:
        """Yield whole lines until the worker is gone.

        The end of the pipe alone does not tell: a child of the worker that outlives it would hold
        it open.
        """
        assert self._process.stdout is not None
        descriptor, begun = self._process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while True:
                was_alive = self.is_alive()
                if selector.select(_POLL_SECONDS if was_alive else 0):
                    data = os.read(descriptor, 65536)
                    if not data:
                        return
                    *lines, begun = (begun + data).split(b"\n")
                    yield from lines
                elif not was_alive:
                    return

    def bury(self) -> str:
        """Wait for a worker whose pipe has ended and return how it died."""
        self.end(_STOP_GRACE_SECONDS)
        code = self._process.returncode
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def ask_to_stop(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)  # nothing, once it is known to have ended

    def close_input(self) -> None:
        """Let the worker end by itself as soon as it has nothing to do."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):
            self._process.stdin.close()

    def end(self, grace_seconds: float) -> None:
        """Close the worker's input, upon which it ends; kill what is left of its group then."""
        with self._ending:
            if self._is_ended:
                return  # its process id may be another's by now
            self._is_ended = True
            self.close_input()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_seconds)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def end_of_output(self) -> str:
        """Return the end of what it printed."""
        return end_of_output(self._log)


def _environment(threads: int, gpu: str) -> dict[str, str]:
    # Threads that wait by spinning slow each other down where processes share the cores.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    own = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu}
    return defaults | dict(os.environ) | own
