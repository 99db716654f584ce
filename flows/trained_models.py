"""How teacher and students are trained: settings, the stages after them, and what may not be."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flows.starting_weights import ScratchInit, StudentInitConfig, TeacherInitConfig
from models.architectures import ArchitectureConfig
from models.finetuning import FinetuneConfig
from models.training import TrainingConfig
from tasks.training_orders import FollowerRole, pretraining_config


class TrainedTeacher(TrainingConfig):
    """Round 0 is trained on the labels alone."""

    kind: Literal["train"] = "train"
    # Narrower than the base's int, which is sound: configs are frozen.
    unlabeled_ratio: Literal[0] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=0, description="A teacher has labels only."
    )
    init: TeacherInitConfig = Field(
        default=ScratchInit(), description="Where its first weights come from."
    )
    resolution_fix: FinetuneConfig | None = Field(
        default=None,
        description="A stage after the training: a short one at a higher image_size on labels; its"
        " model is the teacher. Null: none.",
    )

    def training(self) -> TrainingConfig:
        """Return the training settings without the union's tag."""
        return _plain_training(self)

    def followers(self) -> tuple[tuple[FollowerRole, FinetuneConfig], ...]:
        """Return the stages that follow the training, in their order."""
        return () if self.resolution_fix is None else (("resolution_fix", self.resolution_fix),)


class GivenTeacher(BaseModel):
    """Round 0 is a model made by `selftrain import` or by another run of this store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["given"] = "given"
    model: str = Field(
        description="`models/<fingerprint>` in the run's store, or the URL that"
        " `selftrain import` and `selftrain status` print."
    )


class LatestTeacher(BaseModel):
    """Round 0 is the model that the newest finished run of a name ended with.

    It is looked up once, when the run is opened. Nightly runs under the model of a run that is made
    less often label only the shards that are new.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["latest_promoted"] = "latest_promoted"
    of: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Name of a run, or of a config whose scheduled runs (NAME-<UTC start>) are"
        " meant. Its own name goes one round further whenever data or config have changed.",
    )
    otherwise: Annotated[TrainedTeacher | GivenTeacher, Field(discriminator="kind")] | None = Field(
        default=None,
        description="The teacher while no run of that name has finished; null: that is an error.",
    )

    @field_validator("otherwise", mode="before")
    @classmethod
    def _train_is_the_default_kind(cls, value: Any) -> Any:
        is_untagged = isinstance(value, Mapping) and "kind" not in value
        return {"kind": "train", **value} if is_untagged else value


TeacherConfig = Annotated[
    TrainedTeacher | GivenTeacher | LatestTeacher, Field(discriminator="kind")
]


def trained_teacher(
    teacher: TrainedTeacher | GivenTeacher | LatestTeacher,
) -> tuple[str, TrainedTeacher] | None:
    """Return key and section of the config that train a teacher, None where none is trained.

    Of a latest teacher it is `otherwise`, which holds while there is no such model.
    """
    if isinstance(teacher, LatestTeacher):
        section = teacher.otherwise
        return ("teacher.otherwise", section) if isinstance(section, TrainedTeacher) else None
    return ("teacher", teacher) if isinstance(teacher, TrainedTeacher) else None


TrainingOrderName = Literal["joint", "finetune_on_labels_last", "pretrain_then_finetune"]


class LadderStep(BaseModel):
    """What changes in one round's student; absent fields keep the student's own value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: ArchitectureConfig | None = Field(default=None, description="The network.")
    image_size: int | None = Field(default=None, ge=8, le=1024, description="Pixels a side.")
    unlabeled_ratio: int | None = Field(
        default=None, ge=1, le=64, description="Pseudo-labelled images per labelled one."
    )


class StudentConfig(TrainingConfig):
    """The student of every round; the ladder makes later rounds larger."""

    init: StudentInitConfig = Field(
        default=ScratchInit(), description="Where every round's student starts from."
    )
    order: TrainingOrderName = Field(
        default="joint",
        description="joint: labels and pseudo-labels together, and that is all."
        " finetune_on_labels_last: then `finetune` on labels alone. pretrain_then_finetune:"
        " pseudo-labels alone, then `finetune`.",
    )
    finetune: FinetuneConfig | None = Field(
        default=None, description="The stage on labels alone that two of the orders end with."
    )
    resolution_fix: FinetuneConfig | None = Field(
        default=None,
        description="A last stage at a higher image_size on labels; its model is the student that"
        " is validated, labels and is promoted. Null: none.",
    )

    unlabeled_ratio: int = Field(
        default=3,
        ge=1,
        le=64,
        description="Pseudo-labelled (online: unlabelled) images for each labelled one.",
    )
    ladder: tuple[LadderStep, ...] = Field(
        default=(),
        description="Step i changes round i + 1; the last step holds for all later rounds.",
    )

    def for_round(self, round_index: int) -> TrainingConfig:
        """Return the training settings of the student of round 1, 2, ..."""
        plain = _plain_training(self)
        if self.order == "pretrain_then_finetune":
            plain = pretraining_config(plain)
        if not self.ladder:
            return plain
        step = self.ladder[min(round_index, len(self.ladder)) - 1]
        changes = {
            name: value
            for name in LadderStep.model_fields
            if (value := getattr(step, name)) is not None
        }
        return plain.model_copy(update=changes)

    def followers(self) -> tuple[tuple[FollowerRole, FinetuneConfig], ...]:
        """Return the stages that follow the training, in their order."""
        stages: tuple[tuple[FollowerRole, FinetuneConfig | None], ...] = (
            ("finetune", self.finetune),
            ("resolution_fix", self.resolution_fix),
        )
        return tuple((role, config) for role, config in stages if config is not None)

    @model_validator(mode="after")
    def _order_and_stages_agree(self) -> "StudentConfig":
        if self.order == "joint" and self.finetune is not None:
            raise ValueError(
                "order=joint has no stage on labels alone, so finetune cannot take effect: set"
                " order: finetune_on_labels_last (or pretrain_then_finetune), or leave it out"
            )
        if self.order != "joint" and self.finetune is None:
            raise ValueError(
                f"order={self.order} ends on labels alone: describe that stage in finetune"
            )
        if self.order == "pretrain_then_finetune" and self.objective.kind != "joint":
            raise ValueError(
                "order=pretrain_then_finetune trains on stored pseudo-labels first, and"
                f" objective.kind={self.objective.kind} reads none: use objective.kind: joint"
            )
        return self


def check_training(
    config: TrainingConfig,
    followers: tuple[tuple[FollowerRole, FinetuneConfig], ...],
    *,
    named: str,
) -> None:
    """Refuse a training, or a stage after it, that cannot run as it is put together."""
    try:
        TrainingConfig.model_validate(config.model_dump())
        for role, follower in followers:
            named = f"{named.removesuffix('.finetune')}.{role}"
            after = follower.training(config)
            if role == "resolution_fix" and after.image_size <= config.image_size:
                raise ValueError(
                    f"{named}.image_size={follower.image_size} must be above image_size="
                    f"{config.image_size} of the training before it: raise it, or leave it out"
                )
    except ValidationError as error:
        rules = [problem["msg"] for problem in error.errors(include_url=False)]
        raise ValueError(f"{named}: {'; '.join(rules)}") from None


def resulting_size(
    config: TrainingConfig, followers: tuple[tuple[FollowerRole, FinetuneConfig], ...]
) -> int:
    """Return the image size of the model that a training and the stages after it end with."""
    sizes = [config.image_size, *(follower.image_size for _, follower in followers)]
    return [size for size in sizes if size is not None][-1]


def _plain_training(config: TrainingConfig) -> TrainingConfig:
    fields = {name: getattr(config, name) for name in TrainingConfig.model_fields}
    return TrainingConfig.model_construct(**fields)
