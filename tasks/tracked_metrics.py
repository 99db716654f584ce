"""The numbers of a run that trackers are told, derived from what the store holds.

Derived anew they are the same, so that a tracker is brought up to date at any time, and what it
has already is not written twice.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from storage.manifest import Manifest, read_provenance
from storage.store import Store
from tasks.checkpointing import curve_so_far
from tasks.evaluation import read_report
from tasks.report_facts import finished_stage, labelled_trainings, selections, trainings
from tasks.specifications import folder_of

ROUNDS = "rounds"
BASELINE = "baseline"


@dataclass(frozen=True)
class Point:
    """One number.

    Attributes:
        step: optimiser step of a training, or index of a round.
        value: finite.
        time: when its stage was finished, in seconds since 1970; None where that is not known, or
            not yet.
    """

    step: int
    value: float
    time: float | None


@dataclass(frozen=True)
class Series:
    """One number over its steps.

    Attributes:
        group: what it is of: rounds, baseline, round-0-teacher, round-1, round-1-finetune.
        name: such as training/loss or dev/accuracy.
        points: by rising step.
    """

    group: str
    name: str
    points: tuple[Point, ...]

    def after(self, step: int | None) -> tuple[Point, ...]:
        """Return the points behind a step; all of them for None."""
        return tuple(one for one in self.points if step is None or one.step > step)


def tracked_series(store: Store, status: Mapping[str, Any]) -> list[Series]:
    """Return all that is known of a run by now; of a training that goes on, up to its checkpoint.

    Args:
        store: where the run is.
        status: as `selftrain status --json` prints it.
    """
    curves = [
        one
        for training in trainings(store, status)
        for one in _curves(training.label, training.curve, _seconds_of(training.provenance))
    ]
    curves += [
        one
        for label, stage in labelled_trainings(status)
        if stage["state"] == "partial"
        for one in _curves(label, curve_so_far(store, stage["fingerprint"]), None)
    ]
    return [*curves, *_of_rounds(store, status), *_of_baseline(store, status)]


def _curves(label: str, curve: Sequence[Mapping[str, Any]], time: float | None) -> Iterator[Series]:
    group = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    # A curve that is still in a checkpoint may lack a column here and there.
    for name in dict.fromkeys(name for row in curve for name in row if name != "step"):
        points = tuple(
            Point(row["step"], row[name], time) for row in curve if row.get(name) is not None
        )
        if points:
            yield Series(group, f"training/{name}", points)


def _of_rounds(store: Store, status: Mapping[str, Any]) -> list[Series]:
    found: dict[str, list[Point]] = {}

    def add(name: str, index: int, value: float | None, time: float | None) -> None:
        if value is not None:
            found.setdefault(name, []).append(Point(index, float(value), time))

    chosen = {one.round_index: one for one in selections(store, status)}
    for one in status["rounds"]:
        index = one["round_index"]
        for name, value, time in _evaluated(store, one):
            add(name, index, value, time)
        if one["promoted"] is not None:
            add(
                "promoted",
                index,
                one["promoted"],
                _time_of(store, finished_stage(store, one, "promote")),
            )
        if index in chosen:
            summary, time = chosen[index].summary, _time_of(store, chosen[index].manifest)
            for name in ("kept", "unique", "coverage", "precision"):
                add(f"pseudo_labels/{name}", index, summary[name], time)
            for name in ("ece_before", "ece_after"):
                add(f"calibration/{name}", index, summary.get(name), time)
    return [Series(ROUNDS, name, tuple(points)) for name, points in found.items()]


def _of_baseline(store: Store, status: Mapping[str, Any]) -> list[Series]:
    """Return the baseline's accuracies once a round, so that they are a line beside the rounds'."""
    if status["baseline"] is None or status["state"] != "done":
        return []
    indices = [one["round_index"] for one in status["rounds"]]
    return [
        Series(BASELINE, name, tuple(Point(index, value, time) for index in indices))
        for name, value, time in _evaluated(store, status["baseline"])
    ]


def _evaluated(store: Store, model: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    for kind, split in (("validate", "dev"), ("test", "test")):
        manifest = finished_stage(store, model, kind)
        if manifest is not None:
            time, report = _time_of(store, manifest), read_report(store, manifest)
            yield f"{split}/accuracy", report["accuracy"], time
            yield f"{split}/ece", report["ece"], time
            yield f"{split}/negative_log_likelihood", report["negative_log_likelihood"], time


def _time_of(store: Store, manifest: Manifest | None) -> float | None:
    if manifest is None:
        return None
    folder = folder_of(manifest.kind, manifest.fingerprint)
    return _seconds_of(read_provenance(store, folder) or {})


def _seconds_of(provenance: Mapping[str, Any]) -> float | None:
    finished = provenance.get("finished")
    return None if finished is None else datetime.fromisoformat(finished).timestamp()
