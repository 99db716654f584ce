"""Settings of the rules that take a class bias out of predictions."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DebiasNoneConfig(BaseModel):
    """Predictions as the teacher gives them, its bias included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"


class DistributionAlignmentConfig(BaseModel):
    """Scale predictions by target / mean prediction, so that their mean moves to the target.

    Source: Berthelot et al. 2020 (ReMixMatch), section 3.2; the running mean over batches is the
    mean over the corpus here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["distribution_alignment"] = "distribution_alignment"
    target: Literal["labeled_prior", "uniform", "given"] = Field(
        default="labeled_prior",
        description="labeled_prior: the class shares of the labelled images; uniform: all alike;"
        " given: `prior`.",
    )
    prior: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None,
        description="Class shares in the order of the class names, sum 1; exactly where target is"
        " given.",
    )

    @model_validator(mode="after")
    def _prior_is_there_where_it_is_read(self) -> "DistributionAlignmentConfig":
        if (self.target == "given") != (self.prior is not None):
            raise ValueError(
                f"debias.target={self.target} with prior={self.prior}: prior is given exactly where"
                " target is given"
            )
        if self.prior is not None and abs(sum(self.prior) - 1) > 1e-6:
            raise ValueError(f"debias.prior sums to {sum(self.prior)}: class shares must sum to 1")
        return self


class LogitAdjustConfig(BaseModel):
    """Subtract tau times the log of the mean prediction from the logits.

    Source: Wang et al. 2022 (DebiasPL), eq. 5; Menon et al. 2021.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["logit_adjust"] = "logit_adjust"
    tau: float = Field(
        default=0.4,
        ge=0,
        le=2,
        description="Strength. 0 changes nothing, 1 is alignment to the uniform distribution; the"
        " source uses 0.4.",
    )


class ProgressiveAlignmentConfig(BaseModel):
    """Alignment to labelled_prior^t, t falling from 1 to t_min: more balanced round by round.

    Source: Wei et al. 2021 (CReST+), section 3.4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["progressive_da"] = "progressive_da"
    t_min: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Power of the labelled prior in the last generation; 0 would be uniform.",
    )
    generations: int = Field(
        default=6,
        ge=2,
        description="Rounds over which t falls in equal steps; it stays at t_min afterwards.",
    )


DebiasConfig = Annotated[
    DebiasNoneConfig | DistributionAlignmentConfig | LogitAdjustConfig | ProgressiveAlignmentConfig,
    Field(discriminator="kind"),
]
