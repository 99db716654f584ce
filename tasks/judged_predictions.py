"""Stored predictions as a finished selection judged them, from its summary."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.predictions import Predictions
from tasks.distributions import Calibration


def judged(
    predictions: Predictions, summary: Mapping[str, Any]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return class and confidence of each row as the threshold saw them, (N,) each."""
    return Calibration.of_summary(summary).seen_by_threshold(predictions)


def calibrated_confidences(
    predictions: Predictions, summary: Mapping[str, Any]
) -> NDArray[np.float32] | None:
    """Return the confidences after calibration alone, (N,); None where nothing was calibrated."""
    if "temperature" not in summary and "vector" not in summary:
        return None
    alone = Calibration.of_summary(summary).debiased_by(None)
    return alone.seen_by_threshold(predictions)[1]


def is_debiased(summary: Mapping[str, Any]) -> bool:
    """Whether the selection took a class bias out."""
    return summary.get("debias") is not None
