"""The passes of a selection over groups of shards, and their order.

Each pass is map, merge, finish with an associative, commutative merge of integers or of ranked
rows, so that order and grouping of shards change nothing. Who maps (threads of Prefect, a plain
loop) is the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from models.balancing import (
    BalancePlan,
    Candidates,
    FinishedPlan,
    NoBalancePlan,
    NsBinnedPlan,
    boundary_candidates,
    confidence_histogram,
    finish_plan,
    merge_candidates,
    merge_histograms,
    needs_candidates,
    plan_balance,
)
from models.debiasing import DebiasNoneConfig, aligning_offsets, class_offsets
from models.exact_sums import exact_mean, exact_sum
from models.thresholds import (
    ClassThresholds,
    FinishedThresholds,
    ThresholdSearch,
    advance_thresholds,
    begin_thresholds,
    count_for_thresholds,
    threshold_values,
)
from models.weighting import SoftMatchConfig, moment_sums, softmatch_weights
from storage.corpus import load_corpus
from storage.store import Store
from tasks.selection_config import SelectionConfig
from tasks.selection_rows import Rows, SelectionInputs


class Mapped(Protocol):
    """Run a pass over every group of shards and return what it gave for each, in any order."""

    def __call__(
        self, one_pass: Any, inputs: SelectionInputs, config: SelectionConfig, /, *more: Any
    ) -> list[Any]:
        """Call `one_pass(store, inputs, stems, config, *more)` for each group's stems."""
        ...


@dataclass(frozen=True)
class PlannedSelection:
    """All that is decided before the first shard is written.

    Attributes:
        inputs: with what the steps found.
        plan: copies of each class.
        facts: for the summary.
    """

    inputs: SelectionInputs
    plan: FinishedPlan
    facts: dict[str, Any]


def plan_selection(
    inputs: SelectionInputs, config: SelectionConfig, mapped: Mapped
) -> PlannedSelection:
    """Debias, threshold, weight and balance, as far as the corpus must be seen for it.

    Args:
        inputs: calibrated.
        config: the rules.
        mapped: runs a pass over the shards.
    """
    facts: dict[str, Any] = {}
    mean_probs, num_rows = _mean_probs(inputs, config, mapped)

    offsets = None
    if not isinstance(config.debias, DebiasNoneConfig):
        assert mean_probs is not None, "debiasing needs it"
        offsets = class_offsets(
            config.debias,
            mean_probs,
            labeled_counts=inputs.labeled_counts,
            round_index=inputs.round_index,
        )
        facts["debias"] = {"mean_probs": mean_probs.tolist(), "offsets": offsets.tolist()}
    inputs = inputs.after("debias", offsets=offsets)

    thresholds = _thresholds(inputs, config, mapped)
    inputs = inputs.after("threshold", thresholds=thresholds)

    weighting = config.weighting
    if isinstance(weighting, SoftMatchConfig):
        assert mean_probs is not None, "softmatch needs it"
        uniform = np.full(inputs.num_classes, 1 / inputs.num_classes)
        aligning = aligning_offsets(uniform, mean_probs)
        sums = reduce(np.add, mapped(sum_moments, inputs, config, aligning))
        weighting = softmatch_weights(sums, num_rows, offsets=aligning, n=weighting.n)
        facts["softmatch"] = {"mean": weighting.mean, "variance": weighting.variance}
    inputs = inputs.after("weight", weighting=weighting)

    plan = _balance(inputs, config, mapped)
    facts |= _plan_facts(plan, thresholds)
    return PlannedSelection(inputs.after("balance"), plan, facts)


def sum_probabilities(
    store: Store, inputs: SelectionInputs, stems: Sequence[str], config: SelectionConfig
) -> tuple[NDArray[np.int64], int]:
    """Map: the exact sum of the calibrated probabilities, (2, C), and the number of rows."""
    inputs.assert_next("debias")
    total, num_rows = np.zeros((2, inputs.num_classes), dtype=np.int64), 0
    for rows in _each(store, inputs, stems, config):
        total += exact_sum(rows.probs())
        num_rows += rows.predictions.num_samples
    return total, num_rows


def count_thresholds(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    search: ThresholdSearch,
) -> NDArray[np.int64]:
    """Map: what a threshold rule counts of all rows."""
    inputs.assert_next("threshold")
    return reduce(
        np.add,
        (
            count_for_thresholds(search, rows.labels, rows.confidences, rows.probs)
            for rows in _each(store, inputs, stems, config)
        ),
    )


def sum_moments(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    aligning: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Map: the exact sums of aligned confidences and of their squares, of all rows."""
    inputs.assert_next("weight")
    return reduce(
        np.add,
        (moment_sums(rows.log_probs(), aligning) for rows in _each(store, inputs, stems, config)),
    )


def count_confidences(
    store: Store, inputs: SelectionInputs, stems: Sequence[str], config: SelectionConfig
) -> NDArray[np.int64]:
    """Map: samples that reach the threshold, by class and confidence bin."""
    inputs.assert_next("balance")
    return reduce(
        merge_histograms,
        (
            confidence_histogram(
                config.balance,
                rows.labels[passes],
                rows.confidences[passes],
                num_classes=inputs.num_classes,
            )
            for rows in _each(store, inputs, stems, config)
            for passes in (rows.passes(inputs),)
        ),
    )


def collect_candidates(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: BalancePlan,
) -> Candidates:
    """Map: the rows that a quota's boundary runs through."""
    inputs.assert_next("balance")
    found: list[Candidates] = []
    for rows in _each(store, inputs, stems, config):
        passes = rows.passes(inputs)
        found.append(
            boundary_candidates(
                plan, rows.labels[passes], rows.confidences[passes], rows.keys()[passes]
            )
        )
    return reduce(merge_candidates, found)


def _each(store: Store, inputs: SelectionInputs, stems: Sequence[str], config: SelectionConfig):
    """Yield the rows of each shard of a group, which holds at least one."""
    corpus = load_corpus(store, inputs.corpus)
    for stem in stems:
        yield Rows.read(store, inputs, corpus, stem, config)


def _mean_probs(
    inputs: SelectionInputs, config: SelectionConfig, mapped: Mapped
) -> tuple[NDArray[np.float64] | None, int]:
    """Return the mean calibrated prediction (C,), where a rule reads it, and the number of rows."""
    is_debiased = not isinstance(config.debias, DebiasNoneConfig)
    if not is_debiased and not isinstance(config.weighting, SoftMatchConfig):
        return None, 0
    found = cast("list[tuple[Any, int]]", mapped(sum_probabilities, inputs, config))
    num_rows = sum(count for _, count in found)
    return exact_mean(reduce(np.add, [sums for sums, _ in found]), num_rows), num_rows


def _thresholds(
    inputs: SelectionInputs, config: SelectionConfig, mapped: Mapped
) -> FinishedThresholds:
    found = begin_thresholds(
        config.threshold, num_classes=inputs.num_classes, round_index=inputs.round_index
    )
    while isinstance(found, ThresholdSearch):
        counts = reduce(np.add, mapped(count_thresholds, inputs, config, found))
        found = advance_thresholds(found, counts)
    return found


def _balance(inputs: SelectionInputs, config: SelectionConfig, mapped: Mapped) -> FinishedPlan:
    histogram = reduce(merge_histograms, mapped(count_confidences, inputs, config))
    plan = plan_balance(config.balance, histogram, labeled_counts=inputs.labeled_counts)
    if not needs_candidates(plan):
        return finish_plan(plan)
    candidates = reduce(merge_candidates, mapped(collect_candidates, inputs, config, plan))
    return finish_plan(plan, candidates)


def _plan_facts(plan: FinishedPlan, thresholds: FinishedThresholds) -> dict[str, Any]:
    """Return the confidence from which on each class is kept, and its quota."""
    values = threshold_values(thresholds)
    if isinstance(plan, NoBalancePlan):
        is_learned = isinstance(thresholds, ClassThresholds)
        return {"class_thresholds": np.asarray(values).tolist()} if is_learned else {}
    kept_from = {"class_thresholds": plan.thresholds(values).tolist()}
    if isinstance(plan, NsBinnedPlan):
        return kept_from | {"quota": plan.quota}
    quotas = cast("list[int]", plan.quotas.tolist())
    return kept_from | ({"quota": quotas[0]} if len(set(quotas)) == 1 else {"quotas": quotas})
