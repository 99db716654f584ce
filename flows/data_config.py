"""Where a run's images come from: corpora that exist, or the demo's digits."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ShardsData(BaseModel):
    """Corpora that exist: WebDataset shards named by URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["shards"] = "shards"
    root: str = Field(
        default="",
        description="Folder or URL put before every relative URL below; empty: as written.",
    )
    labeled: str = Field(
        description="Labelled shards: a folder, a brace pattern (train-{00000..00099}.tar), a glob,"
        " a list file (.txt) or an index made by `selftrain data index` (.json)."
    )
    dev: str = Field(
        description="Labelled hold-out that calibrates, promotes and stops; never trained on."
    )
    test: str | None = Field(
        default=None, description="Test split, opened once a round by a stage that nothing reads."
    )
    unlabeled: str | None = Field(
        default=None, description="The corpus that the teacher labels; only rounds: 0 needs none."
    )
    exclude: str | None = Field(
        default=None,
        description="Text file of sample keys (<shard stem>/<key>), one a line, that no stage may"
        " read, such as takedowns; in every corpus of the run, and in its fingerprints.",
    )


class DigitsData(BaseModel):
    """scikit-learn's 1,797 handwritten digits, sharded into the store by the run itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["digits"] = "digits"
    labels_per_class: int = Field(
        default=5, ge=1, le=100, description="Labelled images of each digit."
    )
    dev: int = Field(default=100, ge=20, le=400, description="Images of the dev split.")
    test: int = Field(default=400, ge=20, le=800, description="Images of the test split.")
    shard_size: int = Field(default=120, ge=1, description="Images in a shard.")
    seed: int | None = Field(
        default=None, ge=0, description="Seed of the split; null: the run's seed."
    )


DataConfig = Annotated[ShardsData | DigitsData, Field(discriminator="kind")]
