"""How much each pseudo-label weighs in the loss.

SoftMatch learns its weights from the corpus: the mean prediction gives the offsets of its alignment
(as in `models.debiasing`), and one pass over all rows the mean and variance of confidences:

    sums = sum over shards of `moment_sums(log_probs, offsets)`      (merge: array addition)
    weights = `softmatch_weights(sums, num_rows, ...)`
    `weights_of(weights, ...)` for each shard
"""

from collections.abc import Callable
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from models.weighting.configs import (
    AgreementWeightConfig,
    ConfidenceWeightConfig,
    SoftMatchConfig,
    WeightingConfig,
    WeightNoneConfig,
)
from models.weighting.softmatch import SoftMatchWeights, moment_sums, softmatch_weights

__all__ = [
    "AgreementWeightConfig",
    "ConfidenceWeightConfig",
    "FinishedWeighting",
    "SoftMatchConfig",
    "SoftMatchWeights",
    "WeightNoneConfig",
    "WeightingConfig",
    "moment_sums",
    "softmatch_weights",
    "weights_of",
]

FinishedWeighting = (
    WeightNoneConfig | ConfidenceWeightConfig | AgreementWeightConfig | SoftMatchWeights
)


def weights_of(
    weighting: FinishedWeighting,
    confidences: NDArray[np.float32],
    log_probs: Callable[[], NDArray[np.floating]],
    *,
    agreement: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The weight of each row in the loss, (N,), at least 0.

    Args:
        weighting: the finished rule.
        confidences: (N,) calibrated and debiased.
        log_probs: gives the calibrated (N, C), which SoftMatch aligns; no other rule asks.
        agreement: (N,) share of the votes for the label, where there were several.
    Raises: ValueError if votes are to weigh and there were none.
    """
    match weighting:
        case WeightNoneConfig():
            return np.ones(len(confidences), dtype=np.float32)
        case ConfidenceWeightConfig():
            return confidences.astype(np.float32)
        case AgreementWeightConfig():
            if agreement is None:
                raise ValueError(
                    "weighting=agreement counts votes, but one prediction was made of each image:"
                    " label with several teachers, views or dropout passes"
                )
            return agreement.astype(np.float32)
        case SoftMatchWeights():
            return weighting.of(log_probs())
        case _:
            assert_never(weighting)
