"""Vector scaling: a weight and a bias for each class, so that each class's confidence is right."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.calibration import apply_temperature, fit_temperature, platt_smoothing

_MAX_STEPS = 100
_ENOUGH = 1e-10  # of the Newton decrement: float64 can do little better


@dataclass(frozen=True)
class VectorScaling:
    """What a class's log-probability becomes: weight * log p + bias, then normalised.

    Attributes:
        weights: (C,).
        biases: (C,), sum 0.
    """

    weights: NDArray[np.float64]
    biases: NDArray[np.float64]

    def apply(self, log_probs: NDArray[np.floating]) -> NDArray[np.float64]:
        """Log-probabilities (N, C) calibrated, (N, C) float64; the largest class may change.

        Raises: ValueError unless all C classes are there.
        """
        values = np.asarray(log_probs, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.weights):
            raise ValueError(
                f"log_probs of shape {values.shape} for vector scaling of {len(self.weights)} "
                "classes: it needs the log-probability of every class; use "
                "calibration=temperature where not all are stored"
            )
        return apply_temperature(values * self.weights + self.biases, 1.0)


def fit_vector_scaling(
    log_probs: NDArray[np.floating], labels: NDArray[np.integer]
) -> VectorScaling:
    """Fit weights and biases to a labelled dev split by Newton's method.

    The negative log-likelihood of the labels (smoothed as for the temperature) gets a Gaussian
    prior of variance 1 on each bias and on each weight around 1 / T: 2 C numbers fitted to a few
    images per class would else follow their noise. The loss is convex with one minimum, so the
    result depends on nothing but the data. On log-probabilities, not logits, so that what views
    and ensembles average can be calibrated as well.

    Args:
        log_probs: (N, C), finite, of all classes.
        labels: (N,) class ids in [0, C).
    Raises: ValueError as `fit_temperature`.
    Source: Guo et al. 2017, section 4.2; on log-probabilities: Kull et al. 2019 (the diagonal form
        of Dirichlet calibration).
    """
    smoothing = platt_smoothing(len(labels))
    inverse = 1 / fit_temperature(log_probs, labels, smoothing=smoothing)
    values = apply_temperature(log_probs, 1.0)
    num_classes = values.shape[1]
    targets = np.full(values.shape, smoothing / (num_classes - 1))
    targets[np.arange(len(values)), labels.astype(np.int64)] = 1 - smoothing
    center = np.concatenate([np.full(num_classes, inverse), np.zeros(num_classes)])

    def loss(point: NDArray[np.float64]) -> float:
        scaled = _scaled(values, point)
        return float(-(targets * scaled).sum() + 0.5 * ((point - center) ** 2).sum())

    point = center
    for _ in range(_MAX_STEPS):
        gradient, hessian = _derivatives(values, targets, point, center)
        step = np.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        if decrement < _ENOUGH:
            break
        length, current = 1.0, loss(point)
        while loss(point - length * step) > current - 0.25 * length * decrement and length > 1e-6:
            length /= 2
        point = point - length * step
    biases = point[num_classes:]
    return VectorScaling(point[:num_classes], biases - biases.mean())


def _scaled(values: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    num_classes = values.shape[1]
    return apply_temperature(values * point[:num_classes] + point[num_classes:], 1.0)


def _derivatives(
    values: NDArray[np.float64],
    targets: NDArray[np.float64],
    point: NDArray[np.float64],
    center: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gradient (2C,) and Hessian (2C, 2C) of the loss."""
    probs = np.exp(_scaled(values, point))
    error = probs - targets
    gradient = np.concatenate([(error * values).sum(axis=0), error.sum(axis=0)]) + point - center
    weighted = probs * values
    both = np.concatenate([weighted, probs], axis=1)  # (N, 2C)
    hessian = -(both.T @ both)
    mixed = np.diag(weighted.sum(axis=0))
    hessian += np.block(
        [[np.diag((weighted * values).sum(axis=0)), mixed], [mixed, np.diag(probs.sum(axis=0))]]
    )
    return gradient, hessian + np.eye(len(hessian))
