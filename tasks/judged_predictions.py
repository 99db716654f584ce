"""Stored predictions as a finished selection judged them, from its summary."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.predictions import Predictions
from tasks.selection_rows import calibrated_and_debiased, from_summary


def judged(
    predictions: Predictions, summary: Mapping[str, Any]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return class and confidence of each row as the threshold saw them, (N,) each."""
    temperature, vector, offsets = from_summary(summary)
    labels, confidences, _ = calibrated_and_debiased(
        predictions, temperature=temperature, vector=vector, offsets=offsets
    )
    return labels, confidences


def calibrated_confidences(
    predictions: Predictions, summary: Mapping[str, Any]
) -> NDArray[np.float32] | None:
    """Return the confidences after calibration alone, (N,); None where nothing was calibrated."""
    temperature, vector, _ = from_summary(summary)
    if temperature is None and vector is None:
        return None
    _, confidences, _ = calibrated_and_debiased(
        predictions, temperature=temperature, vector=vector, offsets=None
    )
    return confidences


def is_debiased(summary: Mapping[str, Any]) -> bool:
    """Whether the selection took a class bias out."""
    return summary.get("debias") is not None
