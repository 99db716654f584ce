"""Garbage collection: find what no run refers to, look again, and delete it."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flows.run_references import RunReferences
from storage.garbage import (
    Unit,
    in_order_of_deletion,
    is_imported,
    list_units,
    listed_again,
    reachable,
    temporary_files,
)
from storage.listings import time_of
from storage.store import Store
from tasks import materializing

GC_SCHEMA = 1
_THREADS = 16
_BETWEEN_CHECKS = 256  # objects

Progress = Callable[[int, int], None]


@dataclass
class Garbage:
    """What was found in a store, and what became of it.

    Attributes:
        store: where.
        older_than_seconds: what is younger is kept.
        units: that no run refers to, by path.
        temporary: files of killed writers.
        num_referenced: units that are kept because something refers to them.
        num_young: units that are kept because of their age alone.
        is_deleted: whether anything was to be deleted.
        skipped: path -> why a unit was kept in the end.
    """

    store: Store
    older_than_seconds: float
    units: list[Unit]
    temporary: list[str]
    num_referenced: int
    num_young: int
    is_deleted: bool = False
    skipped: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def num_bytes(self) -> int:
        """Bytes of the units."""
        return sum(unit.num_bytes for unit in self.units)

    def to_json(self) -> dict[str, Any]:
        """Return the documented form, schema 1."""
        return {
            "schema": GC_SCHEMA,
            "store": self.store.url,
            "older_than_seconds": self.older_than_seconds,
            "deleted": self.is_deleted,
            "units": [
                {
                    "path": unit.path,
                    "objects": len(unit.objects),
                    "bytes": unit.num_bytes,
                    "modified": unit.modified,
                    "skipped": self.skipped.get(unit.path),
                }
                for unit in self.units
            ],
            "temporary": self.temporary,
            "bytes": self.num_bytes,
            "kept": {"referenced": self.num_referenced, "young": self.num_young},
        }


def collect(
    store: Store, *, older_than_seconds: float, delete: bool, progress: Progress | None = None
) -> Garbage:
    """Find what no run refers to and, if asked to, delete it.

    Args:
        store: where.
        older_than_seconds: units with anything younger are kept, with all they refer to: they may
            belong to a run that has not recorded itself yet.
        delete: else nothing is changed.
        progress: called with (units done, units in all) while deleting.
    Raises: UnreadableRun, CorruptRecord: what is referred to is then unknown.
    """
    runs = RunReferences(store)
    # By the store's clock, which is the one that objects have their times from.
    limit = (time_of(store) if delete else time.time()) - older_than_seconds
    # Runs after units: one that appears in between is seen.
    units = list_units(store)
    marks = _Marks(store, units, limit)
    marks.follow(runs.read())
    unmarked = [unit for unit in units if not marks.holds(unit)]
    garbage = Garbage(
        store,
        older_than_seconds,
        units=[unit for unit in unmarked if unit.is_older(limit)],
        temporary=temporary_files(store, older_than_seconds=older_than_seconds),
        num_referenced=len(units) - len(unmarked),
        num_young=sum(not unit.is_older(limit) for unit in unmarked),
        is_deleted=delete,
    )
    if delete:
        _delete(garbage, runs, marks, limit, progress)
    return garbage


class _Marks:
    """Names that are reached from runs, from imported models and from what is young."""

    def __init__(self, store: Store, units: list[Unit], limit: float) -> None:
        self._store, self._units = store, units
        self._marked: set[str] = set()
        self._from_runs: set[str] = set()
        self._young = {name for u in units if not u.is_older(limit) for name in u.names}
        kept = {name for u in units if is_imported(store, u) for name in u.names}
        # What is young is not marked itself: it is kept for its age, and counted so.
        self.follow(kept | (self._needed_by(self._young) - self._young))

    def follow(self, roots: set[str]) -> None:
        """Mark names and all that they reach."""
        new = roots - self._from_runs
        if new:
            self._from_runs |= new
            self._marked |= self._needed_by(new)

    def holds(self, unit: Unit) -> bool:
        """Return whether a unit is marked; what was left over has no name and never is."""
        return not unit.names.isdisjoint(self._marked)

    def _needed_by(self, roots: set[str]) -> set[str]:
        return reachable(self._store, self._units, roots, _implied)


def _implied(unit: Unit) -> set[str]:
    """Return the compact shards of a selection: no record names them, trainings look for them."""
    if unit.folder != "selections":
        return set()
    return {materializing.specify(name).fingerprint for name in unit.names}


def _delete(
    garbage: Garbage, runs: RunReferences, marks: _Marks, limit: float, progress: Progress | None
) -> None:
    store = garbage.store

    def why_kept(unit: Unit) -> str | None:
        marks.follow(runs.read())
        if marks.holds(unit):
            return "a run refers to it now"
        if not listed_again(store, unit).is_older(limit):
            return "it was written to meanwhile"
        return None

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="delete") as pool:
        for number, unit in enumerate(garbage.units, start=1):
            for paths in (part for group in in_order_of_deletion(unit) for part in _chunks(group)):
                reason = why_kept(unit)
                if reason is not None:
                    garbage.skipped[unit.path] = reason
                    break
                for _ in pool.map(store.delete, paths):
                    pass
            if progress is not None:
                progress(number, len(garbage.units))
    for path in garbage.temporary:
        store.delete(path)


def _chunks(paths: list[str]) -> list[list[str]]:
    return [paths[i : i + _BETWEEN_CHECKS] for i in range(0, len(paths), _BETWEEN_CHECKS)]
