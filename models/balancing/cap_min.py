"""Every class cut to the size of the smallest."""

import numpy as np
from numpy.typing import NDArray

from models.balancing.configs import CapMinConfig
from models.balancing.top_k import TopKBoundary, plan_quotas


def plan_cap_min(config: CapMinConfig, histogram: NDArray[np.int64]) -> TopKBoundary:
    """The most confident samples of each class, as many as the smallest has; (C, bins)."""
    counts = histogram.sum(axis=1)
    smallest = int(counts[counts > 0].min()) if (counts > 0).any() else 0
    quotas = np.full(len(counts), max(smallest, config.floor))
    return plan_quotas(quotas, histogram, upsample=False, max_copies=1)
