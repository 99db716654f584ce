"""What the runs of a store refer to: what they have recorded, and what those under way will need.

Garbage collection begins here. A run that cannot be read has unknown references, and nothing may be
deleted beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from flows.approvals import read_approvals, thresholds_by_round
from flows.graph import ModelRef, RunGraph, graph_of, model_of
from flows.opening import OpenRun, reopen_run
from storage.addresses import canonical_json
from storage.garbage import names_in
from storage.manifest import read_record
from storage.store import Store
from tasks.specifications import Specification


class UnreadableRun(ValueError):
    """A run whose references cannot be known."""


@dataclass
class RunReferences:
    """The names that runs refer to; what was read once is not read again.

    Args:
        store: that holds the runs.
    """

    store: Store
    _records: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    _done: set[str] = field(default_factory=set[str])
    _planned: dict[str, set[str]] = field(default_factory=dict[str, set[str]])

    def read(self) -> set[str]:
        """Return the names that all runs refer to now.

        Of a run under way those of all stages that it may come to, whichever way it ends.

        Raises: UnreadableRun, with what to do.
        """
        runs: set[str] = set()
        for path in self.store.list("runs"):
            name, _, file = path.removeprefix("runs/").partition("/")
            if file == "config.json" or file.startswith("events/"):
                if path not in self._records:
                    self._read_record(path, name)
                if file == "config.json":
                    runs.add(name)
        for name in runs - self._done - self._planned.keys():
            self._planned[name] = self._names_planned(name)
        return set[str]().union(*self._records.values(), *self._planned.values())

    def _read_record(self, path: str, run: str) -> None:
        try:
            body = read_record(self.store, path)
        except Exception as error:
            raise _unreadable(self.store, run, error) from error
        if body is None:  # deleted since it was listed
            return
        self._records[path] = names_in(canonical_json(body))
        if body.get("type") == "run_done":
            self._done.add(run)

    def _names_planned(self, name: str) -> set[str]:
        try:
            run = reopen_run(self.store, name)
            specifications = list(stages_of(run))
        except Exception as error:
            raise _unreadable(self.store, name, error) from error
        return {
            reference
            for one in specifications
            for reference in (one.fingerprint, *one.inputs.values())
        }


def stages_of(run: OpenRun) -> Iterator[Specification]:
    """Yield every stage that a run may come to, assuming that every student is promoted.

    A run that ends before its last round has a baseline of the round that was its last: those of
    all rounds are among them.
    """
    approvals = read_approvals(run.store, run.name, run.config)
    graph = graph_of(run.store, run.config, run.pins, thresholds_by_round(approvals))
    yield from (training.specification for training in graph.teacher())
    teacher = graph.first_model()
    yield from _evaluations(graph, teacher)
    for round_index in range(1, run.config.rounds + 1):
        if graph.needs(round_index).selection:
            guard = graph.guard()
            yield from () if guard is None else (guard,)
            if graph.labels_dev(teacher):
                yield graph.calibration(teacher)
            yield graph.label(teacher)
            yield graph.select(teacher, round_index)
        yield from (training.specification for training in graph.student(teacher, round_index))
        student = graph.student_model(teacher, round_index)
        yield from _evaluations(graph, student)
        yield graph.promote(teacher, student)
        if run.config.baseline:
            trainings = graph.baseline(round_index)
            yield from (training.specification for training in trainings)
            yield from _evaluations(graph, model_of(trainings))
        teacher = student


def _evaluations(graph: RunGraph, model: ModelRef) -> Iterator[Specification]:
    yield graph.evaluate("validate", model)
    if graph.pins.test is not None:
        yield graph.evaluate("test", model)


def _unreadable(store: Store, run: str, error: Exception) -> UnreadableRun:
    return UnreadableRun(
        f"run {run!r} in {store.url} cannot be read, so what it refers to is unknown and nothing is"
        f" deleted: {error}. Mend it, use the version of selftrain that wrote it, or delete the"
        f" folder runs/{run}"
    )
