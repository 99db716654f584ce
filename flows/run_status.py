"""What a run has done so far, derived from its events and the manifests that they name."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from flows.approvals import Approval, Question, read_approvals
from flows.opening import OpenRun, reopen_run
from models.architectures import architecture_name
from storage.addresses import model_folder
from storage.corpus import load_corpus
from storage.manifest import read_provenance
from storage.runs import read_events, write_view
from storage.store import Store
from tasks.classifiers import read_description
from tasks.evaluation import read_report
from tasks.selection import read_summary
from tasks.specifications import folder_of, read_result

STATUS_SCHEMA = 1

_STOP_REASONS = {
    "max_rounds": "all rounds done",
    "no_gain": "the last student was worse than its teacher",
    "no_dev_gain": "dev accuracy stopped rising",
    "rejected": "rejected by a person",
}


@dataclass
class RoundStatus:
    """One round: its stages, its model and how good it is. Accuracies in [0, 1]; None unknown."""

    round_index: int
    stages: list[dict[str, Any]] = field(default_factory=list)
    architecture: str | None = None
    fingerprint: str | None = None
    promoted: bool | None = None
    dev_accuracy: float | None = None
    dev_interval: list[float] | None = None
    test_accuracy: float | None = None
    test_interval: list[float] | None = None
    pseudo_labels: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Time spent on the stages of this round, whoever computed them."""
        return round(sum(stage["seconds"] or 0.0 for stage in self.stages), 3)

    def to_json(self) -> dict[str, Any]:
        """Return the documented form."""
        return {
            "round_index": self.round_index,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "promoted": self.promoted,
            "dev_accuracy": self.dev_accuracy,
            "dev_interval": self.dev_interval,
            "test_accuracy": self.test_accuracy,
            "test_interval": self.test_interval,
            "pseudo_labels": self.pseudo_labels,
            "seconds": self.seconds,
            "stages": self.stages,
        }


@dataclass(frozen=True)
class RunStatus:
    """A run as `selftrain status` shows it.

    Attributes:
        run: its name.
        state: done; failed; stopped (on request); waiting_for_approval; unfinished (running, or its
            process is gone).
        stop_reason: max_rounds, no_gain, no_dev_gain or rejected; None until done.
        store: URL.
        versions_mixed: whether stages were computed under different library versions.
        labels: labelled, dev and their sum, in images.
        rounds: by index.
        baseline: the supervised baseline, in the form of a round.
        model_url: the last promoted model, None until there is one.
        stages_computed: by the attempt that came to the end; the others were in the store. None
            until done.
        waiting_for: what the run asks, None unless it waits for approval.
        approvals: the answers that it was given, by round.
        tracker_failures: how often a tracker could not be told the metrics.
    """

    run: str
    state: str
    stop_reason: str | None
    store: str
    versions_mixed: bool
    labels: dict[str, int]
    rounds: tuple[RoundStatus, ...]
    baseline: RoundStatus | None
    model_url: str | None
    stages_computed: int | None = None
    waiting_for: Question | None = None
    approvals: tuple[Approval, ...] = ()
    tracker_failures: int = 0

    @property
    def report_url(self) -> str:
        """Where the report lies once a round is concluded."""
        return f"{self.store}/runs/{self.run}/report.html"

    def ending_in_words(self) -> str:
        """Return why the run ended, and whether its last attempt had anything to compute."""
        if self.stop_reason is None:
            return self.state
        reason = _STOP_REASONS.get(self.stop_reason, self.stop_reason)
        if self.stages_computed != 0:
            return reason
        return f"nothing new: every stage was in the store; {reason}"

    def labels_in_words(self) -> str:
        """Return how many labels the run was given, those of the dev split among them."""
        labels = self.labels
        return f"{labels['labeled']} labels + {labels['dev']} dev = {labels['sum']} labelled images"

    def in_words(self) -> str:
        """Return the state in words and, where there is one, the command that goes on."""
        if self.state == "done":
            return f"done ({self.ending_in_words()})"
        if self.state == "waiting_for_approval":
            return "waiting for approval"
        state = "running or interrupted" if self.state == "unfinished" else self.state
        return f"{state}; `selftrain resume {self.run}` goes on"

    def question_in_words(self) -> str:
        """Return what the run asks, how good the model in question is, and how to answer."""
        assert self.waiting_for is not None, "asked of a run that waits"
        question = self.waiting_for
        asked = next(one for one in self.rounds if one.round_index == question.round_index)
        found = f"dev accuracy {percent(asked.dev_accuracy, asked.dev_interval)}"
        if question.kind == "promotion":
            before = [one for one in self.rounds if one.round_index < question.round_index]
            found += f"; its teacher's {percent(before[-1].dev_accuracy, before[-1].dev_interval)}"
        return (
            f"run {self.run} waits for approval of {question.in_words()} ({found}). Answer with:"
            f" selftrain approve {self.run} --round {question.round_index} --store {self.store}"
            " [--reject] [--threshold X], or by the flow `approve` in the Prefect UI"
        )

    def model_fingerprint(self) -> str:
        """Return the fingerprint of the run's model.

        Raises: ValueError while no model is finished.
        """
        if self.model_url is None:
            raise ValueError(
                f"run {self.run!r} has no finished model yet: `selftrain resume {self.run}`"
            )
        return self.model_url.rpartition("/")[2]

    def to_json(self) -> dict[str, Any]:
        """Return the documented form, schema 1."""
        baseline = None
        if self.baseline is not None:
            baseline = self.baseline.to_json()
            del baseline["round_index"], baseline["promoted"], baseline["pseudo_labels"]
        return {
            "schema": STATUS_SCHEMA,
            "run": self.run,
            "state": self.state,
            "stop_reason": self.stop_reason,
            "stages_computed": self.stages_computed,
            "store": self.store,
            "versions_mixed": self.versions_mixed,
            "labels": self.labels,
            "rounds": [one.to_json() for one in self.rounds],
            "baseline": baseline,
            "waiting_for": None if self.waiting_for is None else asdict(self.waiting_for),
            "approvals": [one.to_json() for one in self.approvals],
            "model_url": self.model_url,
            "report_url": self.report_url,
            "tracker_failures": self.tracker_failures,
        }


def read_status(store: Store, name: str) -> RunStatus:
    """Derive the status of a run; raises UnknownRun, listing the known ones."""
    run = reopen_run(store, name)
    events = read_events(store, name)
    state, stop_reason, stages_computed = "unfinished", None, None
    rounds: dict[int, RoundStatus] = {}
    baseline: RoundStatus | None = None
    waiting_for: Question | None = None
    stages: dict[str, dict[str, Any]] = {}
    tracker_failures = 0
    for event in events:
        match event["type"]:
            case "run_waiting":
                state = "waiting_for_approval"
                waiting_for = Question(event["question"], event["round_index"], event["model"])
            case "run_started":
                state, stop_reason, stages_computed = "unfinished", None, None
            case "run_done":
                state, stop_reason = "done", event["stop_reason"]
                stages_computed = event.get("stages_computed")  # earlier versions did not count
            case "run_failed" | "run_stopped":
                state = event["type"].removeprefix("run_")
            case "tracker_failed":
                tracker_failures += 1
            case "stage_referenced" | "stage_done":
                stages.setdefault(event["fingerprint"] + event["role"], {}).update(event)
            case _:
                pass  # events of later versions
    approvals = read_approvals(store, name, run.config)
    if state != "waiting_for_approval":
        waiting_for = None
    elif any(waiting_for == Question(a.question, a.round_index, a.model) for a in approvals):
        state, waiting_for = "stopped", None  # it has its answer and may go on
    versions: set[str] = set()
    for stage in stages.values():
        if stage["role"] == "baseline":
            baseline = baseline or RoundStatus(stage["round_index"])
            target = baseline
        else:
            target = rounds.setdefault(stage["round_index"], RoundStatus(stage["round_index"]))
        _add_stage(store, target, stage, versions)
    given = run.pins.given_teacher
    if given is not None and 0 in rounds:  # no training of this run tells of it
        rounds[0].fingerprint = given
        rounds[0].architecture = architecture_name(read_description(store, given).architecture)
    if run.config.approve == "promotion":
        answers = {one.round_index: one.is_accepted for one in approvals}
        for one in rounds.values():
            if one.promoted:  # good enough; whether it is promoted is for a person to say
                one.promoted = answers.get(one.round_index)
    ordered = tuple(rounds[index] for index in sorted(rounds))
    return RunStatus(
        run=name,
        state=state,
        stop_reason=stop_reason,
        store=store.url,
        versions_mixed=len(versions) > 1,
        labels=_label_counts(run),
        rounds=ordered,
        baseline=baseline,
        model_url=_model_url(run, ordered),
        stages_computed=stages_computed,
        waiting_for=waiting_for,
        approvals=tuple(approvals),
        tracker_failures=tracker_failures,
    )


def write_status_view(store: Store, status: RunStatus) -> str:
    """Write run.json, a view for people without selftrain at hand."""
    data = json.dumps(status.to_json(), indent=1, sort_keys=True).encode() + b"\n"
    return write_view(store, status.run, "run.json", data)


def table_rows(status: RunStatus) -> list[tuple[str, ...]]:
    """Return one row of texts for each round, and the baseline."""
    rows: list[tuple[str, ...]] = []
    for one in [*status.rounds, *([status.baseline] if status.baseline else [])]:
        pseudo = one.pseudo_labels or {}
        is_baseline = one is status.baseline
        name = "baseline" if is_baseline else str(one.round_index)
        promoted = {None: "", True: "yes", False: "no"}[one.promoted]
        rows.append(
            (
                name,
                one.architecture or "",
                percent(one.dev_accuracy, one.dev_interval),
                percent(one.test_accuracy, one.test_interval),
                f"{pseudo['kept']:,} ({pseudo['unique']:,} images)" if pseudo else "",
                "" if pseudo.get("precision") is None else f"{100 * pseudo['precision']:.1f} %",
                promoted,
                f"{one.seconds:.0f}",
            )
        )
    return rows


def percent(value: float | None, interval: list[float] | None) -> str:
    """Return an accuracy in percent with its interval in brackets; empty where unknown."""
    if value is None:
        return ""
    if interval is None:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _add_stage(
    store: Store, target: RoundStatus, stage: dict[str, Any], versions: set[str]
) -> None:
    kind, fingerprint = stage["kind"], stage["fingerprint"]
    manifest = read_result(store, kind, fingerprint)
    provenance = read_provenance(store, folder_of(kind, fingerprint)) or {}
    state = "pending"
    if manifest is not None:
        state = "reused" if stage.get("is_reused") else "done"
        if "versions" in provenance:
            versions.add(json.dumps(provenance["versions"], sort_keys=True))
    elif store.list(folder_of(kind, fingerprint)):
        state = "partial"
    target.stages.append(
        {
            "kind": kind,
            # Events of earlier versions know a single training a model, which is its role.
            "part": stage.get("part", stage["role"]) if kind == "train" else None,
            "fingerprint": fingerprint,
            "state": state,
            "seconds": provenance.get("seconds"),
        }
    )
    if kind == "train":
        # Of several trainings of a model, the last one's is the model; until then there is none.
        target.fingerprint, target.architecture = fingerprint, None
    if manifest is None:
        return
    counts = manifest.counts
    match kind:
        case "train":
            target.architecture = counts["architecture"]
        case "validate":
            target.dev_accuracy, target.dev_interval = counts["accuracy"], counts["interval"]
        case "test":
            target.test_accuracy, target.test_interval = counts["accuracy"], counts["interval"]
        case "promote":
            target.promoted = bool(read_report(store, manifest)["is_promoted"])
        case "select":
            summary = read_summary(store, manifest)
            target.pseudo_labels = {
                name: summary[name] for name in ("kept", "unique", "precision", "coverage")
            } | {name: summary["reasons"][name] for name in ("leaked", "out_of_domain")}
        case _:
            pass


def _label_counts(run: OpenRun) -> dict[str, int]:
    dev = load_corpus(run.store, run.pins.dev).num_samples
    return {"labeled": run.num_labeled, "dev": dev, "sum": run.num_labeled + dev}


def _model_url(run: OpenRun, rounds: tuple[RoundStatus, ...]) -> str | None:
    promoted = [one.fingerprint for one in rounds if one.promoted and one.fingerprint]
    first = run.pins.given_teacher or next(
        (
            one.fingerprint
            for one in rounds
            if one.round_index == 0 and one.fingerprint and one.architecture
        ),
        None,
    )
    fingerprint = promoted[-1] if promoted else first
    return None if fingerprint is None else run.store.url_of(model_folder(fingerprint))
