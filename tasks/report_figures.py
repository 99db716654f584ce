"""The report's figures of models: accuracy by round, and learning curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.report_facts import Training
from tasks.report_svg import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    draw_svg,
    legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CURVES = 7
_CURVE_STYLES = (
    (GREY, "o", "-"),
    (SKY, "s", "--"),
    (ORANGE, "^", "-."),
    (PURPLE, "D", ":"),
    (GREEN, "v", (0, (5, 1, 1, 1, 1, 1))),
    (BLUE, "P", "-"),
)
_BASELINE_STYLE = (RED, "X", (0, (4, 2)))


def accuracy_figure(
    rounds: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any] | None
) -> str | None:
    """Draw dev and test accuracy per round with intervals, and the baseline; None before any.

    Args:
        rounds: as in the status.
        baseline: as in the status.
    """
    known = [one for one in rounds if one["dev_accuracy"] is not None]
    if not known:
        return None
    others = [baseline] if baseline and baseline["dev_accuracy"] is not None else []

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        models = [*known, *others]
        places = np.arange(len(models), dtype=float)
        places[len(known) :] += 0.5
        for name, color, marker, line, shift in (
            ("test", BLUE, "o", "-", -0.06),
            ("dev", ORANGE, "s", "--", 0.06),
        ):
            measured = [i for i, one in enumerate(models) if one[f"{name}_accuracy"] is not None]
            if not measured:
                continue
            values = 100 * np.array([models[i][f"{name}_accuracy"] for i in measured])
            bounds = 100 * np.array([models[i][f"{name}_interval"] for i in measured])
            x = places[measured] + shift
            axes.errorbar(
                x,
                values,
                yerr=np.maximum([values - bounds[:, 0], bounds[:, 1] - values], 0),
                color=color,
                marker=marker,
                markersize=6,
                linestyle="none",
                elinewidth=1.4,
                capsize=3,
                label=f"{name}, 95 % interval",
            )
            in_rounds = np.array(measured) < len(known)
            axes.plot(x[in_rounds], values[in_rounds], color=color, linewidth=1.2, linestyle=line)
        for one in others:
            _draw_baseline_band(axes, one)
        axes.set_xticks(places, [_round_label(one, len(models)) for one in models])
        axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
        axes.set_ylabel("accuracy, %")
        legend(figure, "upper right")

    label = "Accuracy of every round's model and of the supervised baseline, with intervals"
    return draw_svg(draw, "accuracy", label, height=3.3)


def curves_figure(trainings: Sequence[Training]) -> str | None:
    """Draw loss and labelled accuracy over the steps of each training; None without a curve."""
    shown = [one for one in trainings if one.curve]
    if not shown:
        return None
    students = [one for one in shown if one.label != "baseline"]
    others = [one for one in shown if one.label == "baseline"]
    if len(students) + len(others) > MAX_CURVES:
        students = [students[0], *students[len(others) + 1 - MAX_CURVES :]]

    def draw(figure: "Figure") -> None:
        for axes, name, scale, title in zip(
            figure.subplots(1, 2),
            ("loss", "labeled_accuracy"),
            (1, 100),
            ("training loss", "accuracy on the labelled images of a step, under noise, %"),
            strict=True,
        ):
            for number, training in enumerate([*students, *others]):
                style = _CURVE_STYLES[number % len(_CURVE_STYLES)]
                color, marker, line = _BASELINE_STYLE if training.label == "baseline" else style
                known = [point for point in training.curve if point.get(name) is not None]
                # At other points in every curve, so that markers do not hide one another.
                apart = max(1, len(known) // 6)
                axes.plot(
                    [point["step"] for point in known],
                    [scale * point[name] for point in known],
                    color=color,
                    linestyle=line,
                    linewidth=1.2,
                    marker=marker,
                    markersize=4,
                    markevery=(number * apart // MAX_CURVES, apart),
                    label=training.label,
                )
            axes.set_title(title)
            axes.set_xlabel("step")
        legend(figure, "lower center")

    return draw_svg(draw, "curves", "Learning curves of every training", height=3.4)


def _draw_baseline_band(axes: "Axes", baseline: Mapping[str, Any]) -> None:
    """Carry the baseline across all rounds: on test, or on dev without a test split."""
    name = "dev" if baseline["test_accuracy"] is None else "test"
    low, high = baseline[f"{name}_interval"]
    axes.axhspan(100 * low, 100 * high, color=GREEN, alpha=0.14, linewidth=0)
    axes.axhline(
        100 * baseline[f"{name}_accuracy"],
        color=GREEN,
        linestyle=(0, (6, 2, 1, 2)),
        linewidth=1.2,
        label=f"supervised baseline, {name}",
    )


def _round_label(model: Mapping[str, Any], num_models: int) -> str:
    index = model.get("round_index")
    if index is None:
        return "baseline"
    if num_models > 12:
        return str(index)
    if index == 0:
        return "round 0\nteacher"
    return f"round {index}\n" + ("not promoted" if model["promoted"] is False else "student")
