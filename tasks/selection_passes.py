"""The passes of a selection over groups of shards, and their order.

Each pass is map, merge, finish with an associative, commutative merge of integers or of ranked
rows, so that order and grouping of shards change nothing. Who maps (threads of Prefect, a plain
loop) is the caller's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from models.balancing import (
    BalanceConfig,
    Candidates,
    FinishedPlan,
    NoBalancePlan,
    NsBinnedPlan,
    UnfinishedPlan,
    advance_plan,
    boundary_candidates,
    confidence_histogram,
    is_at_boundary,
    merge_all_candidates,
    merge_histograms,
    packed_histogram,
    plan_balance,
    ranks_by_uncertainty,
    reads_keys,
)
from models.debiasing import DebiasNoneConfig, aligning_offsets, class_offsets
from models.exact_sums import exact_mean, exact_sum
from models.randomness import Block, uniforms
from models.thresholds import (
    ClassThresholds,
    FinishedThresholds,
    FreeMatchConfig,
    ThresholdSearch,
    advance_thresholds,
    begin_thresholds,
    count_for_thresholds,
    threshold_values,
)
from models.weighting import SoftMatchConfig, moment_sums, softmatch_weights
from storage.prediction_columns import PredictionColumns
from storage.predictions import prediction_record, probability_sums
from storage.store import Store
from tasks.distributions import dense_probs
from tasks.ranked_shard import RankedShard
from tasks.selection_config import SelectionConfig
from tasks.selection_gates import outputs_of
from tasks.selection_rows import Rows, SelectionInputs, sample_keys_of

_POOLED_ROWS = 2**18


class Mapped(Protocol):
    """Run a pass over every group of shards and yield what it gave for each, in any order."""

    def __call__(
        self, one_pass: Any, inputs: SelectionInputs, config: SelectionConfig, /, *more: Any
    ) -> Iterable[Any]:
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
    inputs = inputs.after("debias", calibration=inputs.calibration.debiased_by(offsets))

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
    facts |= _plan_facts(plan, thresholds, config.balance)
    return PlannedSelection(inputs.after("balance"), plan, facts)


def sample_outputs(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    share: float,
) -> list[tuple[str, NDArray[np.float64]]]:
    """Map: the outputs of a share of each shard's rows, as tables (M, 4) by stem."""
    inputs.assert_next("gate")
    found: list[tuple[str, NDArray[np.float64]]] = []
    for stem in stems:
        rows = Rows.read(store, inputs, stem)
        numbers = np.arange(rows.num_samples)[rows.admitted]
        drawn = uniforms(inputs.stream, rows.key_hashes(numbers), block=Block.OUT_OF_DOMAIN)
        found.append((stem, outputs_of(rows.columns).table()[numbers[drawn < share]]))
    return found


def sum_probabilities(
    store: Store, inputs: SelectionInputs, stems: Sequence[str], config: SelectionConfig
) -> tuple[NDArray[np.int64], int]:
    """Map: the exact sum of the calibrated probabilities, (2, C), and the number of rows."""
    inputs.assert_next("debias")
    total, num_rows = np.zeros((2, inputs.num_classes), dtype=np.int64), 0
    for stem in stems:
        record = prediction_record(store, inputs.labeler, inputs.shards[stem].shard)
        sums = probability_sums(record)
        if sums is not None and not inputs.gates.judges(stem):
            # Of the whole distributions, before they were cut.
            total, num_rows = total + sums, num_rows + record["num_samples"]
            continue
        for _, found in Rows.read(store, inputs, stem).admitted_blocks():
            probs = dense_probs(found)
            total, num_rows = total + exact_sum(probs), num_rows + len(probs)
    return total, num_rows


def count_thresholds(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    search: ThresholdSearch,
) -> NDArray[np.int64]:
    """Map: what a threshold rule counts of all admitted rows."""
    inputs.assert_next("threshold")
    return reduce(np.add, (_counted(search, Rows.read(store, inputs, stem)) for stem in stems))


def sum_moments(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    aligning: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Map: the exact sums of aligned confidences and of their squares, of admitted rows."""
    inputs.assert_next("weight")
    total = np.zeros((2, 2), dtype=np.int64)
    for stem in stems:
        for _, found in Rows.read(store, inputs, stem).admitted_blocks():
            total += moment_sums(found, aligning)
    return total


def count_confidences(
    store: Store, inputs: SelectionInputs, stems: Sequence[str], config: SelectionConfig
) -> NDArray[np.integer]:
    """Map: samples that reach the threshold, by class and bin of what ranks them, packed."""
    inputs.assert_next("balance")
    total: NDArray[np.int64] | None = None
    for labels, ranks in _pooled(store, inputs, stems, config.balance):
        counts = confidence_histogram(config.balance, labels, ranks, num_classes=inputs.num_classes)
        total = counts if total is None else merge_histograms(total, counts)
    assert total is not None, "a group holds at least one shard"
    return packed_histogram(total)


def collect_candidates(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: UnfinishedPlan,
) -> Candidates:
    """Map: the rows that a quota's boundary runs through."""
    inputs.assert_next("balance")
    with_keys = reads_keys(plan)
    labels: list[NDArray[np.integer]] = []
    confidences: list[NDArray[np.floating]] = []
    keys: list[NDArray[np.str_]] = []
    for stem in stems:
        shard = _ranked(store, inputs, stem, config.balance)
        near = shard.ranked_where(partial(is_at_boundary, plan))
        labels.append(near.labels)
        confidences.append(near.values)
        if with_keys and len(near.rows):
            columns = PredictionColumns(store, inputs.shards[stem], verify=False)
            keys.append(sample_keys_of(stem, columns.read(["key"])["key"], near.rows))
    return boundary_candidates(
        plan,
        np.concatenate(labels),
        np.concatenate(confidences),
        np.concatenate([*keys, np.zeros(0, np.str_)]) if with_keys else None,
    )


def _pooled(
    store: Store, inputs: SelectionInputs, stems: Sequence[str], balance: BalanceConfig
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.floating]]]:
    """Yield labels and ranks of the rows that reach the threshold, of some shards at a time.

    A histogram has many more cells than a shard has rows, so it is not made for each.
    """
    labels: list[NDArray[np.integer]] = []
    ranks: list[NDArray[np.floating]] = []
    num_rows = 0
    for number, stem in enumerate(stems, start=1):
        ranked = _ranked(store, inputs, stem, balance).ranked
        labels.append(ranked.labels)
        ranks.append(ranked.values)
        num_rows += len(labels[-1])
        if num_rows >= _POOLED_ROWS or number == len(stems):
            yield np.concatenate(labels), np.concatenate(ranks)
            labels, ranks, num_rows = [], [], 0


def _ranked(
    store: Store, inputs: SelectionInputs, stem: str, balance: BalanceConfig
) -> RankedShard:
    """Return a shard's rows, ranked; an earlier pass may have kept them."""
    found = inputs.ranked_before(stem)
    if found is None:
        found = Rows.read(store, inputs, stem).ranked(inputs, balance)
        if inputs.kept is not None:
            inputs.kept.keep(stem, found.arrays())
    return found


def _counted(search: ThresholdSearch, rows: Rows) -> NDArray[np.int64]:
    if not isinstance(search.state, FreeMatchConfig):
        admitted = rows.admitted
        return count_for_thresholds(
            search, rows.labels[admitted], rows.confidences[admitted], _not_asked
        )
    total = np.zeros((2, search.num_classes + 2), dtype=np.int64)
    for block, found in rows.admitted_blocks():
        total += count_for_thresholds(
            search,
            rows.labels[block],
            rows.confidences[block],
            lambda found=found: dense_probs(found),
        )
    return total


def _not_asked() -> NDArray[np.float64]:
    raise AssertionError("only freematch asks for probabilities")


def _mean_probs(
    inputs: SelectionInputs, config: SelectionConfig, mapped: Mapped
) -> tuple[NDArray[np.float64] | None, int]:
    """Return the mean calibrated prediction (C,), where a rule reads it, and the number of rows."""
    is_debiased = not isinstance(config.debias, DebiasNoneConfig)
    if not is_debiased and not isinstance(config.weighting, SoftMatchConfig):
        return None, 0
    total, num_rows = reduce(
        lambda one, other: (one[0] + other[0], one[1] + other[1]),
        mapped(sum_probabilities, inputs, config),
    )
    return exact_mean(total, num_rows), num_rows


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
    plan = plan_balance(
        config.balance,
        histogram.astype(np.int64),  # one group's alone is packed
        labeled_counts=inputs.labeled_counts,
        round_index=inputs.round_index,
    )
    while isinstance(plan, UnfinishedPlan):
        found = mapped(collect_candidates, inputs, config, plan)
        plan = advance_plan(plan, merge_all_candidates(found))
    return plan


def _plan_facts(
    plan: FinishedPlan, thresholds: FinishedThresholds, balance: BalanceConfig
) -> dict[str, Any]:
    """Return from where on each class is kept, by the rule and with its quota, and the quota."""
    values = threshold_values(thresholds)
    learned = np.asarray(values).tolist() if isinstance(thresholds, ClassThresholds) else None
    facts: dict[str, Any] = {} if learned is None else {"learned_thresholds": learned}
    if not isinstance(plan, NoBalancePlan) and not ranks_by_uncertainty(balance):
        facts["class_thresholds"] = plan.thresholds(values).tolist()
    elif learned is not None:
        facts["class_thresholds"] = learned
    if isinstance(plan, NoBalancePlan):
        return facts
    if isinstance(plan, NsBinnedPlan):
        return facts | {"quota": plan.quota}
    if ranks_by_uncertainty(balance):
        facts["class_max_std"] = (1 - plan.last_confidences).tolist()
    quotas = cast("list[int]", plan.quotas.tolist())
    return facts | ({"quota": quotas[0]} if len(set(quotas)) == 1 else {"quotas": quotas})
