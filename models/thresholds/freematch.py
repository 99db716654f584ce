"""FreeMatch's self-adaptive thresholds, from means over the whole corpus."""

import numpy as np
from numpy.typing import NDArray

from models.exact_sums import exact_mean, exact_sum
from models.thresholds.class_thresholds import ClassThresholds


def freematch_sums(
    confidences: NDArray[np.floating], probs: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Map: (2, C + 2), exact sums of each class's probability, of the confidence, and rows."""
    sums = exact_sum(np.column_stack([probs, confidences.astype(np.float64)]))
    rows = np.array([[len(confidences)], [0]])
    return np.concatenate([sums, rows], axis=1)


def freematch_thresholds(sums: NDArray[np.int64]) -> ClassThresholds:
    """Finish: mean confidence times each class's mean probability over the largest one."""
    means = exact_mean(sums[:, :-1], int(sums[0, -1]))
    return ClassThresholds(scaled_by_class(float(means[-1]), means[:-1]))


def scaled_by_class(confidence: float, mean_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The global threshold, scaled by the class's mean probability over the largest one, (C,)."""
    return confidence * mean_probs / mean_probs.max()
