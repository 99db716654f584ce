"""The report's figures of evaluations: whether confidence is accuracy, and what is confused."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.evaluation.accuracy import wilson_interval
from tasks.report_facts import Evaluation
from tasks.report_selection_figures import plain_number, shortened
from tasks.report_svg import BLUE, GREEN, GREY, PAGE_INCHES, TEXT, draw_svg, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_MODELS = 4
MAX_MATRIX_CLASSES = 40
_MAX_NUMBERED_CLASSES = 15
# A cell with all of its row: dark enough to be seen, light enough for the number on it.
_DARKEST = 0.6


def shown_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return those that fit side by side: the first, the last rounds, and the baseline."""
    if len(evaluations) <= MAX_MODELS:
        return list(evaluations)
    return [evaluations[0], *evaluations[1 - MAX_MODELS :]]


def reliability_figure(evaluations: Sequence[Evaluation]) -> str | None:
    """Draw accuracy over confidence of each model, and how many images a bin has; None of none."""
    shown = shown_evaluations(evaluations)
    if not shown:
        return None

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(
            2, len(shown), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1)
        )
        for column, one in enumerate(shown):
            _draw_reliability(grid[0, column], one.report["reliability"])
            _draw_counts(grid[1, column], one.report["reliability"])
            title = f"{one.label}, {one.split}\nECE {100 * one.report['ece']:.1f} %"
            grid[0, column].set_title(title)
            grid[1, column].set_xlabel("confidence")
        grid[0, 0].set_ylabel("accuracy, %")
        grid[0, 0].set_ylim(-3, 103)
        grid[1, 0].set_ylabel("images")
        legend(figure, "lower center")

    return draw_svg(
        draw,
        "reliability",
        "Accuracy of each model by its confidence, with intervals, and images by confidence",
        height=4.4,
        width=PAGE_INCHES if len(shown) > 2 else 5.2 * len(shown),
    )


def confusion_figure(evaluation: Evaluation | None) -> str | None:
    """Draw which classes are taken for which; None of no model, or of more classes than fit."""
    if evaluation is None or len(evaluation.report["confusion"]) > MAX_MATRIX_CLASSES:
        return None
    counts = np.array(evaluation.report["confusion"])
    names = [shortened(one["name"]) for one in evaluation.report["per_class"]]
    num_classes = len(names)
    side = min(0.9 + 0.42 * num_classes, 7.5) + 0.6

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _draw_cells(axes, counts)
        is_long = max(map(len, names)) > 3
        places = np.arange(num_classes)
        axes.set_xticks(
            places, names, rotation=60 if is_long else 0, ha="right" if is_long else "center"
        )
        axes.set_yticks(places, names)
        axes.set_xlim(-0.5, num_classes - 0.5)
        axes.set_ylim(num_classes - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")

    label = f"Confusion matrix on {evaluation.split}: rows are true classes, columns predicted ones"
    return draw_svg(draw, "confusion", label, height=side, width=side)


def most_confused(evaluation: Evaluation | None, *, limit: int = 10) -> list[dict[str, Any]]:
    """Return the most frequent mistakes as `{truth, predicted, count, share}`, of the true class.

    Equally frequent ones are in the order of the classes.
    """
    if evaluation is None:
        return []
    counts = np.array(evaluation.report["confusion"])
    totals = counts.sum(axis=1)
    names = [one["name"] for one in evaluation.report["per_class"]]
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
    return [
        {
            "truth": names[row],
            "predicted": names[column],
            "count": int(mistakes[row, column]),
            "share": float(mistakes[row, column] / totals[row]),
        }
        for row, column in zip(*np.unravel_index(order, mistakes.shape), strict=True)
        if mistakes[row, column]
    ]


def _draw_reliability(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    axes.plot(
        [0, 1], [0, 100], color=GREY, linestyle="--", linewidth=1, label="confidence is right"
    )
    filled = [one for one in bins if one["total"]]
    values = 100 * np.array([one["accuracy"] for one in filled])
    pairs = [(round(one["accuracy"] * one["total"]), one["total"]) for one in filled]
    bounds = 100 * np.array([wilson_interval(*pair) for pair in pairs])
    axes.errorbar(
        [one["confidence"] for one in filled],
        values,
        yerr=np.maximum([values - bounds[:, 0], bounds[:, 1] - values], 0),
        color=GREEN,
        marker="D",
        markersize=4,
        linestyle="none",
        elinewidth=1,
        label="accuracy of a bin, 95 % interval",
    )
    axes.set_xlim(0, 1.02)


def _draw_counts(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    axes.bar(
        [(one["low"] + one["high"]) / 2 for one in bins],
        [one["total"] for one in bins],
        width=0.8 / len(bins),
        color=BLUE,
        label="images",
    )
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    axes.yaxis.set_major_formatter(plain_number)


def _draw_cells(axes: "Axes", counts: "np.ndarray[Any, Any]") -> None:
    from matplotlib.patches import Rectangle

    totals = np.maximum(counts.sum(axis=1), 1)
    is_numbered = len(counts) <= _MAX_NUMBERED_CLASSES
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = counts[row, column] / totals[row]
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(
            Rectangle(corner, 1, 1, facecolor=BLUE, alpha=0.06 + (_DARKEST - 0.06) * share)
        )
        if is_numbered:
            axes.text(
                *(column, row, f"{counts[row, column]:,}"),
                color=TEXT,
                ha="center",
                va="center_baseline",
                fontsize=7.5,
            )
