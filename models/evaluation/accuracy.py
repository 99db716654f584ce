"""Accuracy, of all and of each class, with its interval."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Accuracy:
    """Counts, which add over shards."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total:
            raise ValueError(f"{self.correct} correct of {self.total} is impossible")

    def __add__(self, other: "Accuracy") -> "Accuracy":
        return Accuracy(self.correct + other.correct, self.total + other.total)

    @property
    def value(self) -> float | None:
        """In [0, 1]; None of no samples."""
        return self.correct / self.total if self.total else None

    def wilson_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson score interval at a confidence level in (0, 1); (0, 1) of no samples."""
        return wilson_interval(self.correct, self.total, level)


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion: inside [0, 1], and not empty at 0 or 1.

    Source: Wilson 1927; Brown, Cai, DasGupta 2001.
    """
    if total == 0:
        return 0.0, 1.0
    z = normal_quantile(level)
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half = z * spread / (1 + z * z / total)
    # At 0 and at 1 the bound is exact; rounding must not take it away.
    low = 0.0 if correct == 0 else max(0.0, center - half)
    high = 1.0 if correct == total else min(1.0, center + half)
    return low, high


def normal_quantile(level: float) -> float:
    """Half-width in standard deviations of a two-sided interval: 1.96 at 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level} must lie strictly between 0 and 1")
    return NormalDist().inv_cdf((1 + level) / 2)


def accuracy(labels: NDArray[np.integer], predictions: NDArray[np.integer]) -> Accuracy:
    """How many of (N,) predicted class ids are the (N,) labels."""
    _check_pairs(labels, predictions)
    return Accuracy(int((labels == predictions).sum()), len(labels))


def per_class_accuracy(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], *, num_classes: int
) -> tuple[Accuracy, ...]:
    """Accuracy on the samples of each true class (its recall), in class order."""
    _check_pairs(labels, predictions)
    totals = np.bincount(labels, minlength=num_classes)
    if len(totals) != num_classes:
        raise ValueError(f"label {len(totals) - 1} where there are {num_classes} classes")
    correct = np.bincount(labels[labels == predictions], minlength=num_classes)
    return tuple(Accuracy(int(c), int(t)) for c, t in zip(correct, totals, strict=True))


def _check_pairs(labels: NDArray[np.integer], predictions: NDArray[np.integer]) -> None:
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            f"labels of shape {labels.shape}, predictions of shape {predictions.shape}: must both "
            "be (N,)"
        )
