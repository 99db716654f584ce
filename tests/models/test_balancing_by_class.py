"""Quotas that differ by class: CReST, and the cap to the smallest class."""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.balancing import (
    BalanceConfig,
    CapMinConfig,
    CrestConfig,
    NoBalancePlan,
    TopKBoundary,
    TopKConfig,
    TopKPlan,
    UnfinishedPlan,
    advance_plan,
    assign_copies,
    boundary_candidates,
    confidence_histogram,
    merge_candidates,
    merge_histograms,
    plan_balance,
    ranking,
    reads_labeled_counts,
)
from models.balancing.crest import crest_rates

Shard = tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.str_]]


def corpus(counts: Sequence[int]) -> Shard:
    """Rows of each class with confidences from .99 downwards by .001."""
    labels = np.repeat(np.arange(len(counts)), counts)
    confidences = np.concatenate([0.99 - 0.001 * np.arange(n, dtype=np.float64) for n in counts])
    return labels, confidences, np.array([f"s/{i:04d}" for i in range(len(labels))], dtype=np.str_)


def kept(
    config: BalanceConfig,
    shards: Sequence[Shard],
    num_classes: int,
    labeled_counts: Sequence[int] | None = None,
) -> tuple[TopKPlan, set[str]]:
    """The plan and the keys it keeps; no row is duplicated."""
    given_counts = None if labeled_counts is None else np.array(labeled_counts)
    histograms = [confidence_histogram(config, *s[:2], num_classes=num_classes) for s in shards]
    histogram = reduce(merge_histograms, histograms)
    plan = plan_balance(config, histogram, labeled_counts=given_counts)
    while isinstance(plan, UnfinishedPlan):
        candidates = reduce(merge_candidates, [boundary_candidates(plan, *s) for s in shards])
        plan = advance_plan(plan, candidates)
    finished = plan
    assert isinstance(finished, TopKPlan)
    found: set[str] = set()
    for labels, confidences, keys in shards:
        draws = np.full(len(labels), 0.999)
        copies = assign_copies(finished, labels, confidences, keys, draws)
        assert copies.max(initial=0) <= 1
        found |= set(keys[copies > 0].tolist())
    return finished, found


def test_crest_rates_match_the_golden_values():
    # (100/1000)^(1/3), (500/1000)^(1/3), 1: the head the least. USB's form by raw class id would
    # give the same numbers whatever the labels' counts are.
    expected = [0.464159, 0.793701, 1]
    assert crest_rates(np.array([1000, 500, 100]), 1 / 3) == pytest.approx(expected, abs=5e-7)
    shuffled = crest_rates(np.array([100, 1000, 500]), 1 / 3)
    assert shuffled == pytest.approx([1, 0.464159, 0.793701], abs=5e-7)


def test_crest_keeps_everything_of_balanced_labels_and_at_alpha_0():
    assert crest_rates(np.array([7, 7, 7]), 1 / 3).tolist() == [1, 1, 1]
    assert crest_rates(np.array([70, 7, 1]), 0).tolist() == [1, 1, 1]


def test_classes_with_as_many_labels_have_one_rate():
    # Ranks 2 and 3 share 10 labels: the mean of (10/100) and (100/100) is .55
    assert crest_rates(np.array([10, 100, 10]), 1).tolist() == pytest.approx([0.55, 0.1, 0.55])


def test_crest_takes_the_most_confident_share_of_each_class():
    # 10, 10 and 4 pseudo-labels at rates .46, .79, 1: 4.6 -> 5, 7.9 -> 8 and 4
    plan, keys = kept(CrestConfig(), [corpus([10, 10, 4])], 3, [1000, 500, 100])
    assert plan.quotas.tolist() == [5, 8, 4]
    expected = {*range(5), *range(10, 18), *range(20, 24)}
    assert keys == {f"s/{i:04d}" for i in expected}


def test_a_rate_that_rounds_to_nothing_keeps_nothing():
    # 3 pseudo-labels at the rate .1: .3 -> 0
    plan, keys = kept(CrestConfig(alpha=1), [corpus([3, 2])], 2, [100, 10])
    assert plan.quotas.tolist() == [0, 2]
    assert keys == {"s/0003", "s/0004"}


def test_cap_min_cuts_every_class_to_the_smallest():
    # 9, 4 and 6: 4 of each, the most confident; the empty class does not count
    plan, keys = kept(CapMinConfig(floor=1), [corpus([9, 0, 4, 6])], 4)
    assert plan.quotas.tolist() == [4] * 4
    assert keys == {f"s/{i:04d}" for i in (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15, 16)}


def test_cap_min_never_cuts_below_its_floor():
    plan, keys = kept(CapMinConfig(floor=5), [corpus([9, 2])], 2)
    assert plan.quotas.tolist() == [5, 5]
    assert len(keys) == 5 + 2


def test_the_least_uncertain_of_each_class_stay_where_the_rule_says_so():
    # Three of class 0 and two of class 1: two of each. Class 0 loses "b", the most confident but
    # the least sure; equal deviations go by key.
    labels = np.array([0, 0, 0, 1, 1])
    confidences = np.array([0.8, 0.99, 0.7, 0.9, 0.9], np.float32)
    uncertainty = np.array([0.02, 0.04, 0.01, 0.03, 0.03], np.float32)
    keys = np.array(list("abcde"), dtype=np.str_)
    config = CapMinConfig(floor=1, by="uncertainty")
    ranks = ranking(config, confidences, uncertainty)
    assert ranks.dtype == np.float64
    assert ranks == pytest.approx([0.98, 0.96, 0.99, 0.97, 0.97])
    plan, found = kept(config, [(labels, ranks, keys)], 2)
    assert found == {"a", "c", "d", "e"}
    assert 1 - plan.last_confidences == pytest.approx([0.02, 1.0])  # the whole of class 1 stays
    by_confidence = ranking(CapMinConfig(floor=1), confidences, uncertainty)
    assert kept(CapMinConfig(floor=1), [(labels, by_confidence, keys)], 2)[1] == set("abde")


def test_deviations_that_are_closer_than_float32_rank_are_told_apart():
    small = np.array([1e-9, 2e-9, 0.0], np.float32)
    assert np.argsort(-ranking(CapMinConfig(by="uncertainty"), small, small)).tolist() == [2, 0, 1]


def test_ranking_by_uncertainty_refuses_what_is_no_deviation_and_what_was_not_measured():
    config, confidences = CapMinConfig(by="uncertainty"), np.array([0.5, 0.5])
    with pytest.raises(ValueError, match=r"label with labeling\.uncertainty"):
        ranking(config, confidences, None)
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="1 of 2 standard deviations"):
            ranking(config, confidences, np.array([0.1, wrong]))


def test_the_cap_ends_with_its_rounds():
    histogram = confidence_histogram(CapMinConfig(), *corpus([9, 2])[:2], num_classes=2)
    config = CapMinConfig(floor=1, rounds=2)
    plans = [plan_balance(config, histogram, round_index=i) for i in (1, 2, 3)]
    assert [type(plan) for plan in plans] == [TopKBoundary, TopKBoundary, NoBalancePlan]
    forever = plan_balance(CapMinConfig(floor=1), histogram, round_index=99)
    assert isinstance(forever, TopKBoundary)


@pytest.mark.parametrize("config", [CrestConfig(), CapMinConfig(floor=2)], ids=lambda c: c.kind)
@given(data=st.data())
def test_order_and_grouping_of_shards_change_nothing(config: BalanceConfig, data: st.DataObject):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    labels, _, keys = corpus(counts)
    few = data.draw(
        st.lists(st.sampled_from([0.5, 0.75, 0.9]), min_size=len(labels), max_size=len(labels))
    )
    confidences = np.array(few, dtype=np.float64)
    order = np.array(data.draw(st.permutations(range(len(labels)))), dtype=np.int64)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), max_size=3)))
    shards = [(labels[p], confidences[p], keys[p]) for p in np.split(order, cuts)]
    whole = kept(config, [(labels, confidences, keys)], 3, [9, 5, 2])
    assert kept(config, shards, 3, [9, 5, 2])[1] == whole[1]


def test_crest_alone_reads_the_labels_counts_and_refuses_to_do_without():
    assert reads_labeled_counts(CrestConfig())
    assert not reads_labeled_counts(CapMinConfig())
    assert not reads_labeled_counts(TopKConfig())
    shard = corpus([3, 2])
    histogram = confidence_histogram(CrestConfig(), *shard[:2], num_classes=2)
    with pytest.raises(ValueError, match="needs the class counts"):
        plan_balance(CrestConfig(), histogram)
    with pytest.raises(ValueError, match="labelled images of 3 classes, predictions of 2"):
        plan_balance(CrestConfig(), histogram, labeled_counts=np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="no class has a labelled image"):
        plan_balance(CrestConfig(), histogram, labeled_counts=np.array([0, 0]))
