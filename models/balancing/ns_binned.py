"""Noisy Student's class balance, with its hundredths of confidence and uniform thinning."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.balancing.configs import NsBinnedConfig
from models.balancing.histograms import check_rows, confidence_bins
from models.balancing.quotas import expected_copies, resolved_quota

NS_EDGES: NDArray[np.float64] = np.arange(101, dtype=np.float64) / 100  # i / 100, correctly rounded


@dataclass(frozen=True)
class NsBinnedPlan:
    """What each class keeps.

    Attributes:
        quota: K.
        counts: (C,) samples that passed the threshold.
        cut_bins: (C,) bin from which on a class is kept; 0 where all of it is.
        available: (C,) samples at or above the cut.
        expected_copies: (C,) of each of those.
        is_capped: (C,) whether max_copies keeps the class below the quota.
    """

    quota: int
    counts: NDArray[np.int64]
    cut_bins: NDArray[np.int64]
    available: NDArray[np.int64]
    expected_copies: NDArray[np.float64]
    is_capped: NDArray[np.bool_]

    def thresholds(self, floor: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """The confidence from which on each class is kept, (C,), never below the `floor`."""
        return np.maximum(NS_EDGES[self.cut_bins], floor)


def plan_ns_binned(config: NsBinnedConfig, histogram: NDArray[np.int64]) -> NsBinnedPlan:
    """Walk each class from confidence 1 downwards until it has K samples.

    Args:
        config: the rule.
        histogram: (C, 101) of the rows that passed the threshold; the bin in which the walk stops
            belongs to the class as a whole.
    """
    if histogram.shape[1] != len(NS_EDGES):
        raise ValueError(f"histogram of {histogram.shape[1]} bins, ns_binned needs 101")
    counts = histogram.sum(axis=1)
    quota = resolved_quota(config.k, counts)
    at_or_above = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]  # (C, 101)
    # At or above falls with the bin, so the bins with at least K are a prefix; the last is the cut.
    cut_bins = np.maximum((at_or_above >= quota).sum(axis=1) - 1, 0)
    available = at_or_above[np.arange(len(counts)), cut_bins]
    copies = expected_copies(
        quota, available, upsample=config.upsample, max_copies=config.max_copies
    )
    is_capped = (available > 0) & (available * config.max_copies < quota) & config.upsample
    return NsBinnedPlan(
        quota=quota,
        counts=counts,
        cut_bins=cut_bins,
        available=available,
        expected_copies=copies,
        is_capped=is_capped,
    )


def ns_binned_expected_copies(
    plan: NsBinnedPlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
) -> NDArray[np.float64]:
    """Copies of each row that passed the threshold, (N,); 0 below the cut, thinned above it."""
    check_rows(labels, confidences, len(plan.counts))
    is_above = confidence_bins(confidences, NS_EDGES) >= plan.cut_bins[labels]
    return np.where(is_above, plan.expected_copies[labels], 0.0)
