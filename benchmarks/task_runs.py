"""How many task runs does a Prefect server record, and how fast, on SQLite and on Postgres?

Bursts of task runs that do nothing are submitted as fast as one process can, to a server that
selftrain starts itself (flows/server.py: larger batches than Prefect's own), and to one that has
Prefect's own batches. Task states travel as events; what does not fit the server's queue is
dropped, without a word to the run. Postgres is measured where its programs are installed.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Prefect is imported: two lines of log for each task run.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from benchmarks.postgres import find_postgres, postgres_server, postgres_version
from flows.server import prefect_server
from flows.sizing import MAX_TASK_RUNS

_BURSTS = (1_000, 3_000)
_QUICK_BURSTS = (1_000,)
_SLOW_BURSTS = (500,)  # with Prefect's own batches, where 1,000 take more than a minute
_SECONDS_UNCHANGED = 10.0  # the server writes what it has every second, or every five
_THREADS = 8
_PREFECTS_OWN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "1",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "5",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "20",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "5",
}


# Any, because Prefect declares its own task runners as no subtype of what `flow` takes (3.8.8).
_RUNNER: Any = ThreadPoolTaskRunner(max_workers=_THREADS)


@task(persist_result=False, cache_policy=NO_CACHE)
def nothing() -> None:
    """End at once."""


@flow(persist_result=False, task_runner=_RUNNER)
def burst(count: int) -> None:
    """Run so many tasks as fast as possible."""
    for future in [nothing.submit() for _ in range(count)]:
        future.result()


@dataclass(frozen=True)
class Burst:
    """What a server made of task runs that came as fast as possible."""

    submitted: int
    submitted_seconds: float
    recorded: int
    recorded_seconds: float  # from the start of the burst

    @property
    def per_second(self) -> float:
        """Task runs that were recorded a second."""
        return self.recorded / self.recorded_seconds

    def __str__(self) -> str:
        return (
            f"{self.recorded:,} of {self.submitted:,} (submitted in {self.submitted_seconds:.0f} s,"
            f" recorded in {self.recorded_seconds:.0f})"
        )


def main() -> None:
    parser = benchmark_parser(__doc__, quick="no burst of more than 1,000")
    parser.add_argument("--burst", type=int, help="one of this many, to find out what is lost")
    options = parser.parse_args()
    bursts = _QUICK_BURSTS if options.quick else _BURSTS
    if options.burst is not None:
        bursts = (options.burst,)
    figures: list[Figure] = []

    def measure(name: str, server: str, settings: Mapping[str, str], bursts: Sequence[int]) -> None:
        figures.extend(_figures(name, server, _measure(settings, bursts), quick=options.quick))

    measure("sqlite", "SQLite", {}, bursts)
    own = "SQLite, with batches as Prefect has them"
    measure("sqlite_default_batches", own, _PREFECTS_OWN_BATCHES, _SLOW_BURSTS)
    binaries = find_postgres()
    if binaries is None:
        print("Postgres was not measured: no initdb on PATH or in /usr/lib", file=sys.stderr)
    else:
        with postgres_server(binaries) as url:
            settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
            measure("postgres", postgres_version(binaries), settings, bursts)
    print_figures(figures, as_json=options.json)


def _measure(settings: Mapping[str, str], counts: Sequence[int]) -> list[Burst]:
    """Submit the bursts, one after the other, to a fresh server with these settings."""
    os.environ.pop("PREFECT_API_URL", None)
    with (
        tempfile.TemporaryDirectory() as home,
        temporary_settings({PREFECT_HOME: Path(home)}, restore_defaults={PREFECT_API_URL}),
        prefect_server(settings={"PREFECT_HOME": home, **settings}) as server,
    ):
        return [_submit(server.api_url, count) for count in counts]


def _submit(api_url: str, count: int) -> Burst:
    started = time.monotonic()
    state: State[Any] = burst(count, return_state=True)
    submitted_seconds = time.monotonic() - started
    flow_run_id = str(state.state_details.flow_run_id)
    recorded, seconds = _recorded(api_url, flow_run_id, count, started)
    return Burst(count, submitted_seconds, recorded, seconds)


def _figures(name: str, server: str, found: Sequence[Burst], *, quick: bool) -> list[Figure]:
    rate = figure(
        f"task_runs_recorded_per_second_{name}",
        max(one.per_second for one in found),
        "task runs/s",
        goal=1.0,
        direction="at_least",
        against=f"one a second, of a hundred workers with groups of minutes of work; {server}",
        quick=quick,
        seeds=[0],
    )
    if all(one.submitted < MAX_TASK_RUNS for one in found):
        return [rate]  # too few to say how many it takes
    whole = 0
    for one in found:
        if one.recorded < one.submitted:
            break
        whole = one.submitted
    bursts = "; ".join(map(str, found))
    return [
        figure(
            f"task_runs_recorded_whole_{name}",
            whole,
            "task runs in a burst",
            goal=MAX_TASK_RUNS,
            direction="at_least",
            against=f"what a plan warns of; {server}: {bursts}; task runs that do nothing, from"
            f" {_THREADS} threads of one process",
            quick=quick,
            seeds=[0],
        ),
        rate,
    ]


def _recorded(api_url: str, flow_run_id: str, wanted: int, started: float) -> tuple[int, float]:
    """Return how many of the task runs the server holds as completed, and after how many seconds.

    It is given up when nothing has come for a while.
    """
    body = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }
    recorded, changed_at = -1, time.monotonic()
    while recorded < wanted and time.monotonic() - changed_at < _SECONDS_UNCHANGED:
        answer = httpx.post(f"{api_url}/task_runs/count", json=body, timeout=120)
        found = int(answer.raise_for_status().json())
        if found != recorded:
            recorded, changed_at = found, time.monotonic()
        time.sleep(0.25)
    return recorded, changed_at - started


if __name__ == "__main__":
    main()
