"""Two runs of one store side by side: `selftrain compare`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from flows.config_leaves import leaves_of
from flows.opening import MACHINE_SETTINGS, OpenRun, reopen_run
from flows.run_status import read_status
from models.evaluation.accuracy import Accuracy
from models.evaluation.comparison import mcnemar_p_value, newcombe_interval
from storage.store import Store
from tasks.report_costs import CostTotal, StageCost, cost_totals, stage_costs
from tasks.report_facts import SPLITS, compare_on, finished_stage, result_round

COMPARISON_SCHEMA = 1

Split = Literal["dev", "test"]
Method = Literal["paired", "unpaired", "same_model"]

_STAGE_OF: dict[Split, str] = {"dev": "validate", "test": "test"}
_NOT_COMPARED = ("name", "store", "schema")


@dataclass(frozen=True)
class ConfigDifference:
    """One key of which two configs have other values.

    Attributes:
        key: dotted.
        values: of the first and of the second run; None also where one has no such key.
        is_machine_setting: whether it only says where and how a run computes.
    """

    key: str
    values: tuple[Any, Any]
    is_machine_setting: bool


@dataclass(frozen=True)
class AccuracyDifference:
    """The accuracy of the second model - that of the first, on one split.

    Attributes:
        difference: in [-1, 1].
        interval: at 95 %.
        method: paired (Agresti and Min) on the same samples, unpaired (Newcombe) on others,
            same_model where there is nothing to compare.
        samples: of both.
        only: samples that the first alone, and the second alone, has right; None unpaired.
        p_value: of McNemar's exact test; None unpaired.
    """

    difference: float
    interval: tuple[float, float]
    method: Method
    samples: tuple[int, int]
    only: tuple[int, int] | None
    p_value: float | None


@dataclass(frozen=True)
class ComparedModels:
    """The models of the same place in two runs, in the forms of the status; None: not there."""

    name: str
    models: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]
    dev: AccuracyDifference | None
    test: AccuracyDifference | None

    @property
    def is_same(self) -> bool:
        """Whether both are one model."""
        return _is_same(*self.models)

    def to_json(self) -> dict[str, Any]:
        """Return the documented form."""
        first, second = (one or {} for one in self.models)
        return {
            "fingerprints": [first.get("fingerprint"), second.get("fingerprint")],
            "architectures": [first.get("architecture"), second.get("architecture")],
            "is_same_model": self.is_same,
            **{split: self._split(split) for split in get_args(Split)},
            "pseudo_labels": [first.get("pseudo_labels"), second.get("pseudo_labels")],
            "seconds": [first.get("seconds"), second.get("seconds")],
        }

    def _split(self, split: Split) -> dict[str, Any]:
        found = self.dev if split == "dev" else self.test
        empty = dict.fromkeys(AccuracyDifference.__dataclass_fields__)
        return {
            "accuracies": [one and one[f"{split}_accuracy"] for one in self.models],
            "intervals": [one and one[f"{split}_interval"] for one in self.models],
            **(empty if found is None else asdict(found)),
        }


@dataclass(frozen=True)
class SharedStage:
    """A stage that both runs refer to, so that it was computed once."""

    kind: str
    fingerprint: str
    device_seconds: float | None
    num_bytes: int | None


@dataclass(frozen=True)
class RunComparison:
    """What `selftrain compare` shows.

    Attributes:
        store: URL.
        runs: names.
        states: done, failed, stopped or unfinished.
        config: keys whose values differ.
        approvals: the answers that each run was given, by round, in the forms of the status.
        inputs: split -> digests of the corpora; None where a run has none.
        rounds: by index, as many as the longer run has.
        baseline: of both.
        result: the models that the runs have come to, and their rounds.
        result_rounds: of these models; None before any was evaluated.
        costs: of each run.
        shared: stages of both.
    """

    store: str
    runs: tuple[str, str]
    states: tuple[str, str]
    config: tuple[ConfigDifference, ...]
    approvals: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]
    inputs: dict[str, tuple[str | None, str | None]]
    rounds: tuple[ComparedModels, ...]
    baseline: ComparedModels
    result: ComparedModels
    result_rounds: tuple[int | None, int | None]
    costs: tuple[CostTotal, CostTotal]
    shared: tuple[SharedStage, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the documented form, schema 1."""
        return {
            "schema": COMPARISON_SCHEMA,
            "store": self.store,
            "runs": list(self.runs),
            "states": list(self.states),
            "config": [asdict(one) for one in self.config],
            "approvals": [list(answers) for answers in self.approvals],
            "inputs": [
                {"split": split, "digests": list(digests)} for split, digests in self.inputs.items()
            ],
            "rounds": [
                {"round_index": index, **one.to_json()} for index, one in enumerate(self.rounds)
            ],
            "baseline": self.baseline.to_json(),
            "result": {"round_indices": list(self.result_rounds), **self.result.to_json()},
            "costs": [
                {
                    "stages": one.stages,
                    "reused": one.reused,
                    "device_seconds": round(one.device_seconds, 3),
                    "reused_device_seconds": round(one.reused_device_seconds, 3),
                    "bytes": one.num_bytes,
                    "not_recorded": one.num_unknown,
                }
                for one in self.costs
            ],
            "shared_stages": [
                {
                    "kind": one.kind,
                    "fingerprint": one.fingerprint,
                    "device_seconds": one.device_seconds,
                    "bytes": one.num_bytes,
                }
                for one in self.shared
            ],
        }


def compare_runs(store: Store, first: str, second: str) -> RunComparison:
    """Compare two runs of a store, finished or not; raises UnknownRun."""
    runs = (reopen_run(store, first), reopen_run(store, second))
    statuses = [read_status(store, one.name).to_json() for one in runs]
    costs = [stage_costs(store, status) for status in statuses]
    by_index = [{one["round_index"]: one for one in status["rounds"]} for status in statuses]
    num_rounds = 1 + max((index for found in by_index for index in found), default=-1)
    results = [result_round(status) for status in statuses]

    def compared(name: str, models: Sequence[Mapping[str, Any] | None]) -> ComparedModels:
        pair = (models[0], models[1])
        dev, test = (_difference(store, pair, split) for split in get_args(Split))
        return ComparedModels(name, pair, dev, test)

    return RunComparison(
        store=store.url,
        runs=(first, second),
        states=(statuses[0]["state"], statuses[1]["state"]),
        config=tuple(_config_differences(*runs)),
        approvals=(statuses[0]["approvals"], statuses[1]["approvals"]),
        inputs={
            split: (getattr(runs[0].pins, split), getattr(runs[1].pins, split)) for split in SPLITS
        },
        rounds=tuple(
            compared(str(index), [found.get(index) for found in by_index])
            for index in range(num_rounds)
        ),
        baseline=compared("baseline", [status["baseline"] for status in statuses]),
        result=compared("result", results),
        result_rounds=(_index(results[0]), _index(results[1])),
        costs=(cost_totals(costs[0])[-1], cost_totals(costs[1])[-1]),
        shared=tuple(_shared(*costs)),
    )


def _difference(
    store: Store, models: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None], split: Split
) -> AccuracyDifference | None:
    first, second = (finished_stage(store, one, _STAGE_OF[split]) for one in models)
    if first is None or second is None:
        return None
    counts = [one.counts for one in (first, second)]
    samples = (counts[0]["samples"], counts[1]["samples"])
    if _is_same(*models):
        return AccuracyDifference(0.0, (0.0, 0.0), "same_model", samples, (0, 0), 1.0)
    # What changed from the first to the second.
    paired = compare_on(store, models[1], models[0], split)
    if paired is not None:
        return AccuracyDifference(
            difference=paired.difference,
            interval=(paired.low, paired.high),
            method="paired",
            samples=samples,
            only=(paired.only_second, paired.only_first),
            p_value=mcnemar_p_value(paired.only_first, paired.only_second),
        )
    one, other = (Accuracy(round(c["accuracy"] * c["samples"]), c["samples"]) for c in counts)
    return AccuracyDifference(
        difference=counts[1]["accuracy"] - counts[0]["accuracy"],
        interval=newcombe_interval(other, one),
        method="unpaired",
        samples=samples,
        only=None,
        p_value=None,
    )


def _config_differences(first: OpenRun, second: OpenRun) -> Iterator[ConfigDifference]:
    leaves = [
        dict(leaves_of(run.config.model_dump(mode="json", by_alias=True)))
        for run in (first, second)
    ]
    for key in dict.fromkeys([*leaves[0], *leaves[1]]):
        section = key.partition(".")[0]
        values = (leaves[0].get(key), leaves[1].get(key))
        if section not in _NOT_COMPARED and values[0] != values[1]:
            yield ConfigDifference(key, values, section in MACHINE_SETTINGS)


def _shared(first: Sequence[StageCost], second: Sequence[StageCost]) -> Iterator[SharedStage]:
    theirs = {one.fingerprint for one in second}
    for one in first:
        if one.fingerprint in theirs:
            yield SharedStage(one.kind, one.fingerprint, one.device_seconds, one.num_bytes)


def _is_same(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    if first is None or second is None or first["fingerprint"] is None:
        return False
    return first["fingerprint"] == second["fingerprint"]


def _index(model: Mapping[str, Any] | None) -> int | None:
    return None if model is None else model["round_index"]
