"""What the report says, derived from a run's status, its events and the manifests they name."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from models.calibration import TEMPERATURE_RANGE
from models.evaluation.promotion import decide_promotion
from storage.corpus import load_corpus
from storage.manifest import Manifest, read_provenance
from storage.predictions import read_columns
from storage.runs import UnknownRun, read_events, read_run_config
from storage.store import Store
from tasks.evaluation import read_report
from tasks.report_formats import utc
from tasks.selection import read_summary
from tasks.specifications import folder_of, read_result
from tasks.training import read_curve

SPLITS = ("labeled", "dev", "test", "unlabeled")
# Stages that judge a model, the better one first.
_EVALUATIONS: tuple[tuple[str, Literal["test", "dev"]], ...] = (
    ("test", "test"),
    ("validate", "dev"),
)


@dataclass(frozen=True)
class Comparison:
    """Two models judged on the same samples of one split.

    Attributes:
        split: test where both were tested, else dev.
        difference: accuracy of the first - accuracy of the second.
        low: bound of its 95 % paired interval.
        high: bound.
        total: samples of the split.
        only_first: samples that the first alone has right.
        only_second: samples that the second alone has right.
    """

    split: Literal["test", "dev"]
    difference: float
    low: float
    high: float
    total: int
    only_first: int
    only_second: int

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return "includes 0" if self.low <= 0 <= self.high else "excludes 0"


@dataclass(frozen=True)
class RoundSelection:
    """A finished selection of one round: its manifest and summary."""

    round_index: int
    manifest: Manifest
    summary: dict[str, Any]

    @property
    def is_temperature_at_an_end(self) -> bool:
        """Whether the fit ran to an end of its range, so that confidences mean little."""
        return self.summary.get("temperature") in TEMPERATURE_RANGE

    @property
    def threshold(self) -> float | None:
        """The configured confidence threshold; None where the rule has no single one."""
        rule = self.manifest.settings.get("selection", {}).get("threshold", {})
        return rule.get("confidence")


@dataclass(frozen=True)
class Training:
    """A finished training: who, the learning curve, and what it cost."""

    label: str
    curve: list[dict[str, Any]]
    counts: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One model on one split.

    Attributes:
        label: whose model it is.
        split: test where it was tested, else dev.
        report: as the stage wrote it.
        is_result: whether it is the run's result so far.
    """

    label: str
    split: Literal["test", "dev"]
    report: dict[str, Any]
    is_result: bool


@dataclass(frozen=True)
class PinnedInput:
    """One corpus of a run by content; num_samples and so on are None if it is not in the store."""

    split: str
    digest: str | None
    num_samples: int | None = None
    num_shards: int | None = None
    num_bytes: int | None = None


def finished_stage(store: Store, model: Mapping[str, Any] | None, kind: str) -> Manifest | None:
    """Return the committed result of a round's (or the baseline's) stage of this kind, if any."""
    for stage in model["stages"] if model else ():
        if stage["kind"] == kind and stage["state"] in ("done", "reused"):
            return read_result(store, kind, stage["fingerprint"])
    return None


def result_round(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the round whose model is the run's result so far: the last promoted, else round 0."""
    promoted = [one for one in status["rounds"] if one["promoted"]]
    if promoted:
        return promoted[-1]
    return next((one for one in status["rounds"] if one["dev_accuracy"] is not None), None)


def student_round(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the round of the student to speak of: the last promoted, else the last validated."""
    students = [one for one in status["rounds"] if one["round_index"] > 0]
    promoted = [one for one in students if one["promoted"]]
    validated = [one for one in students if one["dev_accuracy"] is not None]
    return (promoted or validated or [None])[-1]


def compare(
    store: Store, first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> Comparison | None:
    """Compare two models of the status on test, else on dev; None where they share no split."""
    found = (compare_on(store, first, second, split) for _, split in _EVALUATIONS)
    return next((one for one in found if one is not None), None)


def compare_on(
    store: Store,
    first: Mapping[str, Any] | None,
    second: Mapping[str, Any] | None,
    split: Literal["test", "dev"],
) -> Comparison | None:
    """Compare two models, also of two runs, on one split; None unless on the very same samples."""
    kind = next(kind for kind, name in _EVALUATIONS if name == split)
    results = [finished_stage(store, model, kind) for model in (first, second)]
    # Samples of two corpora may have the same keys.
    if None in results or len({one.inputs["corpus"].fingerprint for one in results if one}) > 1:
        return None
    one, other = (_correct_by_key(store, result) for result in results if result)
    if one.keys() != other.keys():
        return None
    keys = sorted(one)
    decision = decide_promotion(
        np.array([one[key] for key in keys]), np.array([other[key] for key in keys])
    )
    return Comparison(
        split=split,
        difference=decision.difference,
        low=decision.low,
        high=decision.high,
        total=len(keys),
        only_first=decision.only_student,
        only_second=decision.only_teacher,
    )


def promotion(store: Store, model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the comparison on dev by which a student was promoted or not."""
    manifest = finished_stage(store, model, "promote")
    return None if manifest is None else read_report(store, manifest)


def evaluations(store: Store, status: Mapping[str, Any]) -> list[Evaluation]:
    """Return every model that was evaluated, on test, else on dev: by round, the baseline last."""
    result = result_round(status)
    found: list[Evaluation] = []
    for one in [*status["rounds"], *([status["baseline"]] if status["baseline"] else [])]:
        for kind, split in _EVALUATIONS:
            manifest = finished_stage(store, one, kind)
            if manifest is not None:
                label = _model_label(None if one is status["baseline"] else one["round_index"])
                report = read_report(store, manifest)
                found.append(Evaluation(label, split, report, one is result))
                break
    return found


def selections(store: Store, status: Mapping[str, Any]) -> list[RoundSelection]:
    """Return the finished selections by round."""
    found: list[RoundSelection] = []
    for one in status["rounds"]:
        manifest = finished_stage(store, one, "select")
        if manifest is not None:
            summary = read_summary(store, manifest)
            found.append(RoundSelection(one["round_index"], manifest, summary))
    return found


def trainings(store: Store, status: Mapping[str, Any]) -> list[Training]:
    """Return the finished trainings: of the teacher, the students by round, the baseline.

    A model that was fine-tuned has several, in their order.
    """
    found: list[Training] = []
    for label, stage in labelled_trainings(status):
        if stage["state"] not in ("done", "reused"):
            continue
        manifest = read_result(store, "train", stage["fingerprint"])
        assert manifest is not None, "its state says that it is finished"
        found.append(
            Training(
                label=label,
                curve=read_curve(store, manifest),
                counts=manifest.counts,
                provenance=_provenance(store, "train", manifest.fingerprint),
            )
        )
    return found


def labelled_trainings(status: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the stages of kind train, finished or not, each behind the name that reports use."""
    for one in [*status["rounds"], status["baseline"]]:
        for stage in one["stages"] if one else ():
            if stage["kind"] != "train":
                continue
            model = _model_label(None if one is status["baseline"] else one["round_index"])
            part = (stage.get("part") or "").replace("_", " ")
            is_follower = part in ("finetune", "resolution fix")
            yield f"{model} · {part}" if is_follower else model, stage


def stage_rows(store: Store, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every stage of the run with what its provenance says."""
    return [
        {
            "model": _model_label(None if one is status["baseline"] else one["round_index"]),
            **stage,
            **{
                name: _provenance(store, stage["kind"], stage["fingerprint"]).get(name)
                for name in ("finished", "device", "versions")
            },
        }
        for one in [*status["rounds"], *([status["baseline"]] if status["baseline"] else [])]
        for stage in one["stages"]
    ]


def version_sets(stages: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, str], int]]:
    """Return the distinct library versions with the number of stages computed under each."""
    counts: dict[str, int] = {}
    for stage in stages:
        if stage["versions"]:
            text = json.dumps(stage["versions"], sort_keys=True)
            counts[text] = counts.get(text, 0) + 1
    return [(json.loads(text), number) for text, number in counts.items()]


def pinned_inputs(store: Store, run: str, unlabeled: str | None) -> list[PinnedInput]:
    """Return the corpora that the run pinned, in the order of `SPLITS`."""
    try:
        pins: dict[str, Any] = read_run_config(store, run).get("pins", {})
    except UnknownRun:
        pins = {"unlabeled": unlabeled}
    return [_pinned_input(store, split, pins.get(split)) for split in SPLITS]


def time_span(store: Store, run: str) -> tuple[str | None, str | None]:
    """Return the times of a run's first and last event; None before any."""
    times = sorted(event["time"] for event in read_events(store, run))
    return (times[0], times[-1]) if times else (None, None)


def failure(store: Store, run: str) -> str | None:
    """Return what the last failed attempt died of, if that was recorded."""
    failed = [event for event in read_events(store, run) if event["type"] == "run_failed"]
    facts = [failed[-1].get(name) for name in ("error", "message")] if failed else []
    return ": ".join(str(fact) for fact in facts if fact) or None


def tracker_failure(store: Store, run: str) -> str | None:
    """Return when and why a tracker was last not reached, if ever."""
    failed = [event for event in read_events(store, run) if event["type"] == "tracker_failed"]
    if not failed:
        return None
    last = failed[-1]
    return f"{utc(last['time'])}, {last['tracker']}: {last['error']}: {last['message']}"


def _model_label(round_index: int | None) -> str:
    if round_index is None:
        return "baseline"
    return "round 0 (teacher)" if round_index == 0 else f"round {round_index}"


def _provenance(store: Store, kind: str, fingerprint: str) -> dict[str, Any]:
    return read_provenance(store, folder_of(kind, fingerprint)) or {}


def _pinned_input(store: Store, split: str, digest: str | None) -> PinnedInput:
    if digest is None:
        return PinnedInput(split, None)
    try:
        corpus = load_corpus(store, digest)
    except FileNotFoundError:
        return PinnedInput(split, digest)
    return PinnedInput(split, digest, corpus.num_samples, len(corpus.shards), corpus.num_bytes)


def _correct_by_key(store: Store, evaluation: Manifest) -> dict[str, bool]:
    record = {
        "object": asdict(evaluation.object("predictions")),
        "num_samples": evaluation.counts["samples"],
        "num_classes": evaluation.counts["classes"],
    }
    columns = read_columns(store, record, ["key", "label", "true_label"])
    is_correct = columns["label"].astype(np.int64) == columns["true_label"]
    return dict(zip(columns["key"].tolist(), is_correct.tolist(), strict=True))
