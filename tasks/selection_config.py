"""Settings of a selection."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.balancing import (
    BalanceConfig,
    NsBinnedConfig,
    classes_per_image,
    ranks_by_uncertainty,
    reads_labeled_counts,
)
from models.debiasing import DebiasConfig, DebiasNoneConfig, reads_labeled_prior
from models.leak_guard_config import LeakGuardConfig, LeakGuardNoneConfig
from models.out_of_domain import OutOfDomainConfig, OutOfDomainNoneConfig, reads_dev
from models.thresholds import (
    AgreementThresholdConfig,
    FixedThresholdConfig,
    ThresholdConfig,
    UncertaintyThresholdConfig,
)
from models.weighting import (
    AgreementWeightConfig,
    SoftMatchConfig,
    WeightingConfig,
    WeightNoneConfig,
)


class SelectionConfig(BaseModel):
    """What makes a prediction a pseudo-label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    leak_guard: LeakGuardConfig = Field(
        default=LeakGuardNoneConfig(),
        description="Whether images of the corpus that are copies of dev or test images are looked"
        " for and left out, before anything is counted.",
        json_schema_extra={"absent_means": {"kind": "none"}},
    )
    out_of_domain: OutOfDomainConfig = Field(
        default=OutOfDomainNoneConfig(),
        description="Which images are taken to show none of the classes and left out, before"
        " anything is calibrated or counted.",
        json_schema_extra={"absent_means": {"kind": "none"}},
    )
    calibration: Literal["temperature", "vector", "none"] = Field(
        default="temperature",
        description="temperature: one number fitted on the dev split, applied to confidences"
        " before the threshold; soft targets stay the teacher's own. vector: a weight and a bias"
        " for each class, fitted alike, which may change the class; soft targets are then the"
        " calibrated ones.",
    )
    debias: DebiasConfig = Field(
        default=DebiasNoneConfig(),
        description="How a class bias is taken out, after calibration and before the threshold. It"
        " changes class, confidence and soft target: all three are of the debiased prediction.",
        json_schema_extra={"absent_means": {"kind": "none"}},
    )
    threshold: ThresholdConfig = Field(
        default=FixedThresholdConfig(), description="How sure a prediction must be to be kept."
    )
    weighting: WeightingConfig = Field(
        default=WeightNoneConfig(),
        description="How much each pseudo-label weighs in the loss.",
        json_schema_extra={"absent_means": {"kind": "none"}},
    )
    balance: BalanceConfig = Field(
        default=NsBinnedConfig(),
        description="How many samples of each class are taken, and how often.",
    )
    target: Literal["soft", "hard"] = Field(
        default="soft", description="What the student learns: the teacher's distribution or class."
    )
    max_class_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Largest share of the selected items that one class may hold; null: 0.5, or"
        " 1.5 / classes where that is more.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    allow_collapse: bool = Field(
        default=False,
        description="Go on although one class holds more than max_class_share or more than half"
        " of the classes get nothing.",
        json_schema_extra={"fingerprint": "excluded"},
    )

    @model_validator(mode="after")
    def _align_once(self) -> "SelectionConfig":
        is_debiased = not isinstance(self.debias, DebiasNoneConfig)
        if isinstance(self.weighting, SoftMatchConfig) and is_debiased:
            raise ValueError(
                f"selection.weighting=softmatch with debias={self.debias.kind}: SoftMatch aligns"
                " confidences itself and takes labels from the unaligned prediction. Leave debias"
                " out, or weight by confidence"
            )
        return self

    @model_validator(mode="after")
    def _votes_are_for_the_teachers_label(self) -> "SelectionConfig":
        reader = self.reads_several_predictions
        changer = "calibration=vector" if self.calibration == "vector" else None
        if not isinstance(self.debias, DebiasNoneConfig):
            changer = f"debias={self.debias.kind}"
        if reader is not None and changer is not None:
            raise ValueError(
                f"selection.{reader} reads deviation or votes of the class that the teacher"
                f" predicted, and {changer} may change the class: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _several_classes_are_hard_labels(self) -> "SelectionConfig":
        if classes_per_image(self.balance) > 1 and self.target != "hard":
            raise ValueError(
                f"selection.balance.classes_per_image={classes_per_image(self.balance)} labels an"
                f" image with the classes that take it, not with target={self.target}: set target:"
                " hard"
            )
        return self

    @property
    def reads_uncertainty(self) -> str | None:
        """The rule that reads the deviation of several predictions; None where none does."""
        if isinstance(self.threshold, UncertaintyThresholdConfig):
            return f"threshold={self.threshold.kind}"
        return "balance.by=uncertainty" if ranks_by_uncertainty(self.balance) else None

    @property
    def reads_several_predictions(self) -> str | None:
        """The rule that reads deviation or votes of several predictions; None where none does."""
        if self.reads_uncertainty is not None:
            return self.reads_uncertainty
        if isinstance(self.threshold, AgreementThresholdConfig):
            return f"threshold={self.threshold.kind}"
        if isinstance(self.weighting, AgreementWeightConfig):
            return f"weighting={self.weighting.kind}"
        return None

    @property
    def reads_validation(self) -> bool:
        """Whether the predictions on the dev split enter."""
        return self.calibration != "none" or reads_dev(self.out_of_domain)

    @property
    def guards(self) -> bool:
        """Whether copies of dev and test images are looked for."""
        return not isinstance(self.leak_guard, LeakGuardNoneConfig)

    @property
    def reads_labeled_counts(self) -> bool:
        """Whether the class counts of the labelled images enter."""
        return reads_labeled_prior(self.debias) or reads_labeled_counts(self.balance)
