"""Every class cut to the size of the smallest."""

import numpy as np
from numpy.typing import NDArray

from models.balancing.configs import CapMinConfig
from models.balancing.top_k import TopKBoundary, plan_quotas


def plan_cap_min(config: CapMinConfig, histogram: NDArray[np.int64]) -> TopKBoundary:
    """The best samples of each class, as many as the smallest has; (C, bins)."""
    counts = histogram.sum(axis=1)
    smallest = int(counts[counts > 0].min()) if (counts > 0).any() else 0
    quotas = np.full(len(counts), max(smallest, config.floor))
    return plan_quotas(quotas, histogram, upsample=False, max_copies=1)


def certainties(uncertainty: NDArray[np.floating]) -> NDArray[np.float64]:
    """What ranks the least uncertain first, (N,) in [0, 1]: 1 - std, exact in float64.

    Args:
        uncertainty: (N,) standard deviations of a probability.
    Raises: ValueError for NaN, or a value out of [0, 1].
    """
    bad = ~((uncertainty >= 0) & (uncertainty <= 1))
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(uncertainty)} standard deviations of probabilities lie"
            " outside [0, 1]"
        )
    return 1 - uncertainty.astype(np.float64)
