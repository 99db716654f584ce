"""All of a run in one typed model: what a user writes in YAML and what Prefect shows as a form."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.architectures import ArchitectureConfig
from models.training import TrainingConfig
from tasks.labeling import LabelingConfig
from tasks.selection import SelectionConfig

# Stored configs carry this number and are read by flows/opening.py.
CONFIG_SCHEMA = 1

# A scheduled run has its UTC start behind the name (flows/self_training.py).
RUN_NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}(-[0-9]{8}t[0-9]{6}z)?$"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardsData(_Config):
    """Corpora that exist: WebDataset shards named by URL."""

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
    unlabeled: str = Field(description="The corpus that the teacher labels.")


class DigitsData(_Config):
    """scikit-learn's 1,797 handwritten digits, sharded into the store by the run itself."""

    kind: Literal["digits"] = "digits"
    labels_per_class: int = Field(default=5, ge=1, le=100)
    dev: int = Field(default=100, ge=20, le=400, description="Images of the dev split.")
    test: int = Field(default=400, ge=20, le=800, description="Images of the test split.")
    shard_size: int = Field(default=120, ge=1, description="Images in a shard.")
    seed: int | None = Field(
        default=None, ge=0, description="Seed of the split; null: the run's seed."
    )


DataConfig = Annotated[ShardsData | DigitsData, Field(discriminator="kind")]


class TrainedTeacher(TrainingConfig):
    """Round 0 is trained on the labels alone."""

    kind: Literal["train"] = "train"
    # Narrower than the base's int, which is sound: configs are frozen.
    unlabeled_ratio: Literal[0] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=0, description="A teacher has labels only."
    )

    def training(self) -> TrainingConfig:
        """Return the training settings without the union's tag."""
        return _plain_training(self, exclude={"kind"})


class GivenTeacher(_Config):
    """Round 0 is a model made by `selftrain import` or by another run of this store."""

    kind: Literal["given"] = "given"
    model: str = Field(
        description="`models/<fingerprint>` in the run's store, or the URL that"
        " `selftrain import` and `selftrain status` print."
    )


TeacherConfig = Annotated[TrainedTeacher | GivenTeacher, Field(discriminator="kind")]


class LadderStep(_Config):
    """What changes in one round's student; absent fields keep the student's own value."""

    architecture: ArchitectureConfig | None = None
    image_size: int | None = Field(default=None, ge=8, le=1024, description="Pixels a side.")
    unlabeled_ratio: int | None = Field(
        default=None, ge=1, le=64, description="Pseudo-labelled images per labelled one."
    )


class StudentConfig(TrainingConfig):
    """The student of every round; the ladder makes later rounds larger."""

    unlabeled_ratio: int = Field(
        default=3, ge=1, le=64, description="Pseudo-labelled images for each labelled one."
    )
    ladder: tuple[LadderStep, ...] = Field(
        default=(),
        description="Step i changes round i + 1; the last step holds for all later rounds.",
    )

    def for_round(self, round_index: int) -> TrainingConfig:
        """Return the training settings of the student of round 1, 2, ..."""
        plain = _plain_training(self, exclude={"ladder"})
        if not self.ladder:
            return plain
        step = self.ladder[min(round_index, len(self.ladder)) - 1]
        changes = {
            name: value
            for name in LadderStep.model_fields
            if (value := getattr(step, name)) is not None
        }
        return plain.model_copy(update=changes)


class StopConfig(_Config):
    """When the loop ends before its last round. A student that is not promoted always ends it."""

    patience_rounds: int | None = Field(
        default=None,
        ge=1,
        description="End after this many rounds in a row without a gain in dev accuracy;"
        " null: go on to the last round.",
    )


class SelfTrainingConfig(_Config):
    """A whole Noisy Student run."""

    schema_version: Literal[1] = Field(default=CONFIG_SCHEMA, alias="schema")
    name: str = Field(pattern=RUN_NAME_PATTERN, description="The run's name in the store.")
    store: str | None = Field(
        default=None,
        description="Folder or fsspec URL of the store; null: --store or SELFTRAIN_STORE.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Everything random in the run derives from it."
    )
    rounds: int = Field(default=3, ge=1, le=50, description="Students trained after the teacher.")
    data: DataConfig
    max_bad_samples: int = Field(
        default=0,
        ge=0,
        description="Undecodable images a shard may hold; they are counted, listed and skipped.",
    )
    teacher: TeacherConfig
    student: StudentConfig
    labeling: LabelingConfig = LabelingConfig()
    selection: SelectionConfig = SelectionConfig()
    stop: StopConfig = StopConfig()
    baseline: bool = Field(
        default=True,
        description="Train the last student's architecture on labels alone: same noise, optimiser"
        " and steps, batch_size * (1 + unlabeled_ratio) labelled images a step.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is a device, else the CPU."
    )

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    @model_validator(mode="before")
    @classmethod
    def _shards_is_the_default_kind(cls, value: Any) -> Any:
        """Let users write `data: {labeled: ...}` and `teacher: {architecture: ...}` untagged."""
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        for section, kind in (("data", "shards"), ("teacher", "train")):
            if isinstance(value.get(section), Mapping) and "kind" not in value[section]:
                value[section] = {"kind": kind, **value[section]}
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "SelfTrainingConfig":
        if len(self.student.ladder) > self.rounds:
            raise ValueError(
                f"student.ladder has {len(self.student.ladder)} steps but the run has rounds="
                f"{self.rounds}: steps beyond the last round would never be used."
                " Shorten the ladder or raise rounds"
            )
        for round_index in range(1, len(self.student.ladder) + 1):
            step = self.student.for_round(round_index)
            try:
                TrainingConfig.model_validate(step.model_dump())
            except ValidationError as error:
                rules = [problem["msg"] for problem in error.errors(include_url=False)]
                raise ValueError(
                    f"student.ladder, step {round_index}: {'; '.join(rules)}"
                ) from None
        return self


def _plain_training(config: TrainingConfig, *, exclude: set[str]) -> TrainingConfig:
    fields = {
        name: getattr(config, name) for name in TrainingConfig.model_fields if name not in exclude
    }
    return TrainingConfig.model_construct(**fields)
