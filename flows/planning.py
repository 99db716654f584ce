"""What a run would compute and what it would find in the store, before anything is spent."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flows.config import SelfTrainingConfig
from flows.graph import ModelRef, RunGraph, View
from flows.opening import Pins, check_same, reopen_run, resolve_inputs
from storage.checkpoints import newest_checkpoint
from storage.corpus import load_corpus
from storage.manifest import read_provenance
from storage.runs import UnknownRun
from storage.store import Store
from tasks.classifiers import read_description
from tasks.labeling import shards_to_label
from tasks.specifications import Specification

PLAN_SCHEMA = 1
_BYTES_PER_PREDICTION = 60  # key and scalar columns; 2 more a class


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan.

    Attributes:
        kind: of the stage.
        round_index: 0 for the teacher.
        fingerprint: where its result is or will be.
        assumed: it depends on a promotion that has not happened yet.
        state: reused, partial (goes on from what is there) or to_do.
        samples: images it reads, repetitions counted for training.
        shards_done: shards already labelled, None for other stages.
        shards: shards in all, None for other stages.
        estimated_seconds: 0 where it is reused; else from the rate of finished stages of this run
            that are like it, None where there is none.
        estimated_bytes: to be written; None where unknown.
    """

    kind: str
    round_index: int
    fingerprint: str
    assumed: bool
    state: str
    samples: int
    shards_done: int | None = None
    shards: int | None = None
    estimated_seconds: float | None = None
    estimated_bytes: int | None = None


def plan_run(store: Store, config: SelfTrainingConfig) -> list[PlannedStage]:
    """List the stages of a run in order, assuming that every student is promoted.

    The corpora are indexed (and the demo's are made) for it; the run itself is not created.

    Raises: RunExists, as the run itself would, if there is one of this name with another config.
    """
    try:
        run = check_same(reopen_run(store, config.name), config)
        config, pins = run.config, run.pins
    except UnknownRun:
        pins = resolve_inputs(store, config)
    view = None
    if pins.given_teacher is not None:
        view = View.of(read_description(store, pins.given_teacher))
    return _Planner(store, config, pins, RunGraph(config, pins, view)).estimated_stages()


def plan_to_json(stages: list[PlannedStage]) -> dict[str, Any]:
    """Return the documented form, schema 1."""
    return {"schema": PLAN_SCHEMA, "stages": [asdict(stage) for stage in stages]}


@dataclass
class _Planner:
    store: Store
    config: SelfTrainingConfig
    pins: Pins
    graph: RunGraph
    # Kind and, for trainings, network and image size -> (seconds, samples) of finished stages.
    measured: dict[str, tuple[float, int]] = field(default_factory=dict)
    likeness: dict[str, str] = field(default_factory=dict)

    def estimated_stages(self) -> list[PlannedStage]:
        """Return the stages with the seconds that those still to do will take."""
        return [self._with_estimate(stage) for stage in self.stages()]

    def stages(self) -> list[PlannedStage]:
        teacher = self.graph.first_model()
        found: list[PlannedStage] = []
        training = self.graph.teacher()
        if training is not None:
            found.append(self._training(training[0], training[1], 0, assumed=False))
        found += self._evaluations(teacher, assumed=False)
        for round_index in range(1, self.config.rounds + 1):
            # A student is trained on this round's teacher whatever comes; that the teacher is the
            # last student is an assumption from round 2 on.
            assumed = round_index > 1
            found.append(self._label(teacher, round_index, assumed=assumed))
            selection = self.graph.select(teacher, round_index)
            found.append(self._stage(selection, round_index, self._corpus_size(), assumed=assumed))
            specification, training_config = self.graph.student(teacher, round_index)
            found.append(
                self._training(specification, training_config, round_index, assumed=assumed)
            )
            student = self.graph.student_model(teacher, round_index)
            found += self._evaluations(student, assumed=assumed)
            promotion = self.graph.promote(teacher, student)
            found.append(self._stage(promotion, round_index, self._dev_size(), assumed=assumed))
            teacher = student
        if self.config.baseline:
            last = self.config.rounds
            specification, training_config = self.graph.baseline(last)
            found.append(self._training(specification, training_config, last, assumed=last > 1))
            model = ModelRef(specification.fingerprint, View.of(training_config), last)
            found += self._evaluations(model, assumed=last > 1)
        return found

    def _evaluations(self, model: ModelRef, *, assumed: bool) -> list[PlannedStage]:
        found = [
            self._stage(
                self.graph.evaluate("validate", model),
                model.round_index,
                self._dev_size(),
                assumed=assumed,
            )
        ]
        if self.pins.test is not None:
            size = load_corpus(self.store, self.pins.test).num_samples
            test = self.graph.evaluate("test", model)
            found.append(self._stage(test, model.round_index, size, assumed=assumed))
        return found

    def _training(
        self, specification: Specification, config: Any, round_index: int, *, assumed: bool
    ) -> PlannedStage:
        num_labeled = load_corpus(self.store, self.pins.labeled).num_samples
        steps = config.duration.to_steps(config.batch_size, num_labeled)
        samples = steps * config.batch_size * (1 + config.unlabeled_ratio)
        is_begun = (
            newest_checkpoint(self.store, specification.fingerprint, verify=False) is not None
        )
        return self._stage(specification, round_index, samples, assumed=assumed, is_begun=is_begun)

    def _label(self, teacher: ModelRef, round_index: int, *, assumed: bool) -> PlannedStage:
        corpus = load_corpus(self.store, self.pins.unlabeled)
        missing = shards_to_label(self.store, self.graph.labeler(teacher), corpus)
        num_missing = sum(shard.num_samples for shard in missing)
        planned = self._stage(
            self.graph.label(teacher),
            round_index,
            corpus.num_samples,
            assumed=assumed,
            is_begun=len(missing) < len(corpus.shards),
        )
        row_bytes = _BYTES_PER_PREDICTION + 2 * len(self.pins.class_names)
        return replace(
            planned,
            shards_done=len(corpus.shards) - len(missing),
            shards=len(corpus.shards),
            estimated_bytes=num_missing * row_bytes,
        )

    def _stage(
        self,
        specification: Specification,
        round_index: int,
        samples: int,
        *,
        assumed: bool,
        is_begun: bool = False,
    ) -> PlannedStage:
        is_done = specification.result(self.store) is not None
        training = specification.settings.get("training")
        like = specification.kind + (
            f"{training['architecture']}{training['image_size']}" if training else ""
        )
        self.likeness[specification.fingerprint] = like
        if is_done:
            self._measure(specification, like, samples)
        return PlannedStage(
            kind=specification.kind,
            round_index=round_index,
            fingerprint=specification.fingerprint,
            assumed=assumed,
            state="reused" if is_done else "partial" if is_begun else "to_do",
            samples=samples,
            estimated_seconds=0.0 if is_done else None,
            estimated_bytes=0 if is_done else None,
        )

    def _measure(self, specification: Specification, like: str, samples: int) -> None:
        provenance = read_provenance(self.store, specification.folder) or {}
        # A stage that was resumed tells the time of its last attempt only.
        if "seconds" in provenance and not provenance.get("resumed_at_step"):
            seconds, counted = self.measured.get(like, (0.0, 0))
            self.measured[like] = seconds + provenance["seconds"], counted + samples

    def _with_estimate(self, stage: PlannedStage) -> PlannedStage:
        seconds, samples = self.measured.get(self.likeness[stage.fingerprint], (0.0, 0))
        if stage.estimated_seconds is not None or samples == 0:
            return stage
        share = 1.0 if not stage.shards else 1 - (stage.shards_done or 0) / stage.shards
        return replace(stage, estimated_seconds=seconds / samples * stage.samples * share)

    def _corpus_size(self) -> int:
        return load_corpus(self.store, self.pins.unlabeled).num_samples

    def _dev_size(self) -> int:
        return load_corpus(self.store, self.pins.dev).num_samples
