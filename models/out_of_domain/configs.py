"""Settings of the out-of-domain gates."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_KEEP_DEV_FRACTION: Any = Field(
    default=None,
    gt=0,
    le=1,
    description="The threshold is what this share of the dev images reaches; 0.95 is customary, 1"
    " keeps whatever looks no stranger than the strangest dev image.",
)


class _Gate(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OutOfDomainNoneConfig(_Gate):
    """Every image is taken to show one of the classes."""

    kind: Literal["none"] = "none"


class MaxProbConfig(_Gate):
    """Drop images whose largest probability, as stored, is low.

    Stored uncalibrated, but in the top_k form by the labelling's temperature.

    Source: Hendrycks and Gimpel 2017.
    """

    kind: Literal["max_prob"] = "max_prob"
    min_confidence: float | None = Field(
        default=None, ge=0, le=1, description="Keep images that reach it; 0 keeps all."
    )
    keep_dev_fraction: float | None = _KEEP_DEV_FRACTION

    @model_validator(mode="after")
    def _one_threshold(self) -> "MaxProbConfig":
        _check_one("max_prob", "min_confidence", self.min_confidence, self.keep_dev_fraction)
        return self


class EnergyConfig(_Gate):
    """Drop images of high energy, `-log sum exp z` of the logits.

    Source: Liu et al. 2020, at temperature 1.
    """

    kind: Literal["energy"] = "energy"
    max_energy: float | None = Field(
        default=None, description="Keep images of at most this energy; models differ in its scale."
    )
    keep_dev_fraction: float | None = _KEEP_DEV_FRACTION

    @model_validator(mode="after")
    def _one_threshold(self) -> "EnergyConfig":
        _check_one("energy", "max_energy", self.max_energy, self.keep_dev_fraction)
        return self


class EntropyConfig(_Gate):
    """Drop images whose prediction, as stored, has a high entropy; see `max_prob`."""

    kind: Literal["entropy"] = "entropy"
    max_entropy: float | None = Field(
        default=None, ge=0, description="Nats, up to log C; keep images of at most this entropy."
    )
    keep_dev_fraction: float | None = _KEEP_DEV_FRACTION

    @model_validator(mode="after")
    def _one_threshold(self) -> "EntropyConfig":
        _check_one("entropy", "max_entropy", self.max_entropy, self.keep_dev_fraction)
        return self


class PuConfig(_Gate):
    """Drop what a classifier takes for no dev image, learned from dev against the corpus.

    Source: Kiryo et al. 2017 (nnPU), eq. 6.
    """

    kind: Literal["pu"] = "pu"
    prior: float = Field(
        gt=0,
        lt=1,
        description="Share of the corpus that shows one of the classes; it cannot be learned here."
        " A prior too high keeps too much.",
    )


OutOfDomainConfig = Annotated[
    OutOfDomainNoneConfig | MaxProbConfig | EnergyConfig | EntropyConfig | PuConfig,
    Field(discriminator="kind"),
]


def _check_one(kind: str, name: str, threshold: float | None, fraction: float | None) -> None:
    if (threshold is None) == (fraction is None):
        raise ValueError(
            f"out_of_domain of kind {kind} takes exactly one of {name}={threshold} and"
            f" keep_dev_fraction={fraction}"
        )
