"""How many task runs does a Prefect server on SQLite record, and how fast?

Bursts of task runs that do nothing are submitted as fast as one process can, to a server that
selftrain starts itself (flows/server.py: larger batches than Prefect's own). Task states travel as
events; what does not fit the server's queue is dropped, without a word to the run.
"""

import os
import tempfile
import time
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

from benchmarks.figures import benchmark_parser, figure, print_figures
from flows.server import prefect_server
from flows.sizing import MAX_TASK_RUNS

_BURSTS = (1_000, 2_000, 3_000, 5_000, 8_000)
_SECONDS_UNCHANGED = 15.0
_THREADS = 8


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


def main() -> None:
    options = benchmark_parser(__doc__, quick="the two smallest bursts").parse_args()
    bursts = _BURSTS[:2] if options.quick else _BURSTS
    whole, rates, notes = 0, dict[int, float](), list[str]()
    with tempfile.TemporaryDirectory() as home:
        os.environ["PREFECT_HOME"] = home
        os.environ.pop("PREFECT_API_URL", None)
        with (
            temporary_settings({PREFECT_HOME: Path(home)}, restore_defaults={PREFECT_API_URL}),
            prefect_server() as server,
        ):
            for count in bursts:
                started = time.monotonic()
                state: State[Any] = burst(count, return_state=True)
                submitted = time.monotonic() - started
                flow_run_id = str(state.state_details.flow_run_id)
                recorded, seconds = _recorded(server.api_url, flow_run_id, count, started)
                rates[count] = recorded / seconds
                notes.append(
                    f"{recorded:,} of {count:,} (submitted in {submitted:.0f} s, recorded in"
                    f" {seconds:.0f})"
                )
                if recorded == count and whole == _before(bursts, count):
                    whole = count
    against = f"task runs that do nothing, from {_THREADS} threads of one process, SQLite: "
    figures = [
        figure(
            "task_runs_recorded_whole",
            whole,
            "task runs in a burst",
            goal=MAX_TASK_RUNS,
            direction="at_least",
            against=against + "; ".join(notes),
            quick=options.quick,
            seeds=[0],
        ),
        figure(
            "task_runs_recorded_per_second",
            max(rates.values()),
            "task runs/s",
            goal=1.0,
            direction="at_least",
            against="one a second: a thousand groups of minutes of work on a hundred workers",
            quick=options.quick,
            seeds=[0],
        ),
    ]
    print_figures(figures, as_json=options.json)


def _before(bursts: tuple[int, ...], count: int) -> int:
    place = bursts.index(count)
    return bursts[place - 1] if place else 0


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
