"""Signs that self-training goes wrong, read off the summaries of two rounds; no side effects.

The limits are rules of thumb and not fitted to anything: an alert asks a person to look, it stops
nothing. A selection that must not be trained on is refused elsewhere (tasks/selection_summary.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TOP_SHARE_RATIO = 1.5
"""The class predicted most often takes this many times the share that it took a round before..."""
TOP_SHARE_GROWTH = 0.02
"""...and at least this much more of all predictions, so that rare classes may waver."""
DIVERGENCE_GROWTH = 0.1
"""Nats by which predicted classes move away from those of the labels from round to round."""
COVERAGE_RATIO = 0.75
"""Below this part of the coverage of the round before, coverage has fallen."""


@dataclass(frozen=True)
class Balance:
    """How the classes that a teacher predicts compare with those of the labels.

    Attributes:
        top_class: name of the class predicted most often.
        top_share: its share of all predictions, in [0, 1].
        divergence: KL(predicted classes || classes of the labels) in nats, at least 0.
        coverage: share of the predictions that are selected, in [0, 1].
    """

    top_class: str
    top_share: float
    divergence: float
    coverage: float

    def to_json(self) -> dict[str, Any]:
        """Return the form of an event's payload."""
        return asdict(self)


def balance_of(summary: Mapping[str, Any], label_counts: Sequence[int]) -> Balance:
    """Return the balance of one selection.

    Args:
        summary: of a selection of at least one prediction.
        label_counts: (C,) labelled images of each class, each at least 1, in the run's class order.
    """
    classes = summary["classes"]
    predicted = [one["predicted"] for one in classes]
    total, num_labels = sum(predicted), sum(label_counts)
    top = max(range(len(classes)), key=lambda i: predicted[i])
    divergence = sum(
        n / total * math.log(n / total * num_labels / labels)
        for n, labels in zip(predicted, label_counts, strict=True)
        if n > 0
    )
    return Balance(
        top_class=classes[top]["name"],
        top_share=predicted[top] / total,
        divergence=max(divergence, 0.0),  # rounding may take it below
        coverage=float(summary["coverage"]),
    )


def signs_of_collapse(before: Balance, now: Balance) -> list[str]:
    """Return in words what points to a collapse from one round to the next, with the limits."""
    signs: list[str] = []
    growth = now.top_share - before.top_share
    if now.top_share >= TOP_SHARE_RATIO * before.top_share and growth >= TOP_SHARE_GROWTH:
        signs.append(
            f"the largest class, {now.top_class!r}, has {now.top_share:.1%} of the predictions,"
            f" the largest a round before had {before.top_share:.1%}"
            f" (limits: {TOP_SHARE_RATIO:g} times, {TOP_SHARE_GROWTH:.0%} more)"
        )
    if now.divergence - before.divergence > DIVERGENCE_GROWTH:
        signs.append(
            f"predicted classes are {now.divergence:.3f} nats from those of the labels,"
            f" {before.divergence:.3f} a round before (limit: {DIVERGENCE_GROWTH:g} more)"
        )
    if now.coverage < COVERAGE_RATIO * before.coverage:
        signs.append(
            f"coverage fell from {before.coverage:.1%} to {now.coverage:.1%}"
            f" (limit: {COVERAGE_RATIO:g} times)"
        )
    return signs
