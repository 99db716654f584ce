"""One confidence threshold for every class."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class FixedThresholdConfig(BaseModel):
    """Keep a prediction whose confidence reaches a constant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fixed"] = "fixed"
    confidence: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Lowest confidence that is kept, after calibration; 0 keeps everything. Noisy "
        "Student uses 0.3, FixMatch 0.95.",
    )


def reaches_threshold(
    confidences: NDArray[np.floating], config: FixedThresholdConfig
) -> NDArray[np.bool_]:
    """Whether each confidence reaches the threshold; one equal to it is kept.

    Args:
        confidences: (N,) in [0, 1]. The threshold is rounded to their dtype first, so a float32
            confidence written as 0.7 reaches a threshold of 0.7.
        config: the threshold.
    Returns: (N,) bool.
    Raises: ValueError for NaN or a value outside [0, 1].
    """
    return reaches(confidences, config.confidence)


def reaches(confidences: NDArray[np.floating], least: float) -> NDArray[np.bool_]:
    """Whether each confidence is at least a limit, which is rounded to their dtype first, (N,).

    Raises: ValueError for NaN or a value outside [0, 1].
    """
    check_confidences(confidences)
    return confidences >= confidences.dtype.type(least)


def check_confidences(confidences: NDArray[np.floating]) -> None:
    """Refuse anything but a (N,) float array in [0, 1] (up to 1e-6 above, for rounded sums)."""
    if confidences.ndim != 1 or not np.issubdtype(confidences.dtype, np.floating):
        raise ValueError(
            f"confidences of shape {confidences.shape} and dtype {confidences.dtype}: must be "
            "(N,) floats"
        )
    # Either of NaN is NaN, which is neither.
    if not (confidences.min(initial=0) >= 0 and confidences.max(initial=0) <= 1 + 1e-6):
        bad = ~((confidences >= 0) & (confidences <= 1 + 1e-6))
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{int(bad.sum())} of {len(confidences)} confidences lie outside [0, 1] (first: "
            f"{confidences[row]} in row {row}): were logits given, or is the model broken?"
        )
