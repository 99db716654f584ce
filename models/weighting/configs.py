"""Settings of the rules that weight pseudo-labels in the loss."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class WeightNoneConfig(BaseModel):
    """Every selected sample weighs 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"


class ConfidenceWeightConfig(BaseModel):
    """A sample weighs its calibrated confidence.

    Source: Vandeghen et al. 2022 (ASTOD), roi_heads.py, for boxes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["confidence"] = "confidence"


class AgreementWeightConfig(BaseModel):
    """A sample weighs the share of teachers, views or dropout passes that vote for its label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["agreement"] = "agreement"


class SoftMatchConfig(BaseModel):
    """A sample weighs a truncated Gaussian of its aligned confidence.

    Source: Chen et al. 2023 (SoftMatch), eq. 6 to 9; moving averages are corpus statistics here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["softmatch"] = "softmatch"
    n: float = Field(
        default=2.0,
        gt=0,
        description="The Gaussian's deviation is that of the confidences divided by n: the larger,"
        " the less the unsure weigh.",
    )


WeightingConfig = Annotated[
    WeightNoneConfig | ConfidenceWeightConfig | AgreementWeightConfig | SoftMatchConfig,
    Field(discriminator="kind"),
]
