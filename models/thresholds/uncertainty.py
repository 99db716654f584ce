"""UPS's rule: confident, and sure of it."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.thresholds.fixed import reaches


class UncertaintyThresholdConfig(BaseModel):
    """Keep a confident prediction whose probability hardly varies.

    Over dropout passes, views or teachers: see `labeling.uncertainty`, which it needs.

    Source: Rizve et al. 2021 (UPS), pseudo_labeling_util.py, positive labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["uncertainty"] = "uncertainty"
    confidence: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="Lowest confidence that is kept, after calibration; tau_p of the paper.",
    )
    max_std: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="The standard deviation of the predicted class's probability, as the teacher"
        " gives it, lies below this; one equal to it is dropped. kappa_p of the paper.",
    )


def is_certain(
    confidences: NDArray[np.floating],
    uncertainty: NDArray[np.floating],
    config: UncertaintyThresholdConfig,
) -> NDArray[np.bool_]:
    """Whether each row is confident enough, and varies little enough.

    Args:
        confidences: (N,) in [0, 1]; one equal to the threshold is kept.
        uncertainty: (N,) at least 0; one equal to the limit is dropped.
        config: both limits, which are rounded to the arrays' dtypes first.
    Returns: (N,) bool.
    Raises: ValueError for a NaN, or a value out of range.
    """
    is_confident = reaches(confidences, config.confidence)
    if not bool((uncertainty >= 0).all()):
        raise ValueError(
            f"{int((~(uncertainty >= 0)).sum())} of {len(uncertainty)} standard deviations are"
            " negative or NaN"
        )
    return is_confident & (uncertainty < uncertainty.dtype.type(config.max_std))
