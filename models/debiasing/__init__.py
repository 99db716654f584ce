"""Taking a class bias out of predictions: every rule adds one constant per class to the logits.

pass    sums = sum over shards of `models.exact_sums.exact_sum` of the calibrated probabilities
finish  offsets = `class_offsets(config, mean, ...)`; then `apply_offsets` to every row
"""

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from models.calibration import apply_temperature
from models.debiasing.configs import (
    DebiasConfig,
    DebiasNoneConfig,
    DistributionAlignmentConfig,
    LogitAdjustConfig,
    ProgressiveAlignmentConfig,
)

__all__ = [
    "DebiasConfig",
    "DebiasNoneConfig",
    "DistributionAlignmentConfig",
    "LogitAdjustConfig",
    "ProgressiveAlignmentConfig",
    "aligning_offsets",
    "apply_offsets",
    "class_offsets",
    "power_of_round",
    "reads_labeled_prior",
]

# As of the adaptive margin: a class that was never predicted or labelled has a finite logarithm.
_SMALLEST_SHARE = 1e-8


def reads_labeled_prior(config: DebiasConfig) -> bool:
    """Whether the class counts of the labelled images enter."""
    if isinstance(config, DistributionAlignmentConfig):
        return config.target == "labeled_prior"
    return isinstance(config, ProgressiveAlignmentConfig)


def class_offsets(
    config: DebiasConfig,
    mean_probs: NDArray[np.float64],
    *,
    labeled_counts: NDArray[np.int64] | None,
    round_index: int,
) -> NDArray[np.float64]:
    """What is added to the logits of each class, (C,).

    Args:
        config: the rule.
        mean_probs: (C,) of the calibrated predictions over the corpus.
        labeled_counts: (C,) labelled images of each class, where `reads_labeled_prior`.
        round_index: 1 for the first round.
    Raises: ValueError if a given prior is of another number of classes.
    """
    match config:
        case DebiasNoneConfig():
            return np.zeros(len(mean_probs))
        case LogitAdjustConfig():
            return -config.tau * _log(mean_probs)
        case DistributionAlignmentConfig():
            return aligning_offsets(_target(config, len(mean_probs), labeled_counts), mean_probs)
        case ProgressiveAlignmentConfig():
            powered = _prior(labeled_counts) ** power_of_round(config, round_index)
            return aligning_offsets(powered / powered.sum(), mean_probs)
        case _:
            assert_never(config)


def aligning_offsets(
    target: NDArray[np.float64], mean_probs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The logarithm of target / mean, (C,); shares below 1e-8 count as 1e-8.

    The released code adds 1e-6 to both instead.
    """
    return _log(target) - _log(mean_probs)


def power_of_round(config: ProgressiveAlignmentConfig, round_index: int) -> float:
    """The power t of the labelled prior: 1 in round 1, t_min from the last generation on."""
    share = min(round_index - 1, config.generations - 1) / (config.generations - 1)
    return 1 - share * (1 - config.t_min)


def apply_offsets(
    log_probs: NDArray[np.floating], offsets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Log-probabilities (N, C) with the offsets (C,) added, normalised."""
    return apply_temperature(np.asarray(log_probs, dtype=np.float64) + offsets, 1.0)


def _target(
    config: DistributionAlignmentConfig,
    num_classes: int,
    labeled_counts: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    if config.target == "uniform":
        return np.full(num_classes, 1 / num_classes)
    if config.prior is None:
        return _prior(labeled_counts)
    if len(config.prior) != num_classes:
        raise ValueError(
            f"debias.prior has {len(config.prior)} shares, the predictions {num_classes} classes"
        )
    return np.array(config.prior)


def _prior(labeled_counts: NDArray[np.int64] | None) -> NDArray[np.float64]:
    if labeled_counts is None or labeled_counts.sum() == 0:
        raise ValueError("the labelled prior is wanted, but no labelled images were counted")
    return labeled_counts / labeled_counts.sum()


def _log(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(shares, _SMALLEST_SHARE))
