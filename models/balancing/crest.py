"""CReST's sampling: rare classes keep more of their pseudo-labels."""

import numpy as np
from numpy.typing import NDArray

from models.balancing.configs import CrestConfig
from models.balancing.top_k import TopKBoundary, plan_quotas


def crest_rates(labeled_counts: NDArray[np.int64], alpha: float) -> NDArray[np.float64]:
    """The share of its pseudo-labels that each class keeps, (C,) in [0, 1].

    Classes with as many labelled images have one rate, the mean of those of their ranks; the source
    leaves ties open.

    Raises: ValueError without any labelled image.
    """
    if labeled_counts.max(initial=0) <= 0:
        raise ValueError("crest: no class has a labelled image, so that none is rare")
    order = np.argsort(-labeled_counts, kind="stable")
    descending = labeled_counts[order]
    by_rank = (descending[::-1] / descending[0]) ** alpha
    _, groups = np.unique(descending, return_inverse=True)
    means = np.bincount(groups, weights=by_rank) / np.bincount(groups)
    rates = np.empty(len(labeled_counts))
    rates[order] = means[groups]
    return rates


def plan_crest(
    config: CrestConfig, histogram: NDArray[np.int64], labeled_counts: NDArray[np.int64]
) -> TopKBoundary:
    """The most confident rate * n_c of each class, halves rounded up; (C, bins) histogram.

    Raises: ValueError if the labelled images are of another number of classes.
    """
    if len(labeled_counts) != len(histogram):
        raise ValueError(
            f"crest: labelled images of {len(labeled_counts)} classes, predictions of "
            f"{len(histogram)}"
        )
    wanted = crest_rates(labeled_counts, config.alpha) * histogram.sum(axis=1)
    quotas = np.floor(wanted + 0.5).astype(np.int64)
    return plan_quotas(quotas, histogram, upsample=False, max_copies=1)
