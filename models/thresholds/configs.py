"""Settings of the threshold rules that learn from the corpus; the fixed one is in `fixed`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PercentileThresholdConfig(BaseModel):
    """Keep the most confident step, 2 step, 3 step ... percent of all, round by round.

    Source: Cascante-Bonilla et al. 2021 (curriculum labelling), section 3.2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["percentile"] = "percentile"
    step: int = Field(
        default=20,
        ge=1,
        le=100,
        description="Percent that each round keeps more than the one before, all classes together;"
        " 20 keeps everything from round 5 on, 100 from round 1.",
    )


class PerClassQuantileConfig(BaseModel):
    """Keep the most confident share of each predicted class, exactly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["per_class_quantile"] = "per_class_quantile"
    keep_fraction: float = Field(
        default=0.2, gt=0, le=1, description="Share of each class that is kept; 1 keeps all."
    )


class ClassAdaptiveFlexConfig(BaseModel):
    """Lower the threshold of classes that reach it seldom.

    Source: Zhang et al. 2021 (FlexMatch), eq. 5 to 11, with warm-up and the convex mapping.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["class_adaptive_flex"] = "class_adaptive_flex"
    confidence: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Threshold of the best learned class; a class that never exceeds it has 0.",
    )


class FreeMatchConfig(BaseModel):
    """Take the mean confidence as threshold, times the class's mean probability over the largest.

    Source: Wang et al. 2023 (FreeMatch), eq. 5 to 8; the moving averages are corpus means here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["freematch"] = "freematch"


class HistogramValleyConfig(BaseModel):
    """Cut at the first least filled bin of the histogram of confidences.

    An empty bin wins, so that small classes give arbitrary valleys: those below `min_per_bin` take
    the valley of all classes together.

    Source: Vandeghen et al. 2022 (ASTOD), create_pseudo.py; the guard is ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["histogram_valley"] = "histogram_valley"
    low: float = Field(
        default=0.5, ge=0, lt=1, description="Where the histogram begins; nothing below is kept."
    )
    bins: int = Field(default=20, ge=2, le=1000, description="Bins of equal width up to 1.")
    scope: Literal["global", "per_class"] = Field(
        default="global", description="One valley for all classes, or one for each."
    )
    min_per_bin: float = Field(
        default=20,
        ge=0,
        description="Predictions from `low` up for each bin, on average, which a valley needs.",
    )
