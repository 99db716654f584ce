"""What `selftrain compare` shows: tables of two runs side by side."""

import json
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from flows.comparing import AccuracyDifference, ComparedModels, RunComparison, Split
from flows.run_status import percent
from flows.terminal import out, titled_table
from tasks.report_formats import UNKNOWN, count, duration, points, points_interval, size


def print_comparison(found: RunComparison) -> None:
    """Print configs, accuracies, pseudo-labels and costs of two runs, and what they share."""
    first, second = found.runs
    states = ", ".join(
        f"{run} {state}" for run, state in zip(found.runs, found.states, strict=True)
    )
    out.print(f"{first} and {second} in {found.store}: {states}", highlight=False, markup=False)
    _print_config(found)
    _print_accuracies(found)
    _print_pseudo_labels(found)
    _print_costs(found)


def _print_config(found: RunComparison) -> None:
    table = titled_table("config, where it differs")
    for name in ("key", *found.runs):
        table.add_column(name, overflow="fold")
    for one in found.config:
        note = " (machine)" if one.is_machine_setting else ""
        table.add_row(one.key + note, *(escape(_short(value)) for value in one.values))
    for split, digests in found.inputs.items():
        if digests[0] != digests[1]:
            shown = [UNKNOWN if digest is None else digest[:12] for digest in digests]
            table.add_row(f"images of {split}", *shown)
    answers = [{one["round_index"]: one for one in given} for given in found.approvals]
    for index in sorted({*answers[0], *answers[1]}):
        pair = [of_run.get(index) for of_run in answers]
        if _effect(pair[0]) != _effect(pair[1]):
            table.add_row(f"answer in round {index}", *map(_answer, pair))
    if table.row_count:
        out.print(table)
    else:
        out.print("The configs differ in nothing but the name, and the images are the same.")


def _effect(approval: Mapping[str, Any] | None) -> tuple[bool, float | None]:
    """Return what of an answer a run went by: whether it ended, and the threshold from then on."""
    if approval is None:
        return False, None
    return approval["answer"] == "reject", approval["threshold"]


def _answer(approval: Mapping[str, Any] | None) -> str:
    if approval is None:
        return UNKNOWN
    threshold = approval["threshold"]
    return approval["answer"] + ("" if threshold is None else f", threshold {threshold:g}")


def _print_accuracies(found: RunComparison) -> None:
    table = titled_table(f"accuracy; difference: {found.runs[1]} - {found.runs[0]}, in points")
    for name in ("round", "split", *found.runs, "difference", "how"):
        table.add_column(name, justify="left" if name in ("round", "split", "how") else "right")
    splits: tuple[Split, ...] = ("dev", "test")
    for one in (*found.rounds, found.baseline, found.result):
        for split in splits:
            difference = one.dev if split == "dev" else one.test
            cells = [_accuracy(model, split) for model in one.models]
            if any(cells):
                table.add_row(_name(one, found), split, *cells, *_difference(difference))
    out.print(table)
    out.print(
        "Intervals are 95 %: Wilson's of an accuracy; of a difference Agresti and Min's on the same"
        " images (paired), with McNemar's exact p, or Newcombe's on other images (unpaired). They"
        " cover the choice of images, not of the seed.",
        highlight=False,
    )


def _name(one: ComparedModels, found: RunComparison) -> str:
    if one.name != "result":
        return one.name
    indices = [UNKNOWN if index is None else str(index) for index in found.result_rounds]
    return "result (round " + (indices[0] if len({*indices}) == 1 else " / ".join(indices)) + ")"


def _accuracy(model: Any, split: Split) -> str:
    return "" if model is None else percent(model[f"{split}_accuracy"], model[f"{split}_interval"])


def _difference(found: AccuracyDifference | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    if found.method == "same_model":
        return "0.0", "the same model"
    text = f"{points(found.difference)} {points_interval(*found.interval)}"
    if found.p_value is None:
        return text, f"unpaired, {found.samples[0]:,} and {found.samples[1]:,} images"
    return text, f"paired, {found.samples[0]:,} images, p = {found.p_value:.3g}"


def _print_pseudo_labels(found: RunComparison) -> None:
    table = titled_table("pseudo-labels: images kept (coverage), precision")
    for name in ("round", *found.runs):
        table.add_column(name, justify="left" if name == "round" else "right")
    for one in found.rounds:
        pseudo = [model and model["pseudo_labels"] for model in one.models]
        if any(pseudo):
            table.add_row(one.name, *("" if not p else _pseudo(p) for p in pseudo))
    if table.row_count:
        out.print(table)


def _pseudo(labels: Any) -> str:
    coverage = f"{count(labels['unique'])} ({percent(labels['coverage'], None)})"
    return f"{coverage}, {percent(labels['precision'], None) or UNKNOWN}"


def _print_costs(found: RunComparison) -> None:
    table = titled_table("cost")
    for name in ("", *found.runs):
        table.add_column(name, justify="right" if name else "left")
    rows = (
        ("stages finished (reused)", [f"{one.stages} ({one.reused})" for one in found.costs]),
        ("device time", [duration(one.device_seconds) for one in found.costs]),
        (
            "of stages that were reused",
            [duration(one.reused_device_seconds) for one in found.costs],
        ),
        ("in the store", [size(one.num_bytes) for one in found.costs]),
    )
    for name, cells in rows:
        table.add_row(name, *cells)
    out.print(table)
    kinds = [one.kind for one in found.shared]
    shared = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
    seconds = sum(one.device_seconds or 0 for one in found.shared)
    tail = f", together {duration(seconds)} of device time" if kinds else ""
    out.print(f"Shared stages: {shared}{tail}.", highlight=False)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
