"""Settings of the balancing rules."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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

    Source: the rule as the paper's text describes it (Xie et al. 2020, section 2.2).
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
