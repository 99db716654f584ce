"""The report's figures of selections: confidence, and the balance of classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.evaluation.accuracy import wilson_interval
from tasks.report_facts import RoundSelection
from tasks.report_svg import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PAGE_INCHES,
    SKY,
    TEXT,
    draw_svg,
    legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROUNDS = 4
MAX_NAMED_CLASSES = 24

_BEFORE = "before: predicted"
_ITEMS = "after: items with copies"
_IMAGES = "after: images"


def confidence_figure(
    selections: Sequence[RoundSelection], render: Callable[..., str] = draw_svg
) -> str | None:
    """Draw kept and rejected samples, and accuracy where truth is known, by confidence.

    Args:
        selections: by round.
        render: `draw_svg` or `draw_png`.
    """
    shown = shown_rounds(selections)
    if not shown:
        return None
    histograms = [one.summary["confidence_histogram"] for one in shown]
    is_known = any(sum(one["known"]) for one in histograms)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(1 + is_known, len(shown), sharex=True, sharey="row", squeeze=False)
        for column, one in enumerate(shown):
            _draw_histogram(grid[0, column], histograms[column], one.threshold)
            grid[0, column].set_title(f"round {one.round_index}")
            if is_known:
                _draw_reliability(grid[1, column], histograms[column])
            grid[-1, column].set_xlabel("confidence")
        highest = max(max(*one["kept"], *one["rejected"]) for one in histograms)
        if highest < 50:  # too few decades for the axis to choose ticks
            grid[0, 0].set_yticks([1, 2, 5, 10, 20])
        grid[0, 0].set_ylim(0.7, 2 * max(highest, 1))
        grid[0, 0].set_ylabel("images (logarithmic)")
        if is_known:
            grid[1, 0].set_ylim(-3, 103)
            grid[1, 0].set_ylabel("accuracy, %")
        legend(figure, "lower center")

    return render(
        draw,
        "confidence",
        "Kept and rejected predictions by confidence, and their accuracy",
        height=4.6 if is_known else 2.8,
        width=PAGE_INCHES if len(shown) > 2 else 5.2 * len(shown),
    )


def class_balance_figure(
    selections: Sequence[RoundSelection], render: Callable[..., str] = draw_svg
) -> str | None:
    """Draw, per round, how many samples each class has before and after selection.

    Args:
        selections: by round.
        render: `draw_svg` or `draw_png`.
    """
    shown = shown_rounds(selections)
    if not shown:
        return None
    num_classes = len(shown[0].summary["classes"])
    # Side by side, or one below the other where the names need the room.
    columns = len(shown) if num_classes <= 12 else 1
    rows = len(shown) // columns

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, one in zip(grid.ravel(), shown, strict=True):
            if num_classes <= MAX_NAMED_CLASSES:
                _draw_classes_by_name(axes, one.summary["classes"])
            else:
                _draw_classes_by_rank(axes, one.summary["classes"])
            axes.set_title(f"round {one.round_index}")
        for axes in grid[:, 0]:
            axes.set_ylabel("samples")
        if num_classes > MAX_NAMED_CLASSES:
            grid[-1, 0].set_xlabel("classes, most predicted first; counts are logarithmic")
        legend(figure, "lower center")

    return render(
        draw,
        "classes",
        "Samples per class before and after selection",
        height=2.9 if rows == 1 else 0.6 + 1.9 * rows,
        width=5.2 * columns if num_classes <= 12 and columns <= 2 else PAGE_INCHES,
    )


def shown_rounds(selections: Sequence[RoundSelection]) -> list[RoundSelection]:
    """Return the rounds that fit side by side: the first and the last ones."""
    if len(selections) <= MAX_ROUNDS:
        return list(selections)
    return [selections[0], *selections[1 - MAX_ROUNDS :]]


def _draw_histogram(
    axes: "Axes", histogram: Mapping[str, Sequence[int]], threshold: float | None
) -> None:
    edges = np.linspace(0, 1, len(histogram["kept"]) + 1)
    for name, color, fill, hatch, shift in (
        ("kept", BLUE, BLUE, None, 0.25),
        ("rejected", ORANGE, "none", "//////", 0.75),
    ):
        axes.bar(
            edges[:-1] + shift * edges[1],
            histogram[name],
            width=0.44 * edges[1],
            color=fill,
            edgecolor=color,
            linewidth=0.6,
            hatch=hatch,
            label=f"{name} images",
        )
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter(plain_number)
    axes.minorticks_off()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    if threshold is not None:
        axes.axvline(threshold, color=TEXT, linestyle=":", linewidth=1, label="threshold")


def _draw_reliability(axes: "Axes", histogram: Mapping[str, Sequence[int]]) -> None:
    edges = np.linspace(0, 1, len(histogram["known"]) + 1)
    bins = [i for i, total in enumerate(histogram["known"]) if total]
    axes.plot([0, 1], [0, 100], color=GREY, linestyle="--", linewidth=1)
    if not bins:
        return
    pairs = [(histogram["correct"][i], histogram["known"][i]) for i in bins]
    values = np.array([100 * correct / total for correct, total in pairs])
    bounds = 100 * np.array([wilson_interval(*pair) for pair in pairs])
    axes.errorbar(
        (edges[:-1] + edges[1:])[bins] / 2,
        values,
        yerr=np.maximum([values - bounds[:, 0], bounds[:, 1] - values], 0),
        color=GREEN,
        marker="D",
        markersize=4,
        linestyle="none",
        elinewidth=1,
        label="accuracy where truth is known",
    )


def _draw_classes_by_name(axes: "Axes", classes: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(classes))
    axes.bar(
        places - 0.2,
        [one["predicted"] for one in classes],
        width=0.36,
        color="none",
        edgecolor=ORANGE,
        hatch="//////",
        linewidth=0.6,
        label=_BEFORE,
    )
    items = [one["copies"] for one in classes]
    axes.bar(places + 0.2, items, width=0.36, color=BLUE, label=_ITEMS)
    images = [one["unique"] for one in classes]
    style: dict[str, Any] = {"marker": "_", "markersize": 7, "linestyle": "none"}
    axes.plot(places + 0.2, images, color=TEXT, label=_IMAGES, **style)
    names = [shortened(one["name"]) for one in classes]
    is_long = sum(map(len, names)) > 30
    axes.set_xticks(
        places, names, rotation=40 if is_long else 0, ha="right" if is_long else "center"
    )


def _draw_classes_by_rank(axes: "Axes", classes: Sequence[Mapping[str, Any]]) -> None:
    ranked = sorted(classes, key=lambda one: (-one["predicted"], one["name"]))
    ranks = np.arange(1, len(ranked) + 1)
    for name, color, line, label in (
        ("predicted", ORANGE, "--", _BEFORE),
        ("copies", BLUE, "-", _ITEMS),
        ("unique", SKY, ":", _IMAGES),
    ):
        counts = [one[name] for one in ranked]
        axes.step(ranks, counts, where="mid", color=color, linestyle=line, label=label)
    axes.set_yscale("symlog", linthresh=1)  # logarithmic, and with a place for 0
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain_number)


def shortened(name: str) -> str:
    """Cut the middle out: names that begin alike often differ at their ends."""
    return name if len(name) <= 12 else f"{name[:6]}…{name[-5:]}"


def plain_number(value: float, _position: float | None) -> str:
    """Write a tick as a whole number with separators."""
    return f"{value:,.0f}"
