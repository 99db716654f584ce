"""SoftMatch's weights, from the mean and variance of aligned confidences over the corpus."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.debiasing import apply_offsets
from models.exact_sums import exact_mean, exact_sum
from models.top_k_probs import TopKProbs


@dataclass(frozen=True)
class SoftMatchWeights:
    """The truncated Gaussian.

    Attributes:
        offsets: (C,) that align predictions to the uniform distribution, for weights alone:
            labels and targets are those of the unaligned prediction.
        mean: of the aligned confidences.
        variance: of the aligned confidences.
        n: the deviation is divided by it.
    """

    offsets: NDArray[np.float64]
    mean: float
    variance: float
    n: float

    def of(self, log_probs: NDArray[np.floating] | TopKProbs) -> NDArray[np.float32]:
        """Weights (N,) of rows of calibrated log-probabilities (N, C), each in (0, 1]."""
        confidences = aligned_confidences(log_probs, self.offsets)
        return truncated_gaussian(
            confidences, mean=self.mean, variance=self.variance, n=self.n
        ).astype(np.float32)


def aligned_confidences(
    log_probs: NDArray[np.floating] | TopKProbs, offsets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The largest probability (N,) after alignment."""
    if isinstance(log_probs, TopKProbs):
        return log_probs.with_offsets(offsets).confidences
    return np.exp(apply_offsets(log_probs, offsets).max(axis=1))


def moment_sums(
    log_probs: NDArray[np.floating] | TopKProbs, offsets: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Map: (2, 2) exact sums of the aligned confidences and of their squares."""
    confidences = aligned_confidences(log_probs, offsets)
    return exact_sum(np.column_stack([confidences, confidences**2]))


def softmatch_weights(
    sums: NDArray[np.int64], num_rows: int, *, offsets: NDArray[np.float64], n: float
) -> SoftMatchWeights:
    """Finish: from the sums of all shards."""
    mean, square = (float(value) for value in exact_mean(sums, num_rows))
    return SoftMatchWeights(offsets, mean, max(square - mean**2, 0.0), n)


def truncated_gaussian(
    confidences: NDArray[np.float64], *, mean: float, variance: float, n: float
) -> NDArray[np.float64]:
    """1 from the mean up, below it exp(-(c - mean)^2 / (2 variance / n^2)).

    Without variance every confidence is the mean, and weighs 1.
    """
    below = np.minimum(confidences - mean, 0.0)
    if variance <= 0:
        return np.ones_like(confidences)
    return np.exp(-(below**2) / (2 * variance / n**2))
