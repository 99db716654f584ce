"""How many copies of each pseudo-labelled sample are trained on, so that classes are even.

Every rule is map, merge, finish, with a merge that is associative and commutative, so any order and
grouping of shards gives the same bytes. All functions see only rows that passed the threshold, and
what they call confidences is what `ranking` gives:

    pass 1   histogram = sum over shards of `confidence_histogram`        (merge: array addition)
             plan = `plan_balance(config, histogram)`
    pass 2   while the plan is an `UnfinishedPlan`: candidates = merge over shards of
             `boundary_candidates`; plan = `advance_plan(plan, candidates)`. A second time
             only where confidences tie at a boundary, so that keys decide: see `reads_keys`
    pass 3   copies = `assign_copies(plan, ...)` for each shard
"""

from collections.abc import Callable
from typing import Annotated, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.balancing.candidates import (
    Candidates,
    Keys,
    keys_of,
    merge_all_candidates,
    merge_candidates,
)
from models.balancing.cap_min import certainties, plan_cap_min
from models.balancing.configs import (
    BalanceNoneConfig,
    CapMinConfig,
    CrestConfig,
    NsBinnedConfig,
    TopKConfig,
)
from models.balancing.crest import plan_crest
from models.balancing.histograms import (
    binary_bins,
    confidence_bins,
    merge_histograms,
    packed_histogram,
)
from models.balancing.histograms import confidence_histogram as _confidence_histogram
from models.balancing.ns_binned import (
    NS_EDGES,
    NsBinnedPlan,
    ns_binned_expected_copies,
    plan_ns_binned,
)
from models.balancing.quotas import randomly_rounded, resolved_quota
from models.balancing.top_k import (
    TopKBoundary,
    TopKPlan,
    TopKTies,
    finish_ties,
    finish_top_k,
    in_cut_bin,
    is_tied,
    num_top_k_bins,
    plan_top_k,
    tied_candidates,
    top_k_candidates,
    top_k_expected_copies,
)
from models.thresholds.fixed import check_confidences

__all__ = [
    "BalanceConfig",
    "BalanceNoneConfig",
    "BalancePlan",
    "Candidates",
    "CapMinConfig",
    "CrestConfig",
    "FinishedPlan",
    "Keys",
    "NoBalancePlan",
    "NsBinnedConfig",
    "NsBinnedPlan",
    "TopKBoundary",
    "TopKConfig",
    "TopKPlan",
    "TopKTies",
    "UnfinishedPlan",
    "advance_plan",
    "assign_copies",
    "boundary_candidates",
    "classes_per_image",
    "confidence_histogram",
    "is_at_boundary",
    "merge_all_candidates",
    "merge_candidates",
    "merge_histograms",
    "packed_histogram",
    "plan_balance",
    "randomly_rounded",
    "ranking",
    "ranks_by_uncertainty",
    "reads_keys",
    "reads_labeled_counts",
    "resolved_quota",
]

BalanceConfig = Annotated[
    BalanceNoneConfig | NsBinnedConfig | TopKConfig | CrestConfig | CapMinConfig,
    Field(discriminator="kind"),
]


class NoBalancePlan:
    """One copy of everything."""


FinishedPlan = NoBalancePlan | NsBinnedPlan | TopKPlan
UnfinishedPlan = TopKBoundary | TopKTies
"""One that pass 2 is needed for, or once more."""
BalancePlan = FinishedPlan | UnfinishedPlan


def confidence_histogram(
    config: BalanceConfig,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    *,
    num_classes: int,
) -> NDArray[np.int64]:
    """Map of pass 1: samples by class and confidence bin, (C, bins); sum it over shards.

    Args:
        config: its kind decides the bins: 101 of NS, else a power of two up to 4,096, fewer where
            there are many classes.
        labels: (N,) class ids of rows that passed the threshold.
        confidences: (N,) in [0, 1].
        num_classes: C.
    Raises: ValueError for NaN, or a value or a label out of range.
    """
    check_confidences(confidences)
    if isinstance(config, NsBinnedConfig):
        num_bins = len(NS_EDGES)
        bins = confidence_bins(confidences, NS_EDGES)
    else:
        num_bins = num_top_k_bins(num_classes)
        bins = binary_bins(confidences, num_bins)
    return _confidence_histogram(
        labels, confidences, num_classes=num_classes, bins=bins, num_bins=num_bins
    )


def classes_per_image(config: BalanceConfig) -> int:
    """Under how many of its most probable classes an image is ranked."""
    return config.classes_per_image if isinstance(config, TopKConfig) else 1


def ranks_by_uncertainty(config: BalanceConfig) -> bool:
    """Whether the least uncertain rows of a class are its best, not the most confident."""
    return isinstance(config, CapMinConfig) and config.by == "uncertainty"


def ranking(
    config: BalanceConfig,
    confidences: NDArray[np.floating],
    uncertainty: NDArray[np.floating] | None,
) -> NDArray[np.floating]:
    """What a rule ranks the rows of a class by, (N,) in [0, 1], the best at 1.

    Args:
        config: the rule.
        confidences: (N,) in [0, 1].
        uncertainty: (N,) standard deviations, where they were measured.
    Raises: ValueError if the rule reads what was not measured.
    """
    if not ranks_by_uncertainty(config):
        return confidences
    if uncertainty is None:
        raise ValueError(
            "balance.by=uncertainty ranks by the deviation of predictions, which these do not have:"
            " label with labeling.uncertainty"
        )
    return certainties(uncertainty)


def reads_labeled_counts(config: BalanceConfig) -> bool:
    """Whether the class counts of the labelled images enter."""
    return isinstance(config, CrestConfig)


def plan_balance(
    config: BalanceConfig,
    histogram: NDArray[np.int64],
    *,
    labeled_counts: NDArray[np.int64] | None = None,
    round_index: int = 1,
) -> BalancePlan:
    """Finish of pass 1, from the histogram of all shards.

    Args:
        config: the rule.
        histogram: (C, bins).
        labeled_counts: (C,) labelled images of each class, where `reads_labeled_counts`.
        round_index: 1 for the first round, which decides whether `cap_min` cuts.
    """
    match config:
        case BalanceNoneConfig():
            return NoBalancePlan()
        case CapMinConfig(rounds=int(rounds)) if round_index > rounds:
            return NoBalancePlan()
        case NsBinnedConfig():
            return plan_ns_binned(config, histogram)
        case TopKConfig():
            return plan_top_k(config, histogram)
        case CrestConfig():
            if labeled_counts is None:
                raise ValueError("crest needs the class counts of the labelled images")
            return plan_crest(config, histogram, labeled_counts)
        case CapMinConfig():
            return plan_cap_min(config, histogram)
        case _:
            assert_never(config)


def reads_keys(plan: UnfinishedPlan) -> bool:
    """Whether the next pass reads sample keys."""
    return isinstance(plan, TopKTies)


def is_at_boundary(
    plan: UnfinishedPlan, labels: NDArray[np.integer], confidences: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """Which rows the boundary runs through, (N,): only these are of use to pass 2."""
    if isinstance(plan, TopKTies):
        return is_tied(plan, labels, confidences)
    return in_cut_bin(plan, labels, confidences)


def boundary_candidates(
    plan: UnfinishedPlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_] | None = None,
) -> Candidates:
    """Map of pass 2: the rows of one shard that the boundary runs through.

    Args:
        plan: so far.
        labels: (N,) as in pass 1.
        confidences: (N,) as in pass 1, of the same dtype.
        keys: (N,) sample keys, unique in the corpus, where `reads_keys`.
    """
    if isinstance(plan, TopKBoundary):
        return top_k_candidates(plan, labels, confidences)
    if keys is None:
        raise ValueError("confidences tie at a boundary, which keys must decide: see reads_keys")
    return tied_candidates(plan, labels, confidences, keys)


def advance_plan(plan: UnfinishedPlan, candidates: Candidates) -> BalancePlan:
    """Finish of pass 2, from the candidates of all shards."""
    if isinstance(plan, TopKTies):
        return finish_ties(plan, candidates)
    return finish_top_k(plan, candidates)


def assign_copies(
    plan: FinishedPlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: Keys,
    uniforms: NDArray[np.floating] | Callable[[NDArray[np.intp]], NDArray[np.floating]],
) -> NDArray[np.uint16]:
    """Copies of each row of one shard; 0 is over quota.

    Args:
        plan: the finished plan.
        labels: (N,) as in pass 1.
        confidences: (N,) as in pass 1, of the same dtype.
        keys: (N,) sample keys, unique in the corpus; or what gives those of some rows.
        uniforms: (N,) in [0, 1), drawn for each key, which round fractional copies; or what draws
            them for some rows: only rows whose copies have a fraction are asked for.
    Returns: (N,) uint16.
    """
    match plan:
        case NoBalancePlan():
            return np.ones(len(labels), dtype=np.uint16)
        case NsBinnedPlan():
            expected = ns_binned_expected_copies(plan, labels, confidences)
        case TopKPlan():
            expected = top_k_expected_copies(plan, labels, confidences, keys_of(keys, len(labels)))
        case _:
            assert_never(plan)
    if not callable(uniforms):
        return randomly_rounded(expected, uniforms)
    rows = np.flatnonzero(expected != np.floor(expected))
    copies = expected.astype(np.uint16)
    copies[rows] = randomly_rounded(expected[rows], uniforms(rows))
    return copies
