"""Settings of the balancing rules."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Quota = Annotated[int, Field(ge=1)] | Literal["median"]
_QUOTA = (
    "Samples wanted of each class, copies counted. median: the median over classes of the number "
    "that passed the threshold, classes with none excluded, halves rounded up."
)


class BalanceNoneConfig(BaseModel):
    """One copy of everything that passed the threshold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"


class NsBinnedConfig(BaseModel):
    """Noisy Student's rule as released: thin or duplicate each class to K in expectation.

    A class is cut at the highest hundredth above which it has K samples; all above it are thinned
    uniformly, so order within them does not matter.

    Source: noisystudent filter_unlabel.py.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ns_binned"] = "ns_binned"
    k: Quota = Field(default="median", description=_QUOTA)
    upsample: bool = Field(
        default=True, description="Duplicate the samples of classes that have fewer than k."
    )
    max_copies: int = Field(
        default=10,
        ge=1,
        le=65535,
        description="Most copies of one sample, which bounds what a class of few mistakes can do; "
        "a class that is capped stays below k. No effect without upsample.",
    )


class TopKConfig(BaseModel):
    """The k most confident of each class exactly, ties by key; smaller classes are duplicated.

    Source: the rule as the paper's text describes it (Xie et al. 2020, section 2.2); for several
    classes of an image Yalniz et al. 2019, section 3.2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["top_k"] = "top_k"
    k: Quota = Field(default="median", description=_QUOTA)
    upsample: bool = Field(
        default=True,
        description="Duplicate the samples of classes that have fewer than k, to k in expectation.",
    )
    max_copies: int = Field(
        default=10,
        ge=1,
        le=65535,
        description="Most copies of one sample. No effect without upsample.",
    )
    classes_per_image: int = Field(
        default=1,
        ge=1,
        description="Under how many of its most probable classes an image is ranked, P of the"
        " paper. Each class that takes it gives it one copy, and its label. Above 1: with upsample:"
        " false and selection.target hard.",
        json_schema_extra={"absent_means": 1},
    )

    @model_validator(mode="after")
    def _one_copy_of_each_class(self) -> "TopKConfig":
        if self.classes_per_image > 1 and self.upsample:
            raise ValueError(
                f"balance.classes_per_image={self.classes_per_image} gives an image one copy of"
                " each class that takes it, so smaller classes cannot be duplicated: set upsample:"
                " false"
            )
        return self


class CrestConfig(BaseModel):
    """The most confident share of each class, the larger the rarer the class is among the labels.

    The class of rank r by labelled images (1 the most frequent) keeps the share
    (N_(C+1-r) / N_1) ** alpha of its pseudo-labels: the rarest class all, the most frequent the
    least, for the few pseudo-labels of rare classes are the more precise ones.

    Source: Wei et al. 2021 (CReST), section 3.3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["crest"] = "crest"
    alpha: float = Field(
        default=1 / 3,
        ge=0,
        le=10,
        description="Strength; 0 keeps everything, 1 takes the labels' whole imbalance out.",
    )


class CapMinConfig(BaseModel):
    """As many of each class, the best ones, as the smallest class has.

    Source: Rizve et al. 2021 (UPS), pseudo_labeling_util.py, which takes the least uncertain ones
    and caps in the first rounds only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cap_min"] = "cap_min"
    floor: int = Field(
        default=25,
        ge=1,
        description="Classes are never cut below this many; classes with nothing do not count as"
        " the smallest.",
    )
    by: Literal["confidence", "uncertainty"] = Field(
        default="confidence",
        description="Which ones are the best: the most confident, or those of the smallest standard"
        " deviation, which labeling.uncertainty measures.",
        json_schema_extra={"absent_means": "confidence"},
    )
    rounds: int | None = Field(
        default=None,
        ge=1,
        description="Rounds in which classes are cut; later ones keep one copy of everything. null:"
        " all rounds.",
        json_schema_extra={"absent_means": None},
    )
