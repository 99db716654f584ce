"""The specifications of a run's stages: known before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, assert_never

from flows.approvals import with_threshold
from flows.config import SelfTrainingConfig
from flows.opening import Pins
from flows.starting_weights import (
    ModelInit,
    PretrainedInit,
    ScratchInit,
    StudentInitConfig,
    TeacherInit,
)
from flows.trained_models import StudentConfig, trained_teacher
from models.finetuning import FinetuneConfig
from models.leak_guard_config import LeakGuardNoneConfig, NearDuplicatesConfig
from models.training import TrainingConfig
from storage.store import Store
from tasks import evaluation, guarding, labeling, selection
from tasks.classifiers import read_description
from tasks.labeling_config import LabelingConfig, resolved_form
from tasks.selection_config import SelectionConfig
from tasks.specifications import Specification
from tasks.teacher_views import Shown
from tasks.training_orders import FollowerRole, Needs, Role, baseline_config, needs_of
from tasks.training_orders import specify as specify_training

EvaluationKind = Literal["validate", "test"]


@dataclass(frozen=True)
class ModelRef:
    """A model of the loop, finished or not.

    Attributes:
        fingerprint: of its training or import.
        view: what it is shown.
        round_index: the round that it came from; 0 is the first teacher.
        earlier: the models that were teachers before it, the newest first.
    """

    fingerprint: str
    view: Shown
    round_index: int
    earlier: tuple["ModelRef", ...] = field(default=(), repr=False)

    @property
    def role(self) -> Literal["teacher", "student"]:
        """What it was trained as."""
        return "teacher" if self.round_index == 0 else "student"


class Training(NamedTuple):
    """One training of a model's chain; the last one's model is what the chain is for."""

    specification: Specification
    config: TrainingConfig

    @property
    def role(self) -> Role:
        """What the training is in its chain."""
        return self.specification.settings["role"]


@dataclass(frozen=True)
class RunGraph:
    """Makes the specification of every stage of one run from facts that are pinned.

    Attributes:
        config: of the run.
        pins: its inputs.
        given_view: what a given teacher is shown; None where round 0 is trained.
        extra_views: of the extra teachers, by fingerprint.
        thresholds: confidences that were given with approvals, by the first round that they hold
            in.
    """

    config: SelfTrainingConfig
    pins: Pins
    given_view: Shown | None = None
    extra_views: Mapping[str, Shown] = field(default_factory=dict[str, Shown])
    thresholds: Mapping[int, float] = field(default_factory=dict[int, float])

    def teacher(self) -> tuple[Training, ...]:
        """Return the trainings of round 0 in their order; none where the teacher is given."""
        trained = trained_teacher(self.config.teacher)
        # A model that was found comes before the section for the case that there is none.
        if trained is None or self.pins.given_teacher is not None:
            return ()
        _, teacher = trained
        config = teacher.training()
        init = self._init(teacher.init, self.pins.teacher_init, teacher=None)
        first = self._train(config, round_index=0, role="teacher", init=init)
        return self._chain(first, teacher.followers())

    def first_model(self) -> ModelRef:
        """Return the model of round 0."""
        trainings = self.teacher()
        if trainings:
            return model_of(trainings)
        assert self.pins.given_teacher is not None
        assert self.given_view is not None
        return ModelRef(self.pins.given_teacher, self.given_view, 0)

    def evaluate(self, kind: EvaluationKind, model: ModelRef) -> Specification:
        """Return the evaluation of a model on dev (validate) or test."""
        corpus = self.pins.dev if kind == "validate" else self.pins.test
        assert corpus is not None, "the test stage exists only where there is a test split"
        return evaluation.specify(
            kind,
            model=model.fingerprint,
            corpus=corpus,
            view=model.view.to_json(),
            class_names=self.pins.class_names,
        )

    def teachers(self, teacher: ModelRef) -> dict[str, Shown]:
        """Return who labels in a teacher's round and what each is shown, the teacher first."""
        earlier = teacher.earlier[: self.config.extra_teachers.earlier_rounds]
        found = {model.fingerprint: model.view for model in (teacher, *earlier)}
        given = (one for one in self.pins.extra_teachers if one not in found)
        return found | {one: self.extra_views[one] for one in given}

    def labeler(self, teacher: ModelRef) -> str:
        """Return the address of the predictions of a teacher's round."""
        validation = self.calibration(teacher).fingerprint
        return self._labeler(self.config.labeling, teacher, validation=validation)

    def _labeler(
        self, config: LabelingConfig, teacher: ModelRef, *, validation: str | None = None
    ) -> str:
        views = {one: view.to_json() for one, view in self.teachers(teacher).items()}
        return labeling.labeler_fingerprint(
            config,
            teacher=teacher.fingerprint,
            view=views.pop(teacher.fingerprint),
            class_names=self.pins.class_names,
            validation=validation,
            more_teachers=views,
        )

    def calibration(self, teacher: ModelRef) -> Specification:
        """Return the stage whose predictions of dev calibrate the labels of a teacher's round.

        Its validation; but where labels are not one clean prediction, dev is labelled as they are.
        """
        if self._is_clean(teacher):
            return self.evaluate("validate", teacher)
        labeler = self._labeler(self.config.labeling.for_dev(), teacher)
        return labeling.specify(labeler=labeler, corpus=self.pins.dev)

    def labels_dev(self, teacher: ModelRef) -> bool:
        """Return whether dev is labelled, too, because a calibration or a gate needs it."""
        config, num_classes = self.config, len(self.pins.class_names)
        is_calibrated = (
            config.selection.reads_validation
            or resolved_form(config.labeling, num_classes) == "top_k"
        )
        return is_calibrated and not self._is_clean(teacher)

    def _is_clean(self, teacher: ModelRef) -> bool:
        return self.config.labeling.is_clean(len(self.teachers(teacher)))

    def label(self, teacher: ModelRef) -> Specification:
        """Return the labelling of the corpus by a teacher.

        Raises: ValueError if the selection could not use it, before days of labelling.
        """
        form = resolved_form(self.config.labeling, len(self.pins.class_names))
        selection.check_calibration(self.config.selection.calibration, form)
        return labeling.specify(labeler=self.labeler(teacher), corpus=self.unlabeled)

    def guard(self) -> Specification | None:
        """Return the search for copies of dev and test images; None where nothing is guarded."""
        config = self.config.selection.leak_guard
        match config:
            case LeakGuardNoneConfig():
                return None
            case NearDuplicatesConfig():
                return guarding.specify(
                    config, corpus=self.unlabeled, dev=self.pins.dev, test=self.pins.test
                )
            case _ as unreachable:
                assert_never(unreachable)

    def selection_rules(self, round_index: int) -> SelectionConfig:
        """Return the rules of a round's selection: the config's, under the threshold given last."""
        since = [first for first in self.thresholds if first <= round_index]
        rules = self.config.selection
        return with_threshold(rules, self.thresholds[max(since)]) if since else rules

    def select(self, teacher: ModelRef, round_index: int) -> Specification:
        """Return the selection of a round's pseudo-labels."""
        guard = self.guard()
        return selection.specify(
            self.selection_rules(round_index),
            labeling=self.label(teacher).fingerprint,
            validation=self.calibration(teacher).fingerprint,
            labeled=self.pins.labeled,
            leaks=None if guard is None else guard.fingerprint,
            seed=self.config.seed,
            round_index=round_index,
        )

    def needs(self, round_index: int) -> Needs:
        """Return what a round's student reads of its teacher and the unlabelled corpus."""
        return needs_of(self._student.for_round(round_index))

    def student(self, teacher: ModelRef, round_index: int) -> tuple[Training, ...]:
        """Return the trainings of a round's student in their order."""
        config = self._student.for_round(round_index)
        needs = self.needs(round_index)
        first = self._train(
            config,
            round_index=round_index,
            role="student",
            init=self._init(self._student.init, self.pins.student_init, teacher=teacher),
            selection=self.select(teacher, round_index).fingerprint if needs.selection else None,
            unlabeled=self.unlabeled if needs.unlabeled else None,
            teacher=teacher.fingerprint if needs.teacher else None,
        )
        return self._chain(first, self._student.followers())

    def student_model(self, teacher: ModelRef, round_index: int) -> ModelRef:
        """Return the model of a round's student."""
        model = model_of(self.student(teacher, round_index))
        return replace(model, earlier=(teacher, *teacher.earlier))

    def promote(self, teacher: ModelRef, student: ModelRef) -> Specification:
        """Return the comparison of teacher and student on dev."""
        return evaluation.specify_promotion(
            teacher=self.evaluate("validate", teacher).fingerprint,
            student=self.evaluate("validate", student).fingerprint,
        )

    def baseline(self, last_round: int) -> tuple[Training, ...]:
        """Return the trainings of the last student's network on labels alone.

        The stages after the student's training follow here, too. Where students start from their
        teachers, the baseline starts from the model of round 0, which has seen labels alone (or was
        given): the same lead without pseudo-labels.
        """
        config = baseline_config(self._student.for_round(last_round))
        init = self._init(self._student.init, self.pins.student_init, teacher=self.first_model())
        first = self._train(config, round_index=last_round, role="baseline", init=init)
        return self._chain(first, self._student.followers())

    @property
    def unlabeled(self) -> str:
        """The digest of the unlabelled corpus."""
        assert self.pins.unlabeled is not None, "runs with rounds have an unlabelled corpus"
        return self.pins.unlabeled

    @property
    def _student(self) -> StudentConfig:
        assert self.config.student is not None, "runs with rounds have a student"
        return self.config.student

    def _chain(
        self, first: Training, followers: Sequence[tuple[FollowerRole, FinetuneConfig]]
    ) -> tuple[Training, ...]:
        """Return a training and the stages after it, each of which starts from the one before."""
        trainings = [first]
        for role, follower in followers:
            before = trainings[-1].specification
            trainings.append(
                self._train(
                    # Of the first one's settings: what a stage leaves open is as in training.
                    follower.training(first.config),
                    round_index=before.settings["round_index"],
                    role=role,
                    init={"init": before.fingerprint},
                    frozen_fraction=follower.frozen_fraction,
                )
            )
        return tuple(trainings)

    def _init(
        self, init: StudentInitConfig, pinned: str | None, *, teacher: ModelRef | None
    ) -> dict[str, str]:
        """Return the inputs that a training starts from."""
        match init:
            case ScratchInit():
                return {}
            case TeacherInit():
                assert teacher is not None, "a teacher's own config knows no such kind"
                return {"init": teacher.fingerprint}
            case ModelInit():
                assert pinned is not None, "pinned when the run was opened"
                return {"init": pinned}
            case PretrainedInit():
                assert pinned is not None, "pinned when the run was opened"
                return {"init_weights": pinned}
            case _ as unreachable:
                assert_never(unreachable)

    def _train(
        self,
        config: TrainingConfig,
        *,
        round_index: int,
        role: Role,
        init: Mapping[str, str],
        selection: str | None = None,
        unlabeled: str | None = None,
        teacher: str | None = None,
        frozen_fraction: float = 0.0,
    ) -> Training:
        specification = specify_training(
            config,
            seed=self.config.seed,
            round_index=round_index,
            role=role,
            class_names=self.pins.class_names,
            labeled=self.pins.labeled,
            selection=selection,
            unlabeled=unlabeled,
            teacher=teacher,
            init=init,
            frozen_fraction=frozen_fraction,
        )
        return Training(specification, config)


def graph_of(
    store: Store,
    config: SelfTrainingConfig,
    pins: Pins,
    thresholds: Mapping[int, float] | None = None,
) -> RunGraph:
    """Return the graph of a run, with what the store knows of the models that it was given.

    Args:
        store: that holds the models.
        config: of the run.
        pins: its inputs.
        thresholds: as in `RunGraph`; None: none were given.
    """

    def view_of(model: str) -> Shown:
        return Shown.of(read_description(store, model))

    given = pins.given_teacher
    return RunGraph(
        config,
        pins,
        None if given is None else view_of(given),
        {model: view_of(model) for model in pins.extra_teachers},
        thresholds or {},
    )


def model_of(trainings: Sequence[Training]) -> ModelRef:
    """Return the model that a chain of trainings ends with."""
    specification, config = trainings[-1]
    round_index = specification.settings["round_index"]
    return ModelRef(specification.fingerprint, Shown.of(config), round_index)
