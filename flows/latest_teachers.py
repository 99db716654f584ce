"""Runs of one name on a schedule, and the model that the newest of them ended with."""

import re
from dataclasses import dataclass
from datetime import datetime

from storage.runs import read_events
from storage.store import Store

_START = re.compile(r"-[0-9]{8}t[0-9]{6}z$")


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end.

    Attributes:
        name: of the run.
        model: fingerprint of the last model that it promoted; the teacher's where it promoted none.
        time: when it ended, UTC, ISO 8601.
    """

    name: str
    model: str
    time: str


def scheduled_name(series: str, start: datetime) -> str:
    """Return the name of the run of a series that was scheduled for a time, which is in UTC."""
    return f"{series}-{start:%Y%m%dt%H%M%S}z"


def series_of(name: str) -> str:
    """Return the name of the config that a run is of: without the UTC start, if it bears one."""
    return _START.sub("", name)


def newest_finished(store: Store, series: str) -> FinishedRun | None:
    """Return the newest run of a series that came to its end, None where there is none yet.

    Scheduled runs follow each other by the start in their names; between them and the run that is
    named like the series itself, the time of their ends decides.
    """
    names = [name for name in store.folders("runs") if series_of(name) == series]
    found: list[FinishedRun] = []
    # Their starts sort like their names, so of years of nights only the newest few are read.
    for name in sorted((name for name in names if name != series), reverse=True):
        if (run := _finished(store, name)) is not None:
            found.append(run)
            break
    if series in names and (run := _finished(store, series)) is not None:
        found.append(run)
    return max(found, key=lambda run: run.time, default=None)


def _finished(store: Store, name: str) -> FinishedRun | None:
    ends = [event for event in read_events(store, name) if event["type"] == "run_done"]
    return FinishedRun(name, ends[-1]["model"], ends[-1]["time"]) if ends else None
