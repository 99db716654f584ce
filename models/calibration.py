"""Temperature scaling: confidences that mean probabilities."""

import math

import numpy as np
from numpy.typing import NDArray

TEMPERATURE_RANGE = (0.05, 20.0)

_BISECTIONS = 60  # the bracket of 1/T, 20 wide, ends below 2e-17: float64 can do no better


def platt_smoothing(num_samples: int) -> float:
    """How much of a label's probability a split of this size cannot vouch for: 1 / (N + 2).

    Without it, a dev split without errors asks for infinite confidence.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", section 2.2.
    """
    return 1 / (num_samples + 2)


def fit_temperature(
    log_probs: NDArray[np.floating], labels: NDArray[np.integer], *, smoothing: float = 0.0
) -> float:
    """The temperature that minimises the negative log-likelihood of a labelled dev split.

    The likelihood is convex in 1/T, so bisection of its derivative finds the one minimum; the
    result depends on nothing but the data. Where the minimum lies outside [0.05, 20] the nearer
    end is returned: 0.05 if every label is the argmax (the likelihood then rises without end), 20
    if the predictions are no better than uniform. A temperature at an end is a warning about the
    dev split.

    Args:
        log_probs: (N, C), finite; log-probabilities or logits.
        labels: (N,) class ids in [0, C).
        smoothing: share of each label that is spread evenly over the other classes, in [0, 1).
    Raises: ValueError for no samples, other shapes, or values that are not finite.
    Source: Guo et al. 2017, section 4.2.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    targets = labels.astype(np.int64)
    if values.ndim != 2 or targets.shape != values.shape[:1] or len(values) == 0:
        raise ValueError(
            f"log_probs of shape {values.shape} and labels of shape {targets.shape}: need (N, C) "
            "and (N,), N at least 1; a dev split must not be empty"
        )
    if not np.isfinite(values).all():
        raise ValueError("log_probs hold NaN or infinity: temperature cannot be fitted")
    if targets.min() < 0 or targets.max() >= values.shape[1]:
        raise ValueError(
            f"labels reach from {targets.min()} to {targets.max()}: must be in "
            f"[0, {values.shape[1]})"
        )
    of_label = values[np.arange(len(values)), targets]  # (N, C) -> (N,)
    of_others = (values.sum(axis=1) - of_label) / (values.shape[1] - 1)
    of_target = (1 - smoothing) * of_label + smoothing * of_others

    def slope(inverse: float) -> float:
        scaled = apply_temperature(values, 1 / inverse)
        return float((np.vecdot(np.exp(scaled), values) - of_target).mean())

    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    if slope(low) >= 0:
        return TEMPERATURE_RANGE[1]
    if slope(high) <= 0:
        return TEMPERATURE_RANGE[0]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if slope(middle) >= 0:
            high = middle
        else:
            low = middle
    return 2 / (low + high)


def apply_temperature(log_probs: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Log-probabilities at a temperature: p^(1/T), normalised; above 1 is less confident.

    Args:
        log_probs: (N, C), log-probabilities or logits.
        temperature: positive; 1 only normalises.
    Returns: (N, C) float64.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    scaled = np.asarray(log_probs, dtype=np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
