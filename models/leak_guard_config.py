"""Settings of the leak guard, apart from what it computes with: they are read without torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

CANDIDATE_SIMILARITY = 0.92
"""Of the six crops in which pairs are looked for; what decides is at least this."""


class LeakGuardNoneConfig(BaseModel):
    """Look for no copies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"


class NearDuplicatesConfig(BaseModel):
    """Leave out images of the corpus that are copies of dev or test images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float = Field(
        default=0.97,
        ge=CANDIDATE_SIMILARITY,
        le=1,
        description="Similarity from which on an image counts as a copy: the correlation of the low"
        " frequencies, at the crop and mirroring that fit best. Below 0.96 look-alikes are dropped,"
        " too; 1 drops nothing but exact copies.",
    )


LeakGuardConfig = Annotated[LeakGuardNoneConfig | NearDuplicatesConfig, Field(discriminator="kind")]
