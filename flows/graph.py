"""The specifications of a run's stages: known before anything is computed."""

from dataclasses import dataclass
from typing import Any, Literal

from flows.config import SelfTrainingConfig, TrainedTeacher
from flows.opening import Pins
from models.training import TrainingConfig
from tasks import evaluation, labeling, selection
from tasks.specifications import Specification
from tasks.training_orders import baseline_config
from tasks.training_orders import specify as specify_training

EvaluationKind = Literal["validate", "test"]


@dataclass(frozen=True)
class View:
    """The clean view that a model sees."""

    image_size: int
    crop_padding: int
    interpolation: str

    @classmethod
    def of(cls, config: Any) -> "View":
        """Take the view out of a training's config or a model's description."""
        return cls(config.image_size, config.crop_padding, config.interpolation)

    def to_json(self) -> dict[str, Any]:
        """Return the settings that enter fingerprints."""
        return {
            "image_size": self.image_size,
            "crop_padding": self.crop_padding,
            "interpolation": self.interpolation,
        }


@dataclass(frozen=True)
class ModelRef:
    """A model of the loop, finished or not.

    Attributes:
        fingerprint: of its training or import.
        view: what it is shown.
        round_index: the round that it came from; 0 is the first teacher.
    """

    fingerprint: str
    view: View
    round_index: int


@dataclass(frozen=True)
class RunGraph:
    """Makes the specification of every stage of one run from config and pins alone."""

    config: SelfTrainingConfig
    pins: Pins
    given_view: View | None = None

    def teacher(self) -> tuple[Specification, TrainingConfig] | None:
        """Return the training of round 0, or None where the teacher is given."""
        if not isinstance(self.config.teacher, TrainedTeacher):
            return None
        config = self.config.teacher.training()
        return self._train(config, round_index=0, role="teacher", selection=None), config

    def first_model(self) -> ModelRef:
        """Return the model of round 0."""
        training = self.teacher()
        if training is not None:
            return ModelRef(training[0].fingerprint, View.of(training[1]), 0)
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

    def labeler(self, teacher: ModelRef) -> str:
        """Return the address of a teacher's predictions."""
        return labeling.labeler_fingerprint(
            self.config.labeling,
            teacher=teacher.fingerprint,
            view=teacher.view.to_json(),
            class_names=self.pins.class_names,
        )

    def label(self, teacher: ModelRef) -> Specification:
        """Return the labelling of the corpus by a teacher."""
        return labeling.specify(labeler=self.labeler(teacher), corpus=self.pins.unlabeled)

    def select(self, teacher: ModelRef, round_index: int) -> Specification:
        """Return the selection of a round's pseudo-labels."""
        return selection.specify(
            self.config.selection,
            labeling=self.label(teacher).fingerprint,
            validation=self.evaluate("validate", teacher).fingerprint,
            seed=self.config.seed,
            round_index=round_index,
        )

    def student(self, teacher: ModelRef, round_index: int) -> tuple[Specification, TrainingConfig]:
        """Return the training of a round's student."""
        config = self.config.student.for_round(round_index)
        chosen = self.select(teacher, round_index).fingerprint
        return (
            self._train(config, round_index=round_index, role="student", selection=chosen),
            config,
        )

    def student_model(self, teacher: ModelRef, round_index: int) -> ModelRef:
        """Return the model of a round's student."""
        specification, config = self.student(teacher, round_index)
        return ModelRef(specification.fingerprint, View.of(config), round_index)

    def promote(self, teacher: ModelRef, student: ModelRef) -> Specification:
        """Return the comparison of teacher and student on dev."""
        return evaluation.specify_promotion(
            teacher=self.evaluate("validate", teacher).fingerprint,
            student=self.evaluate("validate", student).fingerprint,
        )

    def baseline(self, last_round: int) -> tuple[Specification, TrainingConfig]:
        """Return the training of the last student's network on labels alone."""
        config = baseline_config(self.config.student.for_round(last_round))
        return (
            self._train(config, round_index=last_round, role="baseline", selection=None),
            config,
        )

    def _train(
        self,
        config: TrainingConfig,
        *,
        round_index: int,
        role: Literal["teacher", "student", "baseline"],
        selection: str | None,
    ) -> Specification:
        return specify_training(
            config,
            seed=self.config.seed,
            round_index=round_index,
            role=role,
            class_names=self.pins.class_names,
            labeled=self.pins.labeled,
            selection=selection,
        )
