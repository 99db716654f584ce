"""How many copies of each pseudo-labelled sample are trained on, so that classes are even.

Every rule is map, merge, finish, with a merge that is associative and commutative, so any order and
grouping of shards gives the same bytes. All functions see only rows that passed the threshold:

    pass 1   histogram = sum over shards of `confidence_histogram`        (merge: array addition)
             plan = `plan_balance(config, histogram)`
    pass 2   only where `needs_candidates(plan)`: candidates = merge over shards of
             `boundary_candidates`; plan = `finish_plan(plan, candidates)`
    pass 3   copies = `assign_copies(plan, ...)` for each shard
"""

from typing import Annotated, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.balancing.candidates import Candidates, merge_candidates
from models.balancing.cap_min import plan_cap_min
from models.balancing.configs import (
    BalanceNoneConfig,
    CapMinConfig,
    CrestConfig,
    NsBinnedConfig,
    TopKConfig,
)
from models.balancing.crest import plan_crest
from models.balancing.histograms import confidence_histogram as _confidence_histogram
from models.balancing.histograms import merge_histograms
from models.balancing.ns_binned import NS_EDGES, NsBinnedPlan, ns_binned_copies, plan_ns_binned
from models.balancing.quotas import randomly_rounded, resolved_quota
from models.balancing.top_k import (
    TOP_K_EDGES,
    TopKBoundary,
    TopKPlan,
    finish_top_k,
    plan_top_k,
    top_k_candidates,
    top_k_copies,
)

__all__ = [
    "BalanceConfig",
    "BalanceNoneConfig",
    "BalancePlan",
    "Candidates",
    "CapMinConfig",
    "CrestConfig",
    "FinishedPlan",
    "NoBalancePlan",
    "NsBinnedConfig",
    "NsBinnedPlan",
    "TopKBoundary",
    "TopKConfig",
    "TopKPlan",
    "assign_copies",
    "boundary_candidates",
    "confidence_histogram",
    "finish_plan",
    "merge_candidates",
    "merge_histograms",
    "needs_candidates",
    "plan_balance",
    "randomly_rounded",
    "reads_labeled_counts",
    "resolved_quota",
]

BalanceConfig = Annotated[
    BalanceNoneConfig | NsBinnedConfig | TopKConfig | CrestConfig | CapMinConfig,
    Field(discriminator="kind"),
]


class NoBalancePlan:
    """One copy of everything."""


BalancePlan = NoBalancePlan | NsBinnedPlan | TopKBoundary | TopKPlan
FinishedPlan = NoBalancePlan | NsBinnedPlan | TopKPlan


def confidence_histogram(
    config: BalanceConfig,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    *,
    num_classes: int,
) -> NDArray[np.int64]:
    """Map of pass 1: samples by class and confidence bin, (C, bins); sum it over shards.

    Args:
        config: its kind decides the bins (101 of NS, else 4,096).
        labels: (N,) class ids of rows that passed the threshold.
        confidences: (N,) in [0, 1].
        num_classes: C.
    Raises: ValueError for NaN, or a value or a label out of range.
    """
    edges = NS_EDGES if isinstance(config, NsBinnedConfig) else TOP_K_EDGES
    return _confidence_histogram(labels, confidences, num_classes=num_classes, edges=edges)


def reads_labeled_counts(config: BalanceConfig) -> bool:
    """Whether the class counts of the labelled images enter."""
    return isinstance(config, CrestConfig)


def plan_balance(
    config: BalanceConfig,
    histogram: NDArray[np.int64],
    *,
    labeled_counts: NDArray[np.int64] | None = None,
) -> BalancePlan:
    """Finish of pass 1, from the histogram of all shards.

    Args:
        config: the rule.
        histogram: (C, bins).
        labeled_counts: (C,) labelled images of each class, where `reads_labeled_counts`.
    """
    match config:
        case BalanceNoneConfig():
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


def needs_candidates(plan: BalancePlan) -> bool:
    """Whether pass 2 is to be made."""
    return isinstance(plan, TopKBoundary)


def boundary_candidates(
    plan: BalancePlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_],
) -> Candidates:
    """Map of pass 2: the rows of one shard that the boundary runs through; never many."""
    if not isinstance(plan, TopKBoundary):
        raise ValueError(f"{type(plan).__name__} needs no candidates: see needs_candidates")
    return top_k_candidates(plan, labels, confidences, keys)


def finish_plan(plan: BalancePlan, candidates: Candidates | None = None) -> FinishedPlan:
    """Finish of pass 2; a plan that needs none is returned as it is."""
    if not isinstance(plan, TopKBoundary):
        return plan
    if candidates is None:
        raise ValueError("top_k needs the candidates of all shards: merge boundary_candidates")
    return finish_top_k(plan, candidates)


def assign_copies(
    plan: FinishedPlan,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    keys: NDArray[np.str_],
    uniforms: NDArray[np.floating],
) -> NDArray[np.uint16]:
    """Copies of each row of one shard; 0 is over quota.

    Args:
        plan: the finished plan.
        labels: (N,) as in pass 1.
        confidences: (N,) as in pass 1, of the same dtype.
        keys: (N,) sample keys, unique in the corpus.
        uniforms: (N,) in [0, 1), drawn for each key, which round fractional copies.
    Returns: (N,) uint16.
    """
    match plan:
        case NoBalancePlan():
            return np.ones(len(labels), dtype=np.uint16)
        case NsBinnedPlan():
            return ns_binned_copies(plan, labels, confidences, uniforms)
        case TopKPlan():
            return top_k_copies(plan, labels, confidences, keys, uniforms)
        case _:
            assert_never(plan)
