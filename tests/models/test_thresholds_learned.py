"""Thresholds learned from the corpus: golden values, exactness, and order of shards."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from models.thresholds import (
    ClassAdaptiveFlexConfig,
    ClassThresholds,
    FixedThresholdConfig,
    FreeMatchConfig,
    HistogramValleyConfig,
    PercentileThresholdConfig,
    PerClassQuantileConfig,
    ThresholdConfig,
    ThresholdSearch,
    advance_thresholds,
    begin_thresholds,
    count_for_thresholds,
    kept_fraction,
    reaches_thresholds,
    threshold_values,
)
from models.thresholds.flex import mapped
from models.thresholds.freematch import scaled_by_class

Rows = tuple[NDArray[np.integer], NDArray[np.float32]]


def rows(labels: Sequence[int], confidences: Sequence[float]) -> Rows:
    return np.array(labels, dtype=np.int64), np.array(confidences, dtype=np.float32)


def probs_of(shard: Rows, num_classes: int) -> NDArray[np.float64]:
    """The rest is shared by the other classes."""
    labels, confidences = shard
    exact = confidences.astype(np.float64)
    probs = np.repeat((1 - exact)[:, None] / max(num_classes - 1, 1), num_classes, axis=1)
    probs[np.arange(len(labels)), labels] = exact
    return probs


def learned(
    config: ThresholdConfig, shards: Sequence[Rows], *, num_classes: int, round_index: int = 1
) -> ClassThresholds:
    """All passes over the shards in the order given."""
    found = begin_thresholds(config, num_classes=num_classes, round_index=round_index)
    while isinstance(found, ThresholdSearch):
        counts = [
            count_for_thresholds(found, *shard, lambda shard=shard: probs_of(shard, num_classes))
            for shard in shards
        ]
        found = advance_thresholds(found, sum(counts[1:], start=counts[0]))
    assert isinstance(found, ClassThresholds)
    return found


TENTHS = rows([0, 1] * 5, [i / 10 for i in range(1, 11)])


@pytest.mark.parametrize(
    ("round_index", "kept", "threshold"),
    [(1, 2, 0.82), (2, 4, 0.64), (3, 6, 0.46), (4, 8, 0.28), (5, 10, 0.10), (6, 10, 0.10)],
)
def test_curriculum_percentiles_match_the_golden_values(
    round_index: int, kept: int, threshold: float
):
    # Scores .1, .2 ... 1.0; the 80th percentile lies .2 of the way from .8 to .9: .82
    config = PercentileThresholdConfig()
    found = learned(config, [TENTHS], num_classes=2, round_index=round_index)
    assert found.values == pytest.approx([threshold] * 2, abs=1e-7)
    assert found.are_reached(*TENTHS).sum() == kept


def test_a_confident_teacher_is_still_cut_at_the_percentile():
    # 1,000 confidences within 2**-14 below 1, all in the last of 4,096 equal bins: a histogram of
    # those would keep all of them (or none), the search keeps exactly 200.
    values = np.float32(1) - np.arange(1000, dtype=np.float32) * np.float32(2**-24)
    shard = np.zeros(1000, np.int64), values
    found = learned(PercentileThresholdConfig(), [shard], num_classes=1)
    assert found.are_reached(*shard).sum() == 200


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    st.integers(1, 5),
    st.sampled_from([5, 20, 33]),
)
def test_percentiles_are_numpys(values: list[float], round_index: int, step: int):
    shard = rows([0] * len(values), values)
    config = PercentileThresholdConfig(step=step)
    found = learned(config, [shard], num_classes=1, round_index=round_index)
    percent = 100 - min(100, step * round_index)
    expected = np.percentile(np.array(values, np.float32).astype(np.float64), percent)
    assert found.values[0] == pytest.approx(float(expected), rel=1e-12, abs=1e-45)


@given(st.data())
def test_class_quantiles_are_the_percentiles_of_each_class_alone(data: st.DataObject):
    n = data.draw(st.integers(1, 40))
    labels = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    values = data.draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n))
    shard = rows(labels, values)
    found = learned(PerClassQuantileConfig(keep_fraction=0.3), [shard], num_classes=3)
    for label in range(3):
        own = np.array(values, np.float32)[np.array(labels) == label].astype(np.float64)
        expected = float(np.percentile(own, 70)) if len(own) else 0.0
        assert found.values[label] == pytest.approx(expected, rel=1e-12, abs=1e-45)


def test_fractions_are_taken_as_written():
    # .2 of 5 + 1 rows: (1 - .2) * 5 = 4 exactly, so the two best stay; with the float64 next to
    # .2 the quantile would lie a hair off the fifth value.
    shard = rows([0] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    found = learned(PerClassQuantileConfig(keep_fraction=0.2), [shard], num_classes=1)
    assert found.values.tolist() == [float(np.float32(0.5))]
    assert found.are_reached(*shard).sum() == 2


def test_a_class_without_predictions_disturbs_no_quantile():
    shard = rows([1, 1, 1], [0.5, 0.7, 0.9])
    found = learned(PerClassQuantileConfig(keep_fraction=0.5), [shard], num_classes=3)
    assert found.values == pytest.approx([0, 0.7, 0])


def test_flex_maps_learning_effects_as_the_golden_values_do():
    # .95 * .5 / 1.5 = .316667
    assert mapped(np.array([0, 0.5, 1]), 0.95) == pytest.approx([0, 0.316667, 0.95], abs=5e-7)


def test_flex_lowers_the_threshold_of_classes_that_reach_it_seldom():
    # Above .95: 4 of class 0, 2 of class 1, none of class 2; 3 rows are not above it. The largest
    # count is 4 >= 3, so beta = (1, .5, 0).
    shard = rows([0] * 4 + [1] * 2 + [0, 1, 2], [0.99] * 6 + [0.95, 0.5, 0.9])
    found = learned(ClassAdaptiveFlexConfig(), [shard], num_classes=3)
    assert found.values == pytest.approx([0.95, 0.316667, 0], abs=5e-7)


def test_flex_warms_up_while_most_rows_are_below_the_threshold():
    # 1 above of class 0, 4 others: beta = 1 / 4, tau = .95 * .25 / 1.75. Without warm-up: .95
    shard = rows([0, 0, 1, 1, 2], [0.99, 0.5, 0.5, 0.5, 0.5])
    found = learned(ClassAdaptiveFlexConfig(), [shard], num_classes=3)
    assert found.values == pytest.approx([0.95 * 0.25 / 1.75, 0, 0])


def test_freematch_scales_as_the_golden_values_do():
    found = scaled_by_class(0.8, np.array([0.5, 0.3, 0.2]))
    assert found == pytest.approx([0.8, 0.48, 0.32])


def test_freematch_takes_means_over_all_rows():
    # Classes 0, 0, 1 at .9, .7, .8: mean confidence .8; mean probabilities (.9 + .7 + .2) / 3 = .6
    # and .4. The mean of the two shards' means would be .825.
    shards = [rows([0], [0.9]), rows([0, 1], [0.7, 0.8])]
    found = learned(FreeMatchConfig(), shards, num_classes=2)
    assert found.values == pytest.approx([0.8, 0.8 * 0.4 / 0.6], abs=1e-7)


# In 10 bins of [.5, 1] the counts are 3 2 1 2 1 2 1 1 3 4: .60 is the first edge with one score.
VALLEY = [0.51, 0.52, 0.53, 0.56, 0.56, 0.62, 0.66, 0.66, 0.72, 0.77]
VALLEY += [0.77, 0.81, 0.86, 0.91, 0.92, 0.93, 0.96, 0.97, 0.98, 0.99]


@pytest.mark.parametrize(("bins", "threshold"), [(10, 0.60), (20, 0.575)])
def test_valleys_match_the_golden_values(bins: int, threshold: float):
    # The last-minimum variant would give .85 with 10 bins.
    config = HistogramValleyConfig(bins=bins, min_per_bin=0)
    found = learned(config, [rows([0] * 20, VALLEY)], num_classes=1)
    assert found.values.tolist() == [float(np.float32(threshold))]


def test_a_confidence_written_as_the_valleys_edge_is_kept():
    config = HistogramValleyConfig(bins=10, min_per_bin=0)
    found = learned(config, [rows([0] * 20, VALLEY)], num_classes=1)
    reached = found.are_reached(*rows([0, 0], [0.6, 0.599999]))
    assert reached.tolist() == [True, False]


def test_a_small_class_takes_the_valley_of_all():
    # Bins [.5, .75) and [.75, 1]. Class 0: 40 and 60 rows; class 1: 3 and 1, whose own valley is
    # the second bin. Without the guard class 1 would be cut at .75.
    shard = rows([0] * 100 + [1] * 4, [0.6] * 40 + [0.9] * 60 + [0.6] * 3 + [0.9])
    config = HistogramValleyConfig(bins=2, scope="per_class", min_per_bin=20)
    assert learned(config, [shard], num_classes=2).values.tolist() == [0.5, 0.5]
    unguarded = config.model_copy(update={"min_per_bin": 1})
    assert learned(unguarded, [shard], num_classes=2).values.tolist() == [0.5, 0.75]


def test_one_is_in_the_last_bin_and_nothing_below_low_counts():
    shard = rows([0] * 5, [1.0, 1.0, 0.9, 0.6, 0.2])
    config = HistogramValleyConfig(bins=2, min_per_bin=0)
    search = begin_thresholds(config, num_classes=1, round_index=1)
    assert isinstance(search, ThresholdSearch)
    counts = count_for_thresholds(search, *shard, lambda: probs_of(shard, 2))
    assert counts.tolist() == [[1, 3]]


def test_too_few_predictions_for_any_valley_are_refused():
    with pytest.raises(ValueError, match=r"20 predictions reach 0.5, 1.0 for each of 20 bins"):
        learned(HistogramValleyConfig(), [rows([0] * 20, VALLEY)], num_classes=1)


RULES = [
    PercentileThresholdConfig(),
    PerClassQuantileConfig(keep_fraction=0.4),
    ClassAdaptiveFlexConfig(confidence=0.6),
    FreeMatchConfig(),
    HistogramValleyConfig(bins=5, min_per_bin=0, scope="per_class"),
]


@pytest.mark.parametrize("config", RULES, ids=lambda c: c.kind)
@given(data=st.data())
def test_order_and_grouping_of_shards_change_no_bit(config: ThresholdConfig, data: st.DataObject):
    n = data.draw(st.integers(1, 40))
    labels = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    values = data.draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n))
    confidences = np.array(values, dtype=np.float32)
    order = np.array(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    parts = [(labels[part], confidences[part]) for part in np.split(order, cuts)]
    whole = learned(config, [(labels, confidences)], num_classes=3)
    assert np.array_equal(learned(config, parts, num_classes=3).values, whole.values)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(1, 4))
def test_a_later_round_never_drops_a_row(values: list[float], round_index: int):
    shard = rows([0] * len(values), values)
    config = PercentileThresholdConfig()
    early, late = (
        learned(config, [shard], num_classes=1, round_index=r).are_reached(*shard)
        for r in (round_index, round_index + 1)
    )
    assert not (early & ~late).any()


def test_confidences_of_another_precision_are_refused():
    shard = np.array([0]), np.array([0.5])
    search = begin_thresholds(PercentileThresholdConfig(), num_classes=1, round_index=1)
    assert isinstance(search, ThresholdSearch)
    with pytest.raises(ValueError, match="float64: must be float32"):
        count_for_thresholds(search, *shard, lambda: np.ones((1, 1)))  # pyright: ignore[reportArgumentType]


def test_shares_of_the_curriculum_end_at_everything():
    config = PercentileThresholdConfig(step=30)
    kept = [kept_fraction(config, r) for r in (1, 3, 4, 9)]
    assert kept == [Fraction(3, 10), Fraction(9, 10), 1, 1]


def test_a_threshold_without_kind_is_fixed_and_others_are_told_apart():
    adapter = TypeAdapter[ThresholdConfig](ThresholdConfig)
    assert adapter.validate_python({"confidence": 0.5}) == FixedThresholdConfig(confidence=0.5)
    assert adapter.validate_python({"kind": "percentile"}) == PercentileThresholdConfig()
    with pytest.raises(ValidationError, match="confidence"):
        adapter.validate_python({"kind": "percentile", "confidence": 0.5})
    with pytest.raises(ValidationError, match="'fixed', 'percentile'"):
        adapter.validate_python({"kind": "unknown"})


def test_a_fixed_threshold_needs_no_pass_and_is_rounded_to_the_confidences():
    fixed = FixedThresholdConfig(confidence=0.7)
    found = begin_thresholds(fixed, num_classes=2, round_index=1)
    assert found is fixed
    reached = reaches_thresholds(fixed, *rows([0, 1], [0.7, 0.69]))
    assert reached.tolist() == [True, False]
    assert threshold_values(fixed) == 0.7
