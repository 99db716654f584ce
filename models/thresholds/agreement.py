"""Keep what several predictions agree on."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.thresholds.fixed import reaches


class AgreementThresholdConfig(BaseModel):
    """Keep a label that enough of the teachers, views or dropout passes give.

    Two teachers and min_fraction 1 is two-model agreement.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["agreement"] = "agreement"
    min_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Smallest share of votes for the label that is kept; 1: all of them.",
    )
    confidence: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Lowest confidence that is kept, after calibration; 0: votes alone decide.",
    )


def is_agreed(
    confidences: NDArray[np.floating],
    agreement: NDArray[np.floating],
    config: AgreementThresholdConfig,
) -> NDArray[np.bool_]:
    """Whether each row has enough votes for its label, and is confident enough.

    Args:
        confidences: (N,) in [0, 1]; one equal to the threshold is kept.
        agreement: (N,) in [0, 1]; one equal to the fraction is kept.
        config: both limits, which are rounded to the arrays' dtypes first.
    Returns: (N,) bool.
    Raises: ValueError for a NaN, or a value out of range.
    """
    is_confident = reaches(confidences, config.confidence)
    if not bool(((agreement >= 0) & (agreement <= 1)).all()):
        raise ValueError("a share of votes lies outside [0, 1]")
    return is_confident & (agreement >= agreement.dtype.type(config.min_fraction))
