"""What the command line shows of one explained image."""

from collections.abc import Callable

from rich.markup import escape

from flows.explaining import ExplainedRound, Explanation, Teacher
from flows.terminal import out, titled_table
from tasks.explaining import ScoredClass
from tasks.report_sample import Caption

_FACTS: dict[str, Callable[[ExplainedRound], str]] = {
    "teacher": lambda one: "; ".join(map(_named, one.teachers)),
    "predicted class": lambda one: one.sample.predicted[0].label,
    "its confidence": lambda one: _number(one.sample.confidence),
    "margin over the second": lambda one: _number(one.sample.margin),
    "deviation": lambda one: _number(one.sample.uncertainty),
    "share of votes": lambda one: _number(one.sample.agreement),
    "most probable classes": lambda one: _classes(one.sample.predicted),
    "calibrated": lambda one: _number(one.sample.judgement.calibrated_confidence),
    "debiased": lambda one: _number(one.sample.judgement.debiased_confidence),
    "judged as": lambda one: one.sample.judgement.label,
    "threshold": lambda one: _number(one.sample.judgement.threshold),
    "class kept from": lambda one: _number(one.sample.judgement.kept_from),
    "verdict": lambda one: one.sample.judgement.reason_in_words,
    "copies": lambda one: str(one.sample.judgement.copies),
    "weight": lambda one: _number(one.sample.judgement.weight),
    "target": lambda one: _target(one),
    "labelling": lambda one: one.labeling.fingerprint[:12],
    "selection": lambda one: one.selection.fingerprint[:12],
}


def print_explanation(explanation: Explanation) -> None:
    """Print the rounds of one image side by side, and which shard it is of."""
    table = titled_table(f"{escape(explanation.key)} in run {explanation.run}")
    table.add_column("")
    for one in explanation.rounds:
        style = "green" if one.sample.judgement.is_kept else "yellow"
        table.add_column(f"round {one.round_index}", overflow="fold", style=style)
    for name, fact in _FACTS.items():
        cells = [escape(fact(one)) for one in explanation.rounds]
        if any(cells):
            table.add_row(name, *cells)
    out.print(table)
    truth = "unknown" if explanation.truth is None else explanation.truth
    shard = explanation.shard
    for line in (
        f"class changed in {explanation.num_flips} of {len(explanation.rounds)} rounds",
        f"true label: {truth} (diagnosis only: nothing in the run reads it)",
        f"shard: {shard.stem} of {shard.num_samples} samples, digest {shard.digest}",
        f"at: {explanation.url}",
    ):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    if explanation.unfinished_rounds:
        rounds = ", ".join(map(str, explanation.unfinished_rounds))
        out.print(f"[yellow]not finished: selection of round {rounds}")


def captions(explanation: Explanation) -> list[Caption]:
    """Return what the picture says of each round."""
    return [
        Caption(
            (
                f"Round {one.round_index}: {one.sample.judgement.reason_in_words}",
                f"{one.sample.judgement.label} {_number(one.sample.judgement.confidence)}"
                f" (predicted {one.sample.predicted[0].label} {_number(one.sample.confidence)})",
                f"threshold {_number(one.sample.judgement.threshold) or 'learned'},"
                f" copies {one.sample.judgement.copies},"
                f" weight {_number(one.sample.judgement.weight)}",
                f"teacher: {_FACTS['teacher'](one)}",
            ),
            one.sample.judgement.is_kept,
        )
        for one in explanation.rounds
    ]


def _named(teacher: Teacher) -> str:
    origin = "given" if teacher.round_index is None else f"round {teacher.round_index}"
    return f"{origin}, {teacher.architecture} {teacher.fingerprint[:12]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".")


def _classes(classes: tuple[ScoredClass, ...]) -> str:
    return ", ".join(f"{one.label} {_number(one.probability)}" for one in classes)


def _target(one: ExplainedRound) -> str:
    judgement = one.sample.judgement
    if judgement.target is None:
        return ""
    rest = f", others {_number(judgement.rest_mass)}" if judgement.rest_mass else ""
    return f"{judgement.target}: {_classes(judgement.target_top)}{rest}"
