"""Debiasing: golden values, and a planted bias that only a working rule takes out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from models.debiasing import (
    DebiasConfig,
    DebiasNoneConfig,
    DistributionAlignmentConfig,
    LogitAdjustConfig,
    ProgressiveAlignmentConfig,
    apply_offsets,
    class_offsets,
    power_of_round,
    reads_labeled_prior,
)

Z = np.array([[2.0, 1.0, 0.0]])
P_HAT = np.array([0.7, 0.2, 0.1])


def debiased(
    config: DebiasConfig,
    log_probs: NDArray[np.float64],
    mean_probs: NDArray[np.float64],
    counts: list[int] | None = None,
    round_index: int = 1,
) -> NDArray[np.float64]:
    offsets = class_offsets(
        config,
        mean_probs,
        labeled_counts=None if counts is None else np.array(counts),
        round_index=round_index,
    )
    return np.exp(apply_offsets(log_probs, offsets))


def test_alignment_to_uniform_matches_the_golden_values():
    # p / p_hat = (.5/.6, .3/.3, .2/.1) = (.8333, 1, 2), divided by their sum 3.8333
    found = debiased(
        DistributionAlignmentConfig(target="uniform"),
        np.log([[0.5, 0.3, 0.2]]),
        np.array([0.6, 0.3, 0.1]),
    )
    assert found[0] == pytest.approx([0.217391, 0.260870, 0.521739], abs=5e-7)


def test_logit_adjustment_matches_the_golden_values():
    # z - .4 log p_hat = (2.142670, 1.643775, .921034)
    found = debiased(LogitAdjustConfig(tau=0.4), Z, P_HAT)
    assert found[0] == pytest.approx([0.525776, 0.319252, 0.154971], abs=5e-7)


def test_logit_adjustment_of_strength_zero_changes_nothing():
    offsets = class_offsets(
        LogitAdjustConfig(tau=0), np.array([0.7, 0.3, 0.0]), labeled_counts=None, round_index=1
    )
    assert offsets.tolist() == [0, 0, 0]
    # e^2, e, 1 divided by their sum 11.107338
    found = debiased(LogitAdjustConfig(tau=0), Z, P_HAT)
    assert found[0] == pytest.approx([0.665241, 0.244728, 0.090031], abs=5e-7)


def test_logit_adjustment_of_strength_one_is_alignment_to_uniform():
    expected = [0.309126, 0.398024, 0.292850]
    assert debiased(LogitAdjustConfig(tau=1), Z, P_HAT)[0] == pytest.approx(expected, abs=5e-7)
    aligned = debiased(DistributionAlignmentConfig(target="uniform"), Z, P_HAT)
    assert aligned[0] == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (DistributionAlignmentConfig(target="given", prior=(0.7, 0.2, 0.1)), None),
        (DistributionAlignmentConfig(), [70, 20, 10]),
        (ProgressiveAlignmentConfig(), [70, 20, 10]),  # t = 1 in round 1
    ],
)
def test_alignment_to_the_mean_itself_changes_nothing(config, counts):
    found = debiased(config, np.log([[0.1, 0.3, 0.6]]), P_HAT, counts)
    assert found[0] == pytest.approx([0.1, 0.3, 0.6], abs=1e-12)


def test_progressive_alignment_falls_to_t_min_over_the_generations():
    config = ProgressiveAlignmentConfig(t_min=0.5, generations=6)
    powers = [power_of_round(config, r) for r in range(1, 8)]
    assert powers == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5])


def test_progressive_alignment_flattens_the_labelled_prior():
    # Counts (64, 16, 4) at t = .5: square roots (8, 4, 2) / 14. Mean uniform: p of a uniform row
    # becomes the target itself.
    found = debiased(
        ProgressiveAlignmentConfig(t_min=0.5, generations=2),
        np.log([[1 / 3] * 3]),
        np.full(3, 1 / 3),
        [64, 16, 4],
        round_index=2,
    )
    assert found[0] == pytest.approx([8 / 14, 4 / 14, 2 / 14])


def test_a_class_that_was_never_predicted_stays_finite():
    for config in (DistributionAlignmentConfig(target="uniform"), LogitAdjustConfig()):
        found = debiased(config, np.log([[0.7, 0.3, 1e-12]]), np.array([0.7, 0.3, 0.0]))
        assert np.isfinite(found).all()
        assert found.sum() == pytest.approx(1)


@given(st.integers(0, 2**32 - 1))
def test_a_class_is_favoured_the_more_the_rarer_it_was_predicted(seed: int):
    rng = np.random.default_rng(seed)
    mean = rng.dirichlet(np.ones(4))
    for config in (LogitAdjustConfig(), DistributionAlignmentConfig(target="uniform")):
        offsets = class_offsets(config, mean, labeled_counts=None, round_index=1)
        assert (np.diff(offsets[np.argsort(mean)]) <= 0).all()


def kl(marginal: NDArray[np.float64], prior: NDArray[np.float64]) -> float:
    return float((marginal * np.log(marginal / prior)).sum())


@pytest.mark.parametrize(
    "config",
    [
        LogitAdjustConfig(tau=0.4),
        DistributionAlignmentConfig(target="uniform"),
        DistributionAlignmentConfig(),
    ],
)
def test_a_planted_bias_stays_without_debiasing_and_shrinks_with_it(config: DebiasConfig):
    # Balanced truth; the teacher's logits carry a constant lead of class 0 and a lag of class 3.
    # Fails where the mean is taken over the classes too: it is then 1/C and every rule a no-op.
    rng = np.random.default_rng(0)
    truth = np.arange(8000) % 4
    logits = rng.normal(size=(8000, 4)) + 2 * np.eye(4)[truth] + np.array([1.5, 0, 0, -1.5])
    log_probs = apply_offsets(logits, np.zeros(4))
    mean = np.exp(log_probs).mean(axis=0)
    prior = np.full(4, 0.25)

    def marginal(rule: DebiasConfig) -> NDArray[np.float64]:
        labels = debiased(rule, log_probs, mean, [5, 5, 5, 5]).argmax(axis=1)
        return np.bincount(labels, minlength=4) / len(labels)

    plain = marginal(DebiasNoneConfig())
    assert np.array_equal(plain, np.bincount(logits.argmax(axis=1), minlength=4) / 8000)
    assert plain[0] > 0.4
    assert plain[3] < 0.1
    assert kl(marginal(config), prior) < 0.6 * kl(plain, prior)


def test_only_rules_on_the_labelled_prior_read_it():
    kinds = TypeAdapter[DebiasConfig](DebiasConfig)
    reading = {"kind": "distribution_alignment"}, {"kind": "progressive_da"}
    plain = (
        {"kind": "none"},
        {"kind": "logit_adjust"},
        {"kind": "distribution_alignment", "target": "uniform"},
    )
    assert all(reads_labeled_prior(kinds.validate_python(one)) for one in reading)
    assert not any(reads_labeled_prior(kinds.validate_python(one)) for one in plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "given"},
        {"target": "uniform", "prior": (0.5, 0.5)},
        {"target": "given", "prior": (0.5, 0.4)},
        {"target": "given", "prior": (1.5, -0.5)},
    ],
)
def test_contradictory_priors_are_refused(changes):
    with pytest.raises(ValidationError):
        DistributionAlignmentConfig(**changes)


def test_a_prior_of_other_classes_and_missing_labels_are_refused():
    given_prior = DistributionAlignmentConfig(target="given", prior=(0.5, 0.5))
    with pytest.raises(ValueError, match="2 shares, the predictions 3 classes"):
        class_offsets(given_prior, P_HAT, labeled_counts=None, round_index=1)
    with pytest.raises(ValueError, match="no labelled images"):
        class_offsets(DistributionAlignmentConfig(), P_HAT, labeled_counts=None, round_index=1)
