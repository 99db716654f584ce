"""Quotas: golden values, exactness, and independence of the order and grouping of shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from models.balancing import (
    BalanceConfig,
    BalanceNoneConfig,
    FinishedPlan,
    NsBinnedConfig,
    NsBinnedPlan,
    TopKConfig,
    TopKPlan,
    TopKTies,
    UnfinishedPlan,
    advance_plan,
    assign_copies,
    boundary_candidates,
    candidates,
    confidence_histogram,
    merge_all_candidates,
    merge_candidates,
    merge_histograms,
    packed_histogram,
    plan_balance,
    randomly_rounded,
    reads_keys,
    resolved_quota,
)
from models.balancing.histograms import confidence_bins
from models.balancing.ns_binned import NS_EDGES
from models.randomness import uniforms


@dataclass(frozen=True)
class Rows:
    labels: NDArray[np.int64]
    confidences: NDArray[np.floating]
    keys: NDArray[np.str_]

    def __getitem__(self, index: NDArray[np.integer]) -> "Rows":
        return Rows(self.labels[index], self.confidences[index], self.keys[index])

    def __len__(self) -> int:
        return len(self.labels)


def rows(classes: Sequence[Sequence[float]], dtype: type[np.floating] = np.float64) -> Rows:
    """Rows of class 0, 1, ... with the given confidences; keys s/000, s/001, ..."""
    labels = [c for c, values in enumerate(classes) for _ in values]
    confidences = [v for values in classes for v in values]
    keys = np.array([f"s/{i:03d}" for i in range(len(labels))], dtype=np.str_)
    return Rows(np.array(labels, dtype=np.int64), np.array(confidences, dtype=dtype), keys)


def finished(config: BalanceConfig, shards: Sequence[Rows], num_classes: int) -> FinishedPlan:
    """All passes over the shards in the order given."""
    histogram = reduce(
        merge_histograms,
        (
            confidence_histogram(config, s.labels, s.confidences, num_classes=num_classes)
            for s in shards
        ),
    )
    plan = plan_balance(config, histogram)
    while isinstance(plan, UnfinishedPlan):
        candidates = reduce(
            merge_candidates,
            [boundary_candidates(plan, s.labels, s.confidences, s.keys) for s in shards],
        )
        plan = advance_plan(plan, candidates)
    return plan


def copies_by_key(
    config: BalanceConfig, shards: Sequence[Rows], num_classes: int, stream: int = 1
) -> dict[str, int]:
    plan = finished(config, shards, num_classes)
    result: dict[str, int] = {}
    for s in shards:
        draws = uniforms(stream, s.keys.tolist())
        copies = assign_copies(plan, s.labels, s.confidences, s.keys, draws)
        assert copies.dtype == np.uint16
        result.update(zip(s.keys.tolist(), copies.tolist(), strict=True))
    return result


# ---------------------------------------------------------------------------------- bins


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_hundredth_lands_in_its_own_bin(dtype: type[np.floating]):
    # 0.29 * 100 is 28.999999999999996, and float32(0.29) is 0.28999999
    values = np.array([i / 100 for i in range(101)], dtype=dtype)
    assert confidence_bins(values, NS_EDGES).tolist() == list(range(101))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_just_below_a_hundredth_is_the_bin_below(dtype: type[np.floating]):
    below = np.nextafter(np.array([0.29, 0.58, 1.0], dtype=dtype), dtype(0))
    assert confidence_bins(below, NS_EDGES).tolist() == [28, 57, 99]


def test_nan_confidences_are_refused():
    for config in (NsBinnedConfig(), TopKConfig(), BalanceNoneConfig()):
        with pytest.raises(ValueError, match=r"1 of 2 confidences lie outside \[0, 1\]"):
            confidence_histogram(config, np.array([0, 0]), np.array([0.5, np.nan]), num_classes=1)


def test_labels_of_another_label_space_are_refused():
    with pytest.raises(ValueError, match="another label space"):
        confidence_histogram(NsBinnedConfig(), np.array([3]), np.array([0.5]), num_classes=3)


def test_histograms_of_different_rules_are_not_added():
    a = confidence_histogram(NsBinnedConfig(), np.array([0]), np.array([0.5]), num_classes=1)
    b = confidence_histogram(TopKConfig(), np.array([0]), np.array([0.5]), num_classes=1)
    with pytest.raises(ValueError, match="different rules"):
        merge_histograms(a, b)


def test_packed_histograms_are_the_same_counts_in_fewer_bytes():
    counts = np.array([[255, 0], [3, 7]])
    packed = packed_histogram(counts)
    assert packed.dtype == np.uint8
    merged = merge_histograms(merge_histograms(packed, packed), packed_histogram(1000 * counts))
    assert merged.dtype == np.int64
    assert merged.tolist() == (1002 * counts).tolist()
    assert packed_histogram(counts[:0]).shape == (0, 2)


# ---------------------------------------------------------------------------------- quota


def test_median_quota_leaves_out_classes_with_none():
    # of 4, 10, 25 the median is 10; with the zeros it would be 4
    assert resolved_quota("median", np.array([0, 4, 10, 25, 0])) == 10
    assert resolved_quota("median", np.array([3, 4])) == 4  # 3.5, halves up
    assert resolved_quota("median", np.array([0, 0])) == 1
    assert resolved_quota(7, np.array([0, 100])) == 7


@pytest.mark.parametrize(
    ("kind", "upsample", "expected"),
    [
        ("ns_binned", True, [2.5, 1.0, 0.4]),
        ("ns_binned", False, [1.0, 1.0, 0.4]),
    ],
)
def test_expected_copies_match_the_golden_values(kind: str, upsample: bool, expected: list[float]):
    # K = 10, n = 4, 10, 25, each class in one bin
    config = TypeAdapter[BalanceConfig](BalanceConfig).validate_python(
        {"kind": kind, "k": 10, "upsample": upsample}
    )
    plan = finished(config, [rows([[0.9] * 4, [0.9] * 10, [0.9] * 25])], 3)
    assert isinstance(plan, NsBinnedPlan)
    assert plan.expected_copies.tolist() == expected
    totals = plan.expected_copies * plan.available
    assert totals.tolist() == ([10, 10, 10] if upsample else [4, 10, 10])


# ---------------------------------------------------------------------------------- ns_binned


def test_the_walk_stops_at_the_first_bin_with_k_and_takes_it_whole():
    # from the top: bin 95 has 2, bin 90 has 3 (5 >= 4: stop), bin 50 is below the cut
    plan = finished(NsBinnedConfig(k=4), [rows([[0.95, 0.955, 0.9, 0.905, 0.909, 0.5]])], 1)
    assert isinstance(plan, NsBinnedPlan)
    assert plan.cut_bins.tolist() == [90]
    assert plan.available.tolist() == [5]
    assert plan.expected_copies.tolist() == [0.8]
    assert plan.thresholds(0.3).tolist() == [0.9]


def test_quota_bigger_than_class_takes_all_of_it_down_to_the_floor():
    plan = finished(NsBinnedConfig(k=100), [rows([[0.9, 0.5, 0.31]])], 1)
    assert isinstance(plan, NsBinnedPlan)
    assert plan.available.tolist() == [3]
    assert plan.thresholds(0.305).tolist() == [0.305]  # a floor off the grid of hundredths


def test_quota_smaller_than_class_thins_uniformly():
    # 4,000 rows above the cut, half of them at .99, half at .95 of one walk: K = 1,000 keeps a
    # quarter of each half. 5 sigma = 5 * sqrt(2000 * .25 * .75) = 97.
    confident = rows([[0.955] * 4000])
    plan_rows = Rows(
        confident.labels,
        np.where(np.arange(4000) % 2, 0.959, 0.951),
        np.array([f"s/{i:05d}" for i in range(4000)]),
    )
    copies = copies_by_key(NsBinnedConfig(k=1000), [plan_rows], 1)
    for parity in (0, 1):
        kept = sum(copies[f"s/{i:05d}"] for i in range(parity, 4000, 2))
        assert abs(kept - 500) < 97


def test_class_with_nothing_stays_empty_and_does_not_disturb():
    plan = finished(NsBinnedConfig(k=2), [rows([[], [0.9, 0.8, 0.7]])], 3)
    assert isinstance(plan, NsBinnedPlan)
    assert plan.counts.tolist() == [0, 3, 0]
    assert plan.expected_copies.tolist() == [0, 1, 0]
    assert plan.cut_bins[1] == 80


def test_max_copies_caps_a_tiny_class_and_says_so():
    plan = finished(NsBinnedConfig(k=1000, max_copies=10), [rows([[0.9], [0.9] * 100])], 2)
    assert isinstance(plan, NsBinnedPlan)
    assert plan.expected_copies.tolist() == [10, 10]  # 1000 / 100 = 10 is no cap
    assert plan.is_capped.tolist() == [True, False]
    copies = copies_by_key(NsBinnedConfig(k=1000, max_copies=10), [rows([[0.9], [0.9] * 3])], 2)
    assert set(copies.values()) == {10}


def test_expected_class_count_is_k_within_five_sigma():
    # classes of 4, 10, 25 at K = 10: variance of a class = n * f * (1 - f) with f the fraction of
    # a copy: 4 * .5 * .5 = 1, 0, 25 * .4 * .6 = 6. Over 2,000 draws 5 sigma of the mean is
    # 5 * sqrt(var / 2000) = .112, 0, .274.
    data = rows([[0.9] * 4, [0.9] * 10, [0.9] * 25])
    plan = finished(NsBinnedConfig(k=10), [data], 3)
    totals = np.zeros(3)
    for stream in range(2000):
        draws = uniforms(stream, data.keys.tolist())
        copies = assign_copies(plan, data.labels, data.confidences, data.keys, draws)
        totals += np.bincount(data.labels, weights=copies, minlength=3)
    means = totals / 2000
    assert abs(means[0] - 10) < 0.112
    assert means[1] == 10
    assert abs(means[2] - 10) < 0.274


# ---------------------------------------------------------------------------------- top_k


def test_top_k_keeps_exactly_the_k_most_confident():
    data = rows([[0.9, 0.5, 0.7, 0.6, 0.8]])
    copies = copies_by_key(TopKConfig(k=3, upsample=False), [data], 1)
    assert copies == {"s/000": 1, "s/001": 0, "s/002": 1, "s/003": 0, "s/004": 1}


def test_top_k_is_exact_within_one_bin_and_breaks_ties_by_key():
    # all lie in the last of 4,096 bins, [0.99975..., 1]; the two last places go to keys a and b
    data = Rows(
        np.zeros(5, dtype=np.int64),
        np.array([0.9999, 0.99995, 0.9999, 0.9999, 0.9998]),
        np.array(["c", "z", "b", "a", "0"]),
    )
    copies = copies_by_key(TopKConfig(k=3, upsample=False), [data], 1)
    assert copies == {"c": 0, "z": 1, "b": 1, "a": 1, "0": 0}
    plan = finished(TopKConfig(k=3), [data], 1)
    assert isinstance(plan, TopKPlan)
    assert plan.last_keys == ("b",)
    assert plan.thresholds(0.3).tolist() == [0.9999]


def test_top_k_duplicates_smaller_classes_up_to_the_cap():
    data = rows([[0.9, 0.8], [0.9] * 6, []])
    plan = finished(TopKConfig(k=5), [data], 3)
    assert isinstance(plan, TopKPlan)
    assert plan.expected_copies.tolist() == [2.5, 1.0, 0.0]
    assert finished_copies(TopKConfig(k=5, upsample=False), data).tolist() == [
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        0,
    ]
    capped = finished(TopKConfig(k=100, max_copies=3), [data], 3)
    assert isinstance(capped, TopKPlan)
    assert capped.expected_copies.tolist() == [3, 3, 0]
    assert capped.is_capped.tolist() == [True, True, False]


def finished_copies(config: BalanceConfig, data: Rows) -> NDArray[np.uint16]:
    plan = finished(config, [data], 3)
    draws = np.zeros(len(data))
    return assign_copies(plan, data.labels, data.confidences, data.keys, draws)


def test_class_of_exactly_k_needs_no_boundary():
    plan = finished(TopKConfig(k=3), [rows([[0.9, 0.8, 0.7]])], 1)
    assert isinstance(plan, TopKPlan)
    assert plan.last_keys == (None,)
    assert plan.expected_copies.tolist() == [1]


def test_confidence_zero_belongs_to_a_class_that_is_kept_whole():
    assert set(
        copies_by_key(TopKConfig(k=5, upsample=False), [rows([[0.0, 0.5]])], 1).values()
    ) == {1}


def planned(config: BalanceConfig, data: Rows, num_classes: int) -> UnfinishedPlan:
    """After pass 1."""
    histogram = confidence_histogram(config, data.labels, data.confidences, num_classes=num_classes)
    plan = plan_balance(config, histogram)
    assert isinstance(plan, UnfinishedPlan)
    return plan


def test_a_shard_missing_from_a_later_pass_is_noticed():
    data = rows([[0.9, 0.9, 0.9]])
    plan = planned(TopKConfig(k=2), data, 1)
    part = data[np.array([0])]
    few = boundary_candidates(plan, part.labels, part.confidences)
    with pytest.raises(ValueError, match="all passes must see the same shards"):
        advance_plan(plan, few)

    ties = advance_plan(plan, boundary_candidates(plan, data.labels, data.confidences))
    assert isinstance(ties, TopKTies)
    few = boundary_candidates(ties, part.labels, part.confidences, part.keys)
    with pytest.raises(ValueError, match="all passes must see the same shards"):
        advance_plan(ties, few)


def test_keys_are_asked_for_only_where_confidences_tie_at_a_boundary():
    data = rows([[0.9, 0.8, 0.7], [0.6, 0.6, 0.5]])  # of neither is one of a pair left out
    plan = planned(TopKConfig(k=2), data, 2)
    found = advance_plan(plan, boundary_candidates(plan, data.labels, data.confidences))
    assert isinstance(found, TopKPlan)
    assert found.last_confidences.tolist() == [0.8, 0.6]
    assert found.last_keys == (None, None)

    data = rows([[0.9, 0.8, 0.7], [0.9, 0.6, 0.6]])
    plan = planned(TopKConfig(k=2), data, 2)
    ties = advance_plan(plan, boundary_candidates(plan, data.labels, data.confidences))
    assert isinstance(ties, TopKTies)
    assert reads_keys(ties)
    assert ties.wanted.tolist() == [0, 1]
    with pytest.raises(ValueError, match="confidences tie at a boundary"):
        boundary_candidates(ties, data.labels, data.confidences)
    found = advance_plan(ties, boundary_candidates(ties, data.labels, data.confidences, data.keys))
    assert isinstance(found, TopKPlan)
    assert found.last_keys == (None, "s/004")


def test_candidates_never_outgrow_the_quota_and_the_one_that_tells_of_a_tie():
    data = rows([[0.99999] * 500])
    plan = planned(TopKConfig(k=7), data, 1)
    candidates = boundary_candidates(plan, data.labels, data.confidences)
    assert len(candidates.labels) == 8
    ties = advance_plan(plan, candidates)
    assert isinstance(ties, TopKTies)
    candidates = boundary_candidates(ties, data.labels, data.confidences, data.keys)
    assert candidates.keys.tolist() == [f"s/{i:03d}" for i in range(7)]


# ---------------------------------------------------------------------------------- none


def test_no_balance_gives_one_copy_of_everything():
    assert set(copies_by_key(BalanceNoneConfig(), [rows([[0.9, 0.1], [0.5]])], 2).values()) == {1}


# ---------------------------------------------------------------------------------- properties

CONFIGS = [
    NsBinnedConfig(k=3),
    NsBinnedConfig(k="median", upsample=False),
    TopKConfig(k=3),
    TopKConfig(k="median"),
    BalanceNoneConfig(),
]


@st.composite
def corpora(draw: st.DrawFn) -> Rows:
    """Up to 40 rows of 3 classes; few distinct confidences, so that ties are common."""
    n = draw(st.integers(1, 40))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    pool = st.sampled_from([0.3, 0.31, 0.5, 0.9, 0.99, 0.9999, 0.99991, 1.0])
    confidences = draw(st.lists(pool, min_size=n, max_size=n))
    keys = draw(st.permutations([f"k{i:02d}" for i in range(n)]))
    return Rows(np.array(labels), np.array(confidences, dtype=np.float32), np.array(keys))


def split(data: Rows, order: Sequence[int], cuts: Sequence[int]) -> list[Rows]:
    """Rows in another order, cut into shards, some of which may be empty."""
    bounds = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    indices = np.array(order, dtype=np.int64)
    return [data[indices[a:b]] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}-{getattr(c, 'k', '')}")
@given(data=st.data())
def test_any_order_and_grouping_of_shards_gives_the_same_copies(
    config: BalanceConfig, data: st.DataObject
):
    corpus = data.draw(corpora())
    order = data.draw(st.permutations(range(len(corpus))))
    cuts = data.draw(st.lists(st.integers(0, 50), max_size=5))
    assert copies_by_key(config, split(corpus, order, cuts), 3) == copies_by_key(
        config, [corpus], 3
    )


@given(data=st.data())
def test_merging_candidates_is_associative_and_commutative(data: st.DataObject):
    corpus = data.draw(corpora())
    order = data.draw(st.permutations(range(len(corpus))))
    config = TopKConfig(k=2)
    histogram = confidence_histogram(config, corpus.labels, corpus.confidences, num_classes=3)
    plan = plan_balance(config, histogram)
    shards = split(corpus, order, [len(corpus) // 3, 2 * len(corpus) // 3])
    while isinstance(plan, UnfinishedPlan):
        a, b, c = (boundary_candidates(plan, s.labels, s.confidences, s.keys) for s in shards)
        left = merge_candidates(merge_candidates(a, b), c)
        right = merge_candidates(c, merge_candidates(b, a))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(candidates, "_SORTED_TOGETHER", data.draw(st.integers(0, 50)))
            together = merge_all_candidates(iter([c, a, b]))
        for found in (merge_candidates(b, c, a), together):
            assert found.keys.tolist() == left.keys.tolist()
            assert found.labels.tolist() == left.labels.tolist()
            assert found.confidences.tolist() == left.confidences.tolist()
        assert left.keys.tolist() == right.keys.tolist()
        assert left.labels.tolist() == right.labels.tolist()
        assert left.confidences.tolist() == right.confidences.tolist()
        plan = advance_plan(plan, left)


@given(data=st.data(), k=st.integers(1, 30))
def test_top_k_agrees_with_a_plain_sort(data: st.DataObject, k: int):
    corpus = data.draw(corpora())
    copies = copies_by_key(TopKConfig(k=k, upsample=False), [corpus], 3)
    for label in range(3):
        ranked = sorted(
            (-float(c), str(key))
            for c, key, own in zip(corpus.confidences, corpus.keys, corpus.labels, strict=True)
            if own == label
        )
        expected = {key for _, key in ranked[:k]}
        assert {key for _, key in ranked if copies[key]} == expected


@given(data=st.data(), k=st.integers(1, 30), upsample=st.booleans())
def test_binned_copies_lie_beside_their_expectation_and_below_the_cap(
    data: st.DataObject, k: int, upsample: bool
):
    corpus = data.draw(corpora())
    config = NsBinnedConfig(k=k, upsample=upsample, max_copies=4)
    plan = finished(config, [corpus], 3)
    assert isinstance(plan, NsBinnedPlan)
    copies = assign_copies(
        plan,
        corpus.labels,
        corpus.confidences,
        corpus.keys,
        uniforms(3, corpus.keys.tolist()),
    )
    expected = plan.expected_copies[corpus.labels]
    is_kept = copies > 0
    assert (np.abs(copies - expected)[is_kept] < 1).all()
    assert copies.max(initial=0) <= (4 if upsample else 1)
    totals = plan.expected_copies * plan.available
    assert (totals <= k + 1e-9).all()


def test_random_rounding_is_exact_at_whole_numbers_and_at_the_fraction():
    expected = np.array([2.0, 2.0, 0.4, 0.4, 0.0])
    draws = np.array([0.0, 0.999, 0.39, 0.4, 0.0])
    assert randomly_rounded(expected, draws).tolist() == [2, 2, 1, 0, 0]
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        randomly_rounded(np.array([1.0]), np.array([1.0]))


@pytest.mark.parametrize("value", [0, -1, "mean", 1.5])
def test_quotas_are_positive_integers_or_median(value: object):
    with pytest.raises(ValidationError):
        NsBinnedConfig.model_validate({"k": value})
