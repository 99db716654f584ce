"""Exactly the k most confident of each class, in memory that does not grow with the corpus."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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
        last_keys: (C,) its key; of equal confidences the keys up to it are kept. None where all of
            that confidence are.
        expected_copies: (C,) of each kept row.
        is_capped: (C,) whether max_copies keeps the class below the quota.
    """

    quotas: NDArray[np.int64]
    counts: NDArray[np.int64]
    last_confidences: NDArray[np.float64]
    last_keys: tuple[str | None, ...]
    expected_copies: NDArray[np.float64]
    is_capped: NDArray[np.bool_]

    @cached_property
    def has_key(self) -> NDArray[np.bool_]:
        """In which classes a key decides, (C,)."""
        return np.array([key is not None for key in self.last_keys])

    def thresholds(self, floor: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """The confidence from which on each class is kept, (C,), never below the `floor`."""
        return np.maximum(self.last_confidences, floor)


@dataclass(frozen=True)
class TopKTies:
    """Classes of which more rows have the confidence of the k-th than are kept.

    Attributes:
        plan: what is known without keys.
        wanted: (C,) rows of that confidence that are kept; 0 where all of them are.
    """

    plan: TopKPlan
    wanted: NDArray[np.int64]


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


def is_tied(
    ties: TopKTies, labels: NDArray[np.integer], confidences: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """Which rows have the confidence of the k-th of their class, where not all of them are kept."""
    check_rows(labels, confidences, len(ties.wanted))
    of_class = np.flatnonzero((ties.wanted > 0)[labels])  # of most classes none is tied
    last_confidences = ties.plan.last_confidences[labels[of_class]]
    found = np.zeros(len(labels), dtype=np.bool_)
    found[of_class] = confidences[of_class].astype(np.float64) == last_confidences
    return found


def top_k_candidates(
    boundary: TopKBoundary, labels: NDArray[np.integer], confidences: NDArray[np.floating]
) -> Candidates:
    """The best rows of some shards within the cut bins: of a class one more than could be kept.

    That one tells whether keys must decide, which are long to read and not asked for here.
    """
    in_cut = in_cut_bin(boundary, labels, confidences)
    return best_candidates(
        labels[in_cut].astype(np.int64),
        confidences[in_cut].astype(np.float64),
        np.zeros(int(in_cut.sum()), dtype=np.str_),
        np.where(boundary.wanted > 0, boundary.wanted + 1, 0),
    )


def tied_candidates(
    ties: TopKTies,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_],
) -> Candidates:
    """The tied rows of some shards with the first keys, as many of a class as could be kept."""
    check_keys(keys, len(labels))
    tied = is_tied(ties, labels, confidences)
    return best_candidates(
        labels[tied].astype(np.int64),
        confidences[tied].astype(np.float64),
        keys[tied],
        ties.wanted,
    )


def finish_top_k(boundary: TopKBoundary, candidates: Candidates) -> TopKPlan | TopKTies:
    """Take the confidence of the last wanted candidate of each class as its boundary.

    Raises: ValueError if a class has fewer candidates than its histogram said, that is, if a shard
        is missing from one of the passes.
    """
    num_classes = len(boundary.counts)
    last_confidences = np.zeros(num_classes)
    tied = np.zeros(num_classes, dtype=np.int64)
    for label in np.flatnonzero(boundary.wanted > 0).tolist():
        wanted = int(boundary.wanted[label])
        values = _of_class(candidates.confidences, candidates, label, wanted)
        last_confidences[label] = last = values[wanted - 1]
        if len(values) > wanted and values[wanted] == last:
            tied[label] = wanted - np.searchsorted(-values, -last)
    plan = TopKPlan(
        quotas=boundary.quotas,
        counts=boundary.counts,
        last_confidences=last_confidences,
        last_keys=(None,) * num_classes,
        expected_copies=boundary.expected_copies,
        is_capped=boundary.is_capped,
    )
    return TopKTies(plan, tied) if tied.any() else plan


def finish_ties(ties: TopKTies, candidates: Candidates) -> TopKPlan:
    """Take the key of the last wanted candidate of each tied class as its boundary.

    Raises: ValueError as `finish_top_k` does.
    """
    last_keys: list[str | None] = [None] * len(ties.wanted)
    for label in np.flatnonzero(ties.wanted > 0).tolist():
        wanted = int(ties.wanted[label])
        last_keys[label] = str(_of_class(candidates.keys, candidates, label, wanted)[wanted - 1])
    return replace(ties.plan, last_keys=tuple(last_keys))


def _of_class(column: NDArray[Any], candidates: Candidates, label: int, least: int) -> NDArray[Any]:
    start, stop = np.searchsorted(candidates.labels, [label, label + 1])
    if stop - start < least:
        raise ValueError(
            f"class {label} has {stop - start} candidates, an earlier pass promised at least "
            f"{least}: all passes must see the same shards"
        )
    return column[start:stop]


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
    is_kept = exact >= last
    if plan.has_key.any():
        tied = np.flatnonzero(exact == last)  # few
        tied = tied[plan.has_key[labels[tied]]]
        for row, key in zip(tied.tolist(), keys(tied).tolist(), strict=True):
            last_key = plan.last_keys[int(labels[row])]
            assert last_key is not None, "has_key"
            is_kept[row] = key <= last_key
    return plan.expected_copies[labels] * is_kept
