"""Exactly the k most confident of each class, in memory that does not grow with the corpus."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.balancing.candidates import Candidates, KeysOfRows, best_candidates, check_keys
from models.balancing.configs import TopKConfig
from models.balancing.histograms import binary_bins, check_rows
from models.balancing.quotas import expected_copies, resolved_quota

_MOST_BINS, _FEWEST_BINS = 4096, 64
_MOST_CELLS = 2**18  # classes x bins: 2 MB of counts, which stay in a core's cache


def num_top_k_bins(num_classes: int) -> int:
    """Bins of confidence of each class in pass 1, a power of two.

    Fewer where there are many classes: rows in the cut bins are collected in pass 2 whatever the
    bins, so they decide cost alone.
    """
    num_bins = _MOST_BINS
    while num_bins > _FEWEST_BINS and num_bins * num_classes > _MOST_CELLS:
        num_bins //= 2
    return num_bins


@dataclass(frozen=True)
class TopKBoundary:
    """What the histogram tells: in which bin the k-th of each class lies.

    Attributes:
        quotas: (C,) k.
        counts: (C,) samples that passed the threshold.
        cut_bins: (C,) bin of the k-th; -1 where the whole class is kept.
        wanted: (C,) rows of the cut bin that are kept, at least 1 where there is a cut, else 0.
        expected_copies: (C,) of each kept row.
        is_capped: (C,) whether max_copies keeps the class below the quota.
        num_bins: of the histogram.
    """

    quotas: NDArray[np.int64]
    counts: NDArray[np.int64]
    cut_bins: NDArray[np.int64]
    wanted: NDArray[np.int64]
    expected_copies: NDArray[np.float64]
    is_capped: NDArray[np.bool_]
    num_bins: int


@dataclass(frozen=True)
class TopKPlan:
    """What each class keeps: rows at least as good as its last one.

    Attributes:
        quotas: (C,) k.
        counts: (C,) samples that passed the threshold.
        last_confidences: (C,) confidence of the k-th row; 0 where the whole class is kept.
        last_keys: (C,) its key; of equal confidences the keys up to it are kept. None where the
            whole class is kept.
        expected_copies: (C,) of each kept row.
        is_capped: (C,) whether max_copies keeps the class below the quota.
    """

    quotas: NDArray[np.int64]
    counts: NDArray[np.int64]
    last_confidences: NDArray[np.float64]
    last_keys: tuple[str | None, ...]
    expected_copies: NDArray[np.float64]
    is_capped: NDArray[np.bool_]

    def thresholds(self, floor: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """The confidence from which on each class is kept, (C,), never below the `floor`."""
        return np.maximum(self.last_confidences, floor)


def plan_top_k(config: TopKConfig, histogram: NDArray[np.int64]) -> TopKBoundary:
    """Find the bin of the k-th sample of each class in a (C, bins) histogram."""
    counts = histogram.sum(axis=1)
    quotas = np.full(len(counts), resolved_quota(config.k, counts))
    return plan_quotas(quotas, histogram, upsample=config.upsample, max_copies=config.max_copies)


def plan_quotas(
    quotas: NDArray[np.int64], histogram: NDArray[np.int64], *, upsample: bool, max_copies: int
) -> TopKBoundary:
    """Find the bin of the last sample of each class that its own quota keeps.

    Args:
        quotas: (C,) samples wanted of each class; 0 gives each of its samples 0 copies.
        histogram: (C, bins).
        upsample: duplicate the samples of classes that have fewer.
        max_copies: of one sample.
    """
    if histogram.shape[1] != num_top_k_bins(len(histogram)):
        raise ValueError(
            f"histogram of {histogram.shape[1]} bins, {len(histogram)} classes need "
            f"{num_top_k_bins(len(histogram))}"
        )
    counts = histogram.sum(axis=1)
    at_or_above = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]  # (C, bins)
    has_cut = counts > quotas
    last_bins = (at_or_above >= quotas[:, None]).sum(axis=1) - 1
    cut_bins = np.where(has_cut, last_bins, -1)
    rows = np.arange(len(counts))
    above = at_or_above[rows, last_bins] - histogram[rows, last_bins]  # strictly above the bin
    copies = expected_copies(
        quotas, np.minimum(counts, quotas), upsample=upsample, max_copies=max_copies
    )
    is_capped = (counts > 0) & (counts * max_copies < quotas) & upsample
    return TopKBoundary(
        quotas=quotas,
        counts=counts,
        cut_bins=cut_bins,
        wanted=np.where(has_cut, quotas - above, 0),
        expected_copies=copies,
        is_capped=is_capped,
        num_bins=histogram.shape[1],
    )


def in_cut_bin(
    boundary: TopKBoundary, labels: NDArray[np.integer], confidences: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """Which rows lie in the bin that the last row of their class lies in, (N,)."""
    check_rows(labels, confidences, len(boundary.counts))
    return binary_bins(confidences, boundary.num_bins) == boundary.cut_bins[labels]


def top_k_candidates(
    boundary: TopKBoundary,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_],
) -> Candidates:
    """The best rows of some shards within the cut bins, as many of a class as could be kept."""
    check_keys(keys, len(labels))
    in_cut = in_cut_bin(boundary, labels, confidences)
    return best_candidates(
        labels[in_cut].astype(np.int64),
        confidences[in_cut].astype(np.float64),
        keys[in_cut],
        boundary.wanted,
    )


def finish_top_k(boundary: TopKBoundary, candidates: Candidates) -> TopKPlan:
    """Take the last wanted candidate of each class as its boundary.

    Raises: ValueError if a class has fewer candidates than its histogram said, that is, if a shard
        is missing from one of the passes.
    """
    last_confidences = np.zeros(len(boundary.counts))
    last_keys: list[str | None] = [None] * len(boundary.counts)
    for label in np.flatnonzero(boundary.wanted > 0):
        start, stop = np.searchsorted(candidates.labels, [label, label + 1])
        if stop - start != boundary.wanted[label]:
            raise ValueError(
                f"class {label} has {stop - start} candidates, its histogram promised "
                f"{boundary.wanted[label]}: both passes must see the same shards"
            )
        last_confidences[label] = candidates.confidences[stop - 1]
        last_keys[label] = str(candidates.keys[stop - 1])
    return TopKPlan(
        quotas=boundary.quotas,
        counts=boundary.counts,
        last_confidences=last_confidences,
        last_keys=tuple(last_keys),
        expected_copies=boundary.expected_copies,
        is_capped=boundary.is_capped,
    )


def top_k_expected_copies(
    plan: TopKPlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: KeysOfRows,
) -> NDArray[np.float64]:
    """Copies of each row that passed the threshold, (N,); 0 past the k-th of its class."""
    check_rows(labels, confidences, len(plan.counts))
    exact = confidences.astype(np.float64)
    last = plan.last_confidences[labels]
    is_kept = exact > last
    ties = np.flatnonzero(exact == last)
    if not len(ties):  # as in most shards: no key is asked for
        return np.where(is_kept, plan.expected_copies[labels], 0.0)
    for row, key in zip(ties.tolist(), keys(ties).tolist(), strict=True):
        last_key = plan.last_keys[int(labels[row])]
        is_kept[row] = last_key is None or key <= last_key
    return np.where(is_kept, plan.expected_copies[labels], 0.0)
