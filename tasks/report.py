"""The report of a run: one self-contained HTML page, readable on any screen and on paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from storage.runs import write_view
from storage.selections import Reason
from storage.store import Store
from tasks import report_costs as costs
from tasks import report_evaluation_figures as evaluation_figures
from tasks import report_facts as facts
from tasks import report_figures as figures
from tasks import report_formats as formats
from tasks import report_selection_figures as selection_figures
from tasks.report_gallery import galleries

_SPLIT_NAMES = {
    "labeled": "Labelled",
    "dev": "Dev",
    "test": "Test",
    "unlabeled": "Unlabelled",
}


def write_report(store: Store, status: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Write the report and return its URL.

    It may be called at any time: what is not known yet is said to be n/a.

    Args:
        store: where the run is.
        status: as `selftrain status --json` prints it.
        inputs: `config` (the whole, as JSON), `class_names` (in the run's order) and `unlabeled`
            (digest of the corpus).
    """
    return write_view(store, status["run"], "report.html", render_report(store, status, inputs))


def render_report(store: Store, status: dict[str, Any], inputs: dict[str, Any]) -> bytes:
    """Return the page: no script, and nothing that is loaded from elsewhere."""
    chosen = facts.selections(store, status)
    trainings = facts.trainings(store, status)
    started, ended = facts.time_span(store, status["run"])
    student = facts.student_round(status)
    stages = facts.stage_rows(store, status)
    evaluations = facts.evaluations(store, status)
    result = next((one for one in evaluations if one.is_result), None)
    spent = costs.stage_costs(store, status)
    versions = facts.version_sets(stages)
    pinned = facts.pinned_inputs(store, status["run"], inputs["unlabeled"])
    page = _environment().get_template("report.html.jinja")
    text = page.render(
        status=status,
        class_names=inputs["class_names"],
        config=formats.yaml_text(inputs["config"]),
        state=_state(status, inputs["config"]),
        failure=facts.failure(store, status["run"]) if status["state"] == "failed" else None,
        tracker_failure=facts.tracker_failure(store, status["run"]),
        started=started,
        ended=ended,
        result=_result(status),
        student_name="Student" if student is None else f"Student {student['round_index']}",
        against_baseline=facts.compare(store, student, status["baseline"]),
        against_teacher=facts.compare(store, student, _first_round(status)),
        baseline_missing=_why_no_baseline(status, inputs["config"]),
        num_unlabeled=next((p.num_samples for p in pinned if p.split == "unlabeled"), None),
        rows=_rows(store, status),
        rounds_note=_rounds_note(status, inputs["config"]),
        trainings=trainings,
        max_curves=figures.MAX_CURVES,
        evaluations=evaluations,
        evaluated_result=result,
        most_confused=evaluation_figures.most_confused(result),
        max_matrix_classes=evaluation_figures.MAX_MATRIX_CLASSES,
        selections=chosen,
        extreme_rounds=[one.round_index for one in chosen if one.is_temperature_at_an_end],
        reasons=_reasons(chosen),
        num_bins=len(chosen[-1].summary["confidence_histogram"]["kept"]) if chosen else 0,
        is_truth_known=any(
            sum(one.summary["confidence_histogram"]["known"])
            for one in selection_figures.shown_rounds(chosen)
        ),
        shown_note=_shown_note(chosen),
        galleries=galleries(store, chosen, inputs["class_names"]),
        pinned=pinned,
        split_names=_SPLIT_NAMES,
        stages=_with_version_set(stages, versions),
        versions=versions,
        costs={one.fingerprint: one for one in spent},
        cost_totals=costs.cost_totals(spent),
        figures={
            "accuracy": figures.accuracy_figure(status["rounds"], status["baseline"]),
            "curves": figures.curves_figure(trainings),
            "reliability": evaluation_figures.reliability_figure(evaluations),
            "confusion": evaluation_figures.confusion_figure(result),
            "confidence": selection_figures.confidence_figure(chosen),
            "classes": selection_figures.class_balance_figure(chosen),
        },
    )
    # A key or an error may hold half a surrogate pair, which has no UTF-8.
    return text.encode("utf-8", errors="replace")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        formats.percent,
        formats.interval,
        formats.points,
        formats.points_interval,
        formats.count,
        formats.decimal,
        formats.duration,
        formats.size,
        formats.utc,
        formats.words,
    ):
        environment.filters[function.__name__] = function
    return environment


def _state(status: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return state and stop reason in words, and the command that goes on with the run."""
    last = status["rounds"][-1]["round_index"] if status["rounds"] else 0
    resume = f"selftrain resume {status['run']}"
    match status["state"], status["stop_reason"]:
        case "done", "max_rounds":
            number = config.get("rounds", last)
            title = "Done"
            sentence = "The one round was run." if number == 1 else f"All {number} rounds were run."
        case "done", "no_gain":
            title = "Done, no gain"
            sentence = (
                f"The student of round {last} is worse on dev than its teacher beyond the 95 %"
                " paired interval, so it was not promoted and the run ended."
            )
        case "done", "no_dev_gain":
            title = "Done, no further gain on dev"
            sentence = f"Dev accuracy has stopped rising, so the run ended after round {last}."
        case "done", "rejected":
            answer = status["approvals"][-1]
            title = "Done, rejected"
            sentence = f"{answer['by']} said no after round {answer['round_index']}."
        case "waiting_for_approval", _:
            title, sentence = "Waiting for approval", f"Round {last} was the newest."
            resume = f"selftrain approve {status['run']} --round {last}"
        case "done", reason:
            title, sentence = "Done", f"Stop reason: {reason}."
        case "failed", _:
            title, sentence = "Failed", f"Round {last} was the newest."
        case "stopped", _:
            title, sentence = "Stopped on request", f"Round {last} was the newest."
        case _:
            title = "Not finished"
            sentence = f"Round {last} is the newest. If no process is running the rest,"
    is_done = status["state"] == "done"
    return {"title": title, "sentence": sentence, "resume": "" if is_done else resume}


def _result(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy of the run's model: on test, or on dev, which the page then says."""
    model = facts.result_round(status)
    if model is None:
        return {"title": "Accuracy", "accuracy": None, "detail": "no model was evaluated yet"}
    split = "dev" if model["test_accuracy"] is None else "test"
    index = model["round_index"]
    name = "the teacher of round 0" if index == 0 else f"the student of round {index}"
    is_newest = "" if status["state"] == "done" else " so far"
    why = " (test n/a; dev steers the run)" if split == "dev" else ""
    return {
        "title": f"{split.capitalize()} accuracy",
        "accuracy": model[f"{split}_accuracy"],
        "interval": model[f"{split}_interval"],
        "detail": f"{name}, the result{is_newest}{why}",
    }


def _first_round(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((one for one in status["rounds"] if one["round_index"] == 0), None)


def _why_no_baseline(status: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not config.get("baseline", True):
        return "the config asks for no baseline"
    if status["baseline"] is None:
        return "trained after the last round"
    return "baseline or student is not evaluated yet"


def _rows(store: Store, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    result = facts.result_round(status)
    rows: list[dict[str, Any]] = []
    for one in [*status["rounds"], *([status["baseline"]] if status["baseline"] else [])]:
        is_baseline = one is status["baseline"]
        index = None if is_baseline else one["round_index"]
        rows.append(
            {
                **one,
                "name": "Baseline" if is_baseline else "0 (teacher)" if index == 0 else index,
                "architecture": one["architecture"] or formats.UNKNOWN,
                "is_baseline": is_baseline,
                "is_result": one is result,
                "has_teacher": bool(index),
                "gain": facts.promotion(store, one) if index else None,
                "promoted": {True: "yes", False: "no", None: ""}[one.get("promoted")],
                "pseudo": one.get("pseudo_labels")
                or {"unique": None, "kept": None, "precision": None},
            }
        )
    return rows


def _rounds_note(status: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    labels = status["labels"]
    parts = [
        f"{labels['labeled']:,} labels + {labels['dev']:,} dev = {labels['sum']:,} labelled"
        " images. The run's result is in bold.",
        "Intervals are 95 %: Wilson's for an accuracy, Agresti and Min's for a difference on the"
        f" same images. They cover the choice of images, not of the seed: this is one run, seed"
        f" {config.get('seed', formats.UNKNOWN)}.",
        "Dev calibrates, promotes and stops, so dev accuracies are optimistic.",
    ]
    if all(one["test_accuracy"] is None for one in status["rounds"]):
        parts.append("Test accuracy is n/a: no test split, or none was evaluated yet.")
    else:
        parts.append("Nothing reads the test split but this report.")
    return " ".join(parts)


def _reasons(chosen: Sequence[facts.RoundSelection]) -> list[str]:
    """Return the reasons that turned anything down in any round; the usual ones always."""
    counted = {name for one in chosen for name, n in one.summary["reasons"].items() if n}
    usual = {"below_threshold", "over_quota"}
    names = [reason.name.lower() for reason in Reason if reason != Reason.KEPT]
    return [name for name in names if name in counted | usual]


def _shown_note(chosen: Sequence[facts.RoundSelection]) -> str:
    shown = selection_figures.shown_rounds(chosen)
    if len(shown) == len(chosen):
        return ""
    return f"Shown are the first and the last {len(shown) - 1} of {len(chosen)} rounds."


def _with_version_set(
    stages: list[dict[str, Any]], versions: Sequence[tuple[dict[str, str], int]]
) -> list[dict[str, Any]]:
    """Add to every stage the number of its row in the table of versions."""
    numbers = [one for one, _ in versions]
    return [
        {
            **stage,
            "version_set": 1 + numbers.index(stage["versions"]) if stage["versions"] else None,
        }
        for stage in stages
    ]
