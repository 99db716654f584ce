"""Weights of pseudo-labels: golden values, and order of shards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.calibration import apply_temperature
from models.debiasing import aligning_offsets
from models.weighting import (
    AgreementWeightConfig,
    ConfidenceWeightConfig,
    SoftMatchWeights,
    WeightNoneConfig,
    moment_sums,
    softmatch_weights,
    weights_of,
)
from models.weighting.softmatch import aligned_confidences, truncated_gaussian


def unread() -> NDArray[np.float64]:
    raise AssertionError("this rule reads no probabilities")


def learned(shards: list[NDArray[np.float64]], offsets: NDArray[np.float64]) -> SoftMatchWeights:
    sums = [moment_sums(shard, offsets) for shard in shards]
    num_rows = sum(map(len, shards))
    return softmatch_weights(sum(sums[1:], start=sums[0]), num_rows, offsets=offsets, n=2)


def test_softmatch_matches_the_golden_values():
    # Below the mean of .8: exp(-.01 / (2 * .01 / 4)) = exp(-2) at .7, exp(-8) at .6. The variant
    # that forgets the truncation gives .135 at .9, too; the one that divides by n, .607 at .7.
    found = truncated_gaussian(np.array([0.9, 0.8, 0.7, 0.6]), mean=0.8, variance=0.01, n=2)
    assert found == pytest.approx([1, 1, 0.135335, 0.000335], abs=5e-7)


def test_agreement_weighs_the_share_of_votes():
    agreement = np.array([1.0, 0.5], np.float32)
    found = weights_of(
        AgreementWeightConfig(), np.array([0.3, 0.9], np.float32), unread, agreement=agreement
    )
    assert found.tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="one prediction was made of each image"):
        weights_of(AgreementWeightConfig(), np.array([0.3], np.float32), unread)


def test_mean_and_variance_are_of_all_rows_of_all_shards():
    # Confidences .9, .7 and .5 without alignment: mean .7, variance (.04 + 0 + .04) / 3 = .026667
    shards = [np.log([[0.9, 0.1], [0.7, 0.3]]), np.log([[0.5, 0.5]])]
    found = learned(shards, np.zeros(2))
    assert found.mean == pytest.approx(0.7, abs=1e-12)
    assert found.variance == pytest.approx(0.08 / 3, abs=1e-12)
    # .5: exp(-.04 / (2 * .026667 / 4)) = exp(-3)
    weights = weights_of(found, np.zeros(3, np.float32), lambda: np.concatenate(shards))
    assert weights.tolist() == pytest.approx([1, 1, np.exp(-3)], abs=1e-6)
    assert weights.dtype == np.float32


def test_alignment_lowers_the_weight_of_the_favoured_class():
    # p = (.6, .4) and (.4, .6), mean (.75, .25): p / mean = (.8, 1.6) -> .667 and (.533, 2.4)
    # -> .818. Without alignment both weigh the same.
    log_probs = np.log([[0.6, 0.4], [0.4, 0.6]])
    offsets = aligning_offsets(np.full(2, 0.5), np.array([0.75, 0.25]))
    assert aligned_confidences(log_probs, offsets) == pytest.approx([2 / 3, 9 / 11])
    weights = learned([log_probs], offsets).of(log_probs)
    assert weights[1] == 1 > weights[0]


def test_equal_confidences_all_weigh_one():
    log_probs = np.log([[0.75, 0.25]] * 4)
    weights = learned([log_probs], np.zeros(2)).of(log_probs)
    assert weights.tolist() == [1] * 4


@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 30), max_size=4))
def test_order_and_grouping_of_shards_change_no_bit(n: int, seed: int, cuts: list[int]):
    rng = np.random.default_rng(seed)
    log_probs = apply_temperature(rng.normal(size=(n, 3)), 1.0)
    parts = np.split(rng.permutation(n), sorted(min(cut, n) for cut in cuts))
    found = learned([log_probs[part] for part in parts], np.zeros(3))
    whole = learned([log_probs], np.zeros(3))
    assert (found.mean, found.variance) == (whole.mean, whole.variance)


@given(st.integers(0, 2**32 - 1))
def test_more_confidence_never_weighs_less(seed: int):
    rng = np.random.default_rng(seed)
    log_probs = apply_temperature(rng.normal(size=(20, 3)), 1.0)
    found = learned([log_probs], np.zeros(3))
    order = np.argsort(log_probs.max(axis=1))
    weights = found.of(log_probs)[order]
    assert (np.diff(weights) >= 0).all()
    assert weights[-1] == 1


def test_the_plain_rules_read_no_probabilities():
    confidences = np.array([0.25, 1.0], np.float32)
    assert weights_of(WeightNoneConfig(), confidences, unread).tolist() == [1, 1]
    assert weights_of(ConfidenceWeightConfig(), confidences, unread).tolist() == [0.25, 1]
