"""What a run would compute and what it would find in the store, before anything is spent."""

from dataclasses import asdict, dataclass
from typing import Any

from flows.config import SelfTrainingConfig
from flows.graph import ModelRef, RunGraph, View
from flows.opening import Pins, reopen_run, resolve_inputs
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
        estimated_seconds: what it took when it was computed; None where it was not yet.
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
    """
    try:
        run = reopen_run(store, config.name)
        config, pins = run.config, run.pins
    except UnknownRun:
        pins = resolve_inputs(store, config)
    view = None
    if pins.given_teacher is not None:
        view = View.of(read_description(store, pins.given_teacher))
    return _Planner(store, config, pins, RunGraph(config, pins, view)).stages()


def plan_to_json(stages: list[PlannedStage]) -> dict[str, Any]:
    """Return the documented form, schema 1."""
    return {"schema": PLAN_SCHEMA, "stages": [asdict(stage) for stage in stages]}


@dataclass
class _Planner:
    store: Store
    config: SelfTrainingConfig
    pins: Pins
    graph: RunGraph

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
        return PlannedStage(
            **{
                **asdict(planned),
                "shards_done": len(corpus.shards) - len(missing),
                "shards": len(corpus.shards),
                "estimated_bytes": num_missing * row_bytes,
            }
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
        provenance = read_provenance(self.store, specification.folder) if is_done else None
        return PlannedStage(
            kind=specification.kind,
            round_index=round_index,
            fingerprint=specification.fingerprint,
            assumed=assumed,
            state="reused" if is_done else "partial" if is_begun else "to_do",
            samples=samples,
            estimated_seconds=(provenance or {}).get("seconds"),
            estimated_bytes=0 if is_done else None,
        )

    def _corpus_size(self) -> int:
        return load_corpus(self.store, self.pins.unlabeled).num_samples

    def _dev_size(self) -> int:
        return load_corpus(self.store, self.pins.dev).num_samples
