"""Exactly the k most confident of each class, in memory that does not grow with the corpus."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.balancing.candidates import Candidates, best_candidates
from models.balancing.configs import TopKConfig
from models.balancing.histograms import check_rows, confidence_bins
from models.balancing.quotas import expected_copies, randomly_rounded, resolved_quota

TOP_K_EDGES: NDArray[np.float64] = np.arange(4096, dtype=np.float64) / 4096  # exact in float32 too


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
    """

    quotas: NDArray[np.int64]
    counts: NDArray[np.int64]
    cut_bins: NDArray[np.int64]
    wanted: NDArray[np.int64]
    expected_copies: NDArray[np.float64]
    is_capped: NDArray[np.bool_]


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
    """Find the bin of the k-th sample of each class in a (C, 4096) histogram."""
    counts = histogram.sum(axis=1)
    quotas = np.full(len(counts), resolved_quota(config.k, counts))
    return plan_quotas(quotas, histogram, upsample=config.upsample, max_copies=config.max_copies)


def plan_quotas(
    quotas: NDArray[np.int64], histogram: NDArray[np.int64], *, upsample: bool, max_copies: int
) -> TopKBoundary:
    """Find the bin of the last sample of each class that its own quota keeps.

    Args:
        quotas: (C,) samples wanted of each class; 0 gives each of its samples 0 copies.
        histogram: (C, 4096).
        upsample: duplicate the samples of classes that have fewer.
        max_copies: of one sample.
    """
    if histogram.shape[1] != len(TOP_K_EDGES):
        raise ValueError(f"histogram of {histogram.shape[1]} bins, top_k needs 4096")
    counts = histogram.sum(axis=1)
    at_or_above = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]  # (C, 4096)
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
    )


def top_k_candidates(
    boundary: TopKBoundary,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_],
) -> Candidates:
    """The best rows of one shard within the cut bins, as many of a class as could be kept."""
    check_rows(labels, confidences, len(boundary.counts))
    _check_keys(keys, len(labels))
    is_in_cut = confidence_bins(confidences, TOP_K_EDGES) == boundary.cut_bins[labels]
    return best_candidates(
        labels[is_in_cut].astype(np.int64),
        confidences[is_in_cut].astype(np.float64),
        keys[is_in_cut],
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


def top_k_copies(
    plan: TopKPlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_],
    uniforms: NDArray[np.floating],
) -> NDArray[np.uint16]:
    """Copies of each row that passed the threshold, (N,); 0 past the k-th of its class."""
    check_rows(labels, confidences, len(plan.counts))
    _check_keys(keys, len(labels))
    exact = confidences.astype(np.float64)
    last = plan.last_confidences[labels]
    is_kept = exact > last
    for row in np.flatnonzero(exact == last):  # the ties, which are few
        last_key = plan.last_keys[int(labels[row])]
        is_kept[row] = last_key is None or str(keys[row]) <= last_key
    return randomly_rounded(np.where(is_kept, plan.expected_copies[labels], 0.0), uniforms)


def _check_keys(keys: NDArray[np.str_], num_rows: int) -> None:
    if keys.shape != (num_rows,) or keys.dtype.kind != "U":
        raise ValueError(
            f"keys of shape {keys.shape} and dtype {keys.dtype} for {num_rows} rows: must be as "
            "many strings (a numpy array of dtype U)"
        )
