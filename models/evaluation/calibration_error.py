"""How far confidence is from accuracy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.thresholds.fixed import check_confidences


@dataclass(frozen=True)
class ReliabilityBin:
    """Samples whose confidence lies in (low, high]; the first bin holds 0 as well.

    Attributes:
        low: bound.
        high: bound.
        total: samples.
        accuracy: their share that is correct, 0 where there are none.
        confidence: their mean, 0 where there are none.
    """

    low: float
    high: float
    total: int
    accuracy: float
    confidence: float


def reliability_bins(
    confidences: NDArray[np.floating], is_correct: NDArray[np.bool_], num_bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Accuracy and mean confidence in bins of equal width over [0, 1].

    Args:
        confidences: (N,) in [0, 1].
        is_correct: (N,) bool.
        num_bins: at least 1; 15 is customary.
    """
    check_confidences(confidences)
    if is_correct.shape != confidences.shape or num_bins < 1:
        raise ValueError(
            f"is_correct of shape {is_correct.shape} for {len(confidences)} confidences, "
            f"num_bins={num_bins}: need as many, and at least 1 bin"
        )
    edges = np.arange(num_bins + 1) / num_bins
    inner = edges[1:-1].astype(confidences.dtype)
    bins = np.searchsorted(inner, confidences, side="left")
    totals = np.bincount(bins, minlength=num_bins)
    correct = np.bincount(bins, weights=is_correct.astype(np.float64), minlength=num_bins)
    sums = np.bincount(bins, weights=confidences.astype(np.float64), minlength=num_bins)
    safe = np.maximum(totals, 1)
    return tuple(
        ReliabilityBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            total=int(totals[i]),
            accuracy=float(correct[i] / safe[i]),
            confidence=float(sums[i] / safe[i]),
        )
        for i in range(num_bins)
    )


def expected_calibration_error(
    confidences: NDArray[np.floating], is_correct: NDArray[np.bool_], num_bins: int = 15
) -> float | None:
    """Mean distance of accuracy and confidence over bins, weighted by samples; None of no samples.

    Source: Guo et al. 2017, equation 3.
    """
    if len(confidences) == 0:
        return None
    bins = reliability_bins(confidences, is_correct, num_bins)
    return sum(b.total * abs(b.accuracy - b.confidence) for b in bins) / len(confidences)
