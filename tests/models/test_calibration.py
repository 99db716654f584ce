"""Temperature scaling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.calibration import (
    TEMPERATURE_RANGE,
    apply_temperature,
    fit_temperature,
    platt_smoothing,
)


def log_probs_and_labels(true_temperature: float, n: int = 20_000):
    """Logits z with labels drawn from softmax(z / T)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, 5)) * 3
    probs = np.exp(apply_temperature(logits, true_temperature))
    labels = (rng.random((n, 1)) > probs.cumsum(axis=1)).sum(axis=1)
    return apply_temperature(logits, 1.0), np.minimum(labels, 4)


def test_temperature_is_a_power_of_the_probabilities():
    # softmax((2, 1, 0) / 0.5) and norm(p^2) are both (.866813, .117310, .015876)
    expected = [0.866813, 0.117310, 0.015876]
    logits = np.array([[2.0, 1.0, 0.0]])
    assert np.exp(apply_temperature(logits, 0.5))[0] == pytest.approx(expected, abs=5e-7)
    log_probs = apply_temperature(logits, 1.0)
    assert np.exp(apply_temperature(log_probs, 0.5))[0] == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.5, [0.657895, 0.236842, 0.105263]), (2.0, [0.415446, 0.321803, 0.262751])],
)
def test_sharpening_matches_the_golden_values(temperature: float, expected: list[float]):
    log_probs = np.log([[0.5, 0.3, 0.2]])
    assert np.exp(apply_temperature(log_probs, temperature))[0] == pytest.approx(expected, abs=5e-7)


def test_binary_temperature_has_a_closed_form():
    # Logits (2, 0), right in 3 of 4: sigmoid(2 / T) = 3/4, so T = 2 / ln 3 = 1.8204784532536746
    log_probs = np.tile([[2.0, 0.0]], (4, 1))
    assert fit_temperature(log_probs, np.array([0, 0, 0, 1])) == pytest.approx(
        1.8204784532536746, rel=1e-12
    )


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_fit_finds_the_temperature_that_made_the_labels(true_temperature: float):
    log_probs, labels = log_probs_and_labels(true_temperature)
    assert fit_temperature(log_probs, labels) == pytest.approx(true_temperature, rel=0.05)


def test_fit_beats_its_neighbours_in_likelihood():
    log_probs, labels = log_probs_and_labels(2.0, n=500)
    best = fit_temperature(log_probs, labels)

    def loss(temperature: float) -> float:
        scaled = apply_temperature(log_probs, temperature)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01))


def test_all_correct_ends_at_the_lower_bound_and_all_wrong_at_the_upper():
    log_probs = np.log([[0.6, 0.4], [0.3, 0.7]])
    assert fit_temperature(log_probs, np.array([0, 1])) == 0.05
    assert fit_temperature(log_probs, np.array([1, 0])) == 20.0


def test_fit_does_not_depend_on_the_constant_of_logits():
    log_probs, labels = log_probs_and_labels(2.0, n=200)
    shifted = log_probs + np.arange(200)[:, None]
    assert fit_temperature(shifted, labels) == pytest.approx(
        fit_temperature(log_probs, labels), rel=1e-9
    )


@given(st.floats(0.05, 20), st.integers(0, 2**32 - 1))
def test_temperature_never_changes_the_predicted_class(temperature: float, seed: int):
    log_probs = np.random.default_rng(seed).normal(size=(7, 4))
    scaled = apply_temperature(log_probs, temperature)
    assert (scaled.argmax(axis=1) == log_probs.argmax(axis=1)).all()
    assert np.exp(scaled).sum(axis=1) == pytest.approx(np.ones(7))


@pytest.mark.parametrize(
    ("log_probs", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "must not be empty"),
        (np.array([[np.nan, 0.0]]), np.array([0]), "NaN"),
        (np.zeros((1, 2)), np.array([2]), r"must be in \[0, 2\)"),
        (np.zeros((2, 2)), np.array([0]), "need"),
    ],
)
def test_unusable_dev_predictions_are_refused(
    log_probs: np.ndarray, labels: np.ndarray, message: str
):
    with pytest.raises(ValueError, match=message):
        fit_temperature(log_probs, labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_only_positive_temperatures_apply(temperature: float):
    with pytest.raises(ValueError, match="positive and finite"):
        apply_temperature(np.zeros((1, 2)), temperature)


def test_platt_smoothing_keeps_the_temperature_of_a_split_without_errors_finite() -> None:
    # Two classes, logits (m, 0), always right: softmax(m / T) must be 1 - 1 / (N + 2) = 0.99 at
    # N = 98, so m / T = ln 99 and T = 3 / ln 99 = 0.652867.
    log_probs = np.tile([3.0, 0.0], (98, 1))
    labels = np.zeros(98, dtype=np.int64)

    assert fit_temperature(log_probs, labels) == TEMPERATURE_RANGE[0]
    smoothed = fit_temperature(log_probs, labels, smoothing=platt_smoothing(98))
    assert smoothed == pytest.approx(0.652867, abs=1e-6)
