"""Vector scaling."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models.calibration import apply_temperature, fit_temperature, platt_smoothing
from models.calibration_vector import VectorScaling, fit_vector_scaling


def biased_predictions(n: int) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Labels drawn from softmax(z); predictions of softmax(2 z + (1, 0, -1))."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(n, 3)) * 1.5
    probs = np.exp(apply_temperature(logits, 1.0))
    labels = (rng.random((n, 1)) > probs.cumsum(axis=1)).sum(axis=1)
    return apply_temperature(2 * logits + np.array([1, 0, -1]), 1.0), np.minimum(labels, 2)


def nll(log_probs: NDArray[np.float64], labels: NDArray[np.integer]) -> float:
    return -float(log_probs[np.arange(len(labels)), labels].mean())


def test_the_fit_undoes_a_planted_scale_and_bias():
    # log p = 2 z + b + const, so that z = (log p - b) / 2 + const: weights .5, biases -b / 2.
    log_probs, labels = biased_predictions(20_000)
    found = fit_vector_scaling(log_probs, labels)
    assert found.weights == pytest.approx([0.5] * 3, abs=0.05)
    assert found.biases == pytest.approx([-0.5, 0, 0.5], abs=0.05)


def test_class_means_of_calibrated_predictions_are_the_labels_shares():
    # At the minimum the gradient in the biases is 0: mean p_c = share of label c (up to the prior,
    # whose pull is of the order 1 / N). A temperature, whatever it is, cannot do this.
    log_probs, labels = biased_predictions(3000)
    shares = np.bincount(labels, minlength=3) / 3000
    found = fit_vector_scaling(log_probs, labels).apply(log_probs)
    assert np.exp(found).mean(axis=0) == pytest.approx(shares, abs=1e-3)
    scaled = apply_temperature(log_probs, fit_temperature(log_probs, labels))
    assert abs(np.exp(scaled).mean(axis=0) - shares).max() > 0.05
    assert nll(found, labels) < nll(scaled, labels) - 0.01


def test_no_neighbour_has_a_smaller_loss():
    # Fails for a gradient without the prior, or a Hessian that is wrong enough to stop early.
    log_probs, labels = biased_predictions(60)
    smoothing = platt_smoothing(60)
    center = 1 / fit_temperature(log_probs, labels, smoothing=smoothing)
    targets = np.full((60, 3), smoothing / 2)
    targets[np.arange(60), labels] = 1 - smoothing
    found = fit_vector_scaling(log_probs, labels)

    def loss(weights: NDArray[np.float64], biases: NDArray[np.float64]) -> float:
        scaled = VectorScaling(weights, biases).apply(log_probs)
        prior = ((weights - center) ** 2).sum() + (biases**2).sum()
        return float(-(targets * scaled).sum() + prior / 2)

    best = loss(found.weights, found.biases)
    for c in range(3):
        for step in (-1e-3, 1e-3):
            moved = step * np.eye(3)[c]
            assert loss(found.weights + moved, found.biases) > best
            assert loss(found.weights, found.biases + moved) > best


def test_few_labels_stay_near_the_temperature():
    # One label a class cannot carry two numbers a class: without the prior weights run to 10s.
    log_probs = np.log([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    labels = np.arange(3)
    inverse = 1 / fit_temperature(log_probs, labels, smoothing=platt_smoothing(3))
    found = fit_vector_scaling(log_probs, labels)
    assert found.weights == pytest.approx([inverse] * 3, abs=0.5)
    assert found.biases == pytest.approx([0] * 3, abs=0.5)


def test_scaling_of_one_weight_and_no_bias_is_a_temperature():
    log_probs = np.log([[0.5, 0.3, 0.2]])
    # Sharpening at T = .5, as in the tests of the temperature
    found = VectorScaling(np.full(3, 2.0), np.zeros(3)).apply(log_probs)
    assert np.exp(found)[0] == pytest.approx([0.657895, 0.236842, 0.105263], abs=5e-7)


def test_the_constant_of_logits_and_the_order_of_samples_change_nothing():
    log_probs, labels = biased_predictions(200)
    first = fit_vector_scaling(log_probs, labels)
    order = np.random.default_rng(0).permutation(200)
    for other in (
        fit_vector_scaling(log_probs + np.arange(200)[:, None], labels),
        fit_vector_scaling(log_probs[order], labels[order]),
    ):
        assert other.weights == pytest.approx(first.weights, rel=1e-6)
        assert other.biases == pytest.approx(first.biases, abs=1e-6)


def test_predictions_that_lack_classes_are_refused():
    scaling = VectorScaling(np.ones(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"\(5, 2\) for vector scaling of 3.*temperature"):
        scaling.apply(np.zeros((5, 2)))


def test_unusable_dev_predictions_are_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        fit_vector_scaling(np.zeros((0, 3)), np.zeros(0, dtype=int))
