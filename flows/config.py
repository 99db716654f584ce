"""All of a run in one typed model: what a user writes in YAML and what Prefect shows as a form."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

from flows.config_leaves import keys_with_credentials
from flows.data_config import DataConfig, ShardsData
from flows.engine_config import LOCAL_ENGINE, EngineConfig
from flows.extra_teachers import NO_EXTRA_TEACHERS, ExtraTeachersConfig
from flows.form_titles import title_by_kind
from flows.operating_config import AlertConfig, RestartConfig, ScheduleConfig
from flows.starting_weights import ScratchInit, TeacherInit
from flows.trained_models import (
    StudentConfig,
    TeacherConfig,
    check_training,
    resulting_size,
    trained_teacher,
)
from models.aggregation import McDropoutConfig
from models.architectures import architecture_at, architecture_name
from models.finetuning import FinetuneConfig
from models.ranks import parts_of_step
from models.training import TrainingConfig
from models.views import check_views
from storage.shard_cache import CacheConfig
from tasks.labeling_config import LabelingConfig
from tasks.launching import ONE_LOCAL_PROCESS, LaunchConfig, LocalLaunch
from tasks.loading import CACHE, LOADER_THREADS, MATERIALIZE, MaterializeChoice
from tasks.selection import SelectionConfig
from tasks.tracker_config import TrackerConfig
from tasks.training_orders import needs_of

# Stored configs carry this number and are read by flows/opening.py.
CONFIG_SCHEMA = 1

# A scheduled run has its UTC start behind the name (flows/self_training.py).
RUN_NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}(-[0-9]{8}t[0-9]{6}z)?$"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StopConfig(_Config):
    """When the loop ends before its last round. A student that is not promoted always ends it."""

    patience_rounds: int | None = Field(
        default=None,
        ge=1,
        description="End after this many rounds in a row without a gain in dev accuracy;"
        " null: go on to the last round.",
    )


def _choice_of_bool(value: Any) -> Any:
    """Let `approve: true` mean the question that is asked most, and false none."""
    return ("promotion" if value else "none") if isinstance(value, bool) else value


ApproveChoice = Annotated[Literal["none", "promotion", "round"], BeforeValidator(_choice_of_bool)]


class SelfTrainingConfig(_Config):
    """A whole Noisy Student run."""

    schema_version: Literal[1] = Field(
        default=CONFIG_SCHEMA, alias="schema", description="Version of this form of config."
    )
    name: str = Field(
        pattern=RUN_NAME_PATTERN,
        description="The run's name in the store; a run keeps its config, so another config needs"
        " another name.",
    )
    store: str | None = Field(
        default=None,
        description="Folder or fsspec URL of the store; null: --store or SELFTRAIN_STORE.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Everything random in the run derives from it."
    )
    rounds: int = Field(
        default=3,
        ge=0,
        le=50,
        description="Students trained after the teacher; 0: the teacher alone, on labels.",
    )
    data: DataConfig = Field(description="Which images are read: shards, or the demo's digits.")
    max_bad_samples: int = Field(
        default=0,
        ge=0,
        description="Undecodable images a shard may hold; they are counted, listed and skipped.",
    )
    teacher: TeacherConfig = Field(
        description="Round 0: a training on the labels alone, a model that is given, or the last"
        " one that another run promoted."
    )
    extra_teachers: ExtraTeachersConfig = Field(
        default=NO_EXTRA_TEACHERS,
        description="Models that label beside the round's teacher, as an ensemble. They enter the"
        " fingerprints of what they label, and nothing else.",
    )
    student: StudentConfig | None = Field(
        default=None, description="What every round trains; left out exactly where rounds is 0."
    )
    labeling: LabelingConfig = Field(
        default=LabelingConfig(), description="How teachers label the unlabelled corpus."
    )
    selection: SelectionConfig = Field(
        default=SelectionConfig(), description="Which of the labels students learn from."
    )
    stop: StopConfig = Field(
        default=StopConfig(), description="When the loop ends before its last round."
    )
    approve: ApproveChoice = Field(
        default="none",
        description="Whom the run needs: promotion (or true): it ends before a student that is good"
        " enough becomes the teacher, and goes on once a person has said so; round: likewise before"
        " every round; none (or false): nobody.",
    )
    baseline: bool = Field(
        default=True,
        description="Train the last student's architecture on labels alone: same noise, optimiser"
        " and steps, as many labelled images a step as the student reads of both kinds, and the"
        " same stages after it.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is a device, else the CPU."
    )
    cache: CacheConfig | None = CACHE
    loader_threads: int | None = LOADER_THREADS
    materialize: MaterializeChoice = MATERIALIZE
    launch: LaunchConfig = Field(
        default=ONE_LOCAL_PROCESS,
        description="Who starts the processes of a training, and how many; in no fingerprint.",
    )
    engine: EngineConfig = Field(
        default=LOCAL_ENGINE,
        description="Whose workers label the corpus; in no fingerprint.",
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(),
        description="When runs start by themselves; read by `selftrain deploy` and `serve` alone.",
    )
    restart: RestartConfig = Field(
        default=RestartConfig(),
        description="What `selftrain deploy` has happen to a run that crashed.",
    )
    alert: AlertConfig = Field(
        default=AlertConfig(),
        description="What `selftrain deploy` has the server alert people of, and how.",
    )
    trackers: tuple[TrackerConfig, ...] = Field(
        default=(),
        description="Where metrics are written besides the store: TensorBoard, MLflow; in no"
        " fingerprint.",
    )

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema that forms are made of, its models named as in YAML."""
        schema = handler(core_schema)
        title_by_kind(schema, handler.resolve_ref_schema)
        return schema

    @field_validator("trackers")
    @classmethod
    def _no_tracker_twice(cls, trackers: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        if any(tracker in trackers[:index] for index, tracker in enumerate(trackers)):
            raise ValueError("a tracker is named twice, and would be told everything twice")
        return trackers

    @model_validator(mode="before")
    @classmethod
    def _shards_is_the_default_kind(cls, value: Any) -> Any:
        """Let users write `data: {labeled: ...}` and `teacher: {architecture: ...}` untagged."""
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        for section, kind in (
            ("data", "shards"),
            ("teacher", "train"),
            ("launch", "local"),
            ("engine", "local"),
        ):
            if isinstance(value.get(section), Mapping) and "kind" not in value[section]:
                value[section] = {"kind": kind, **value[section]}
        return value

    # Before a flow run is made: its parameters stay in Prefect's database. Messages about a single
    # field would show its value.
    @model_validator(mode="after")
    def _no_credentials(self) -> "SelfTrainingConfig":
        if keys := keys_with_credentials(self.model_dump()):
            raise ValueError(
                f"{', '.join(keys)}: a URL that holds credentials, and a config is stored and"
                " shown: leave them out, and set them in the environment (AWS_ACCESS_KEY_ID,"
                " AWS_PROFILE, ...) or use a role"
            )
        return self

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "SelfTrainingConfig":
        if self.student is None or self.rounds == 0:
            self._refuse_without_rounds()
            return self
        student = self.student
        if isinstance(self.data, ShardsData) and self.data.unlabeled is None:
            raise ValueError("data.unlabeled is missing: the students of every round read it")
        if len(student.ladder) > self.rounds:
            raise ValueError(
                f"student.ladder has {len(student.ladder)} steps but the run has rounds="
                f"{self.rounds}: steps beyond the last round would never be used."
                " Shorten the ladder or raise rounds"
            )
        for round_index in range(1, max(1, len(student.ladder)) + 1):
            named = f"student.ladder, step {round_index}" if student.ladder else "student"
            check_training(student.for_round(round_index), student.followers(), named=named)
        self._check_teacher()
        self._refuse_useless_settings(student)
        self._refuse_impossible_labeling(student)
        self._refuse_other_architectures(student)
        self._refuse_teachers_of_another_size(student)
        return self

    @model_validator(mode="after")
    def _steps_divide_among_processes(self) -> "SelfTrainingConfig":
        launch = self.launch
        if not isinstance(launch, LocalLaunch) or launch.processes == "auto":
            return self
        trainings: list[tuple[str, TrainingConfig, tuple[tuple[str, FinetuneConfig], ...]]] = []
        if (trained := trained_teacher(self.teacher)) is not None:
            name, teacher = trained
            trainings.append((name, teacher.training(), teacher.followers()))
        if self.student is not None:
            followers = self.student.followers()
            for round_index in range(1, max(1, len(self.student.ladder)) + 1):
                trainings.append(("student", self.student.for_round(round_index), followers))
        for name, training, after in trainings:
            named = ((f"{name}.{role}", one.training(training)) for role, one in after)
            for where, config in ((name, training), *named):
                try:
                    parts_of_step(config, launch.processes)
                except ValueError as error:
                    raise ValueError(
                        f"launch.processes={launch.processes} does not fit {where}: {error}"
                    ) from None
        return self

    def _refuse_without_rounds(self) -> None:
        """Refuse a student without rounds, rounds without a student, and a baseline of nothing."""
        if self.rounds > 0:
            raise ValueError(
                f"student is missing: rounds={self.rounds} students are to be trained. Describe"
                " it, or set rounds: 0 for the teacher alone"
            )
        useless = [
            name
            for name, is_given in (
                ("student", self.student is not None),
                ("baseline", self.baseline),
                ("approve", self.approve != "none"),
                *_changed_sections(self),
            )
            if is_given
        ]
        if useless:
            raise ValueError(
                f"rounds=0 trains the teacher alone, so {', '.join(useless)} cannot take effect:"
                " leave it out (baseline: false), or raise rounds"
            )
        self._check_teacher()

    def _check_teacher(self) -> None:
        if (trained := trained_teacher(self.teacher)) is not None:
            name, teacher = trained
            check_training(teacher.training(), teacher.followers(), named=name)

    def _refuse_useless_settings(self, student: StudentConfig) -> None:
        """Refuse what an objective that labels while it trains would leave unread."""
        all_needs = [needs_of(student.for_round(i)) for i in range(1, self.rounds + 1)]
        useless = [name for name, is_changed in _changed_sections(self) if is_changed]
        if useless and not any(needs.selection for needs in all_needs):
            raise ValueError(
                f"student.objective.kind={student.objective.kind} reads no stored pseudo-labels,"
                f" so {', '.join(useless)} cannot take effect: leave it out"
            )
        reads_teacher = any(needs.selection or needs.teacher for needs in all_needs)
        if self.rounds > 1 and not reads_teacher and not isinstance(student.init, TeacherInit):
            raise ValueError(
                f"rounds={self.rounds}, but a student with objective.kind={student.objective.kind}"
                " reads nothing of its teacher: later rounds would repeat the first under another"
                " seed. Set rounds: 1, or init: {kind: teacher}"
            )

    def _refuse_impossible_labeling(self, student: StudentConfig) -> None:
        """Refuse views that a teacher cannot be shown, and rules that read what is not measured."""
        labeling = self.labeling
        of_uncertainty = self.selection.reads_uncertainty
        if of_uncertainty is not None and labeling.uncertainty.kind == "none":
            raise ValueError(
                f"selection.{of_uncertainty} reads a deviation that is not measured: set"
                " labeling.uncertainty, for example {kind: mc_dropout}"
            )
        for round_index in range(1, self.rounds + 1):
            self._refuse_settings_on_too_few_teachers(round_index)
        teachers = [
            ("student", student.for_round(i), student.followers()) for i in range(1, self.rounds)
        ]
        if (trained := trained_teacher(self.teacher)) is not None:
            teachers.append(("teacher", trained[1].training(), trained[1].followers()))
        uncertainty = labeling.uncertainty
        for name, config, followers in teachers:
            size = resulting_size(config, followers)
            check_views(labeling.view, architecture_at(config.architecture, size), size)
            noise = followers[-1][1].noise if followers else config.noise
            if isinstance(uncertainty, McDropoutConfig) and not (uncertainty.rate or noise.dropout):
                raise ValueError(
                    "labeling.uncertainty.kind=mc_dropout leaves dropout on as in training, but the"
                    f" last training of a {name} that labels has none: set its noise.dropout, or"
                    " labeling.uncertainty.rate"
                )

    def _refuse_settings_on_too_few_teachers(self, round_index: int) -> None:
        """Refuse what only several predictions of an image give, where one is made."""
        num_teachers = self.extra_teachers.num_teachers(round_index)
        where = "" if self.extra_teachers == NO_EXTRA_TEACHERS else f"round {round_index}: "
        try:
            self.labeling.check_members(num_teachers)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        reader = self.selection.reads_several_predictions
        if reader is not None and self.labeling.num_members(num_teachers) == 1:
            raise ValueError(
                f"{where}selection.{reader} counts votes, but one prediction is made of each image:"
                " set labeling.view, labeling.uncertainty or extra_teachers"
            )

    def _refuse_other_architectures(self, student: StudentConfig) -> None:
        """Refuse weights to start from that cannot fit every round's network."""
        if isinstance(student.init, ScratchInit):
            return
        students = [student.for_round(i).architecture for i in range(1, self.rounds + 1)]
        chain = [("student", one) for one in students]
        trained = trained_teacher(self.teacher)
        if isinstance(student.init, TeacherInit) and trained is not None:
            chain = [("teacher", trained[1].architecture), *chain]
        for (before, one), (_, other) in pairwise(chain):
            if architecture_name(one) != architecture_name(other):
                raise ValueError(
                    f"student.init.kind={student.init.kind} takes weights over, but a student is a"
                    f" {architecture_name(other)} and the {before} before it a"
                    f" {architecture_name(one)}: give them one architecture, or init: scratch"
                )

    def _refuse_teachers_of_another_size(self, student: StudentConfig) -> None:
        """Refuse a teacher that would be shown a student's views at a size it is not made for."""
        teacher_size = None  # of a given one: known when the training loads it
        if (trained := trained_teacher(self.teacher)) is not None:
            teacher_size = resulting_size(trained[1].training(), trained[1].followers())
        for round_index in range(1, self.rounds + 1):
            config = student.for_round(round_index)
            sizes = (teacher_size, config.image_size)
            if needs_of(config).teacher and teacher_size is not None and len(set(sizes)) > 1:
                raise ValueError(
                    f"student.objective.kind={config.objective.kind} shows the teacher of round"
                    f" {round_index}, made for {teacher_size} pixels, the student's own views of"
                    f" {config.image_size}: give both one image_size"
                )
            teacher_size = resulting_size(config, student.followers())


def _changed_sections(config: SelfTrainingConfig) -> tuple[tuple[str, bool], ...]:
    """Return the sections on stored pseudo-labels and whether anything in them was chosen."""
    return (
        # full: the default of stored configs from before there was another form.
        ("labeling", config.labeling not in (LabelingConfig(), LabelingConfig(form="full"))),
        ("selection", config.selection != SelectionConfig()),
        ("extra_teachers", config.extra_teachers != NO_EXTRA_TEACHERS),
    )
