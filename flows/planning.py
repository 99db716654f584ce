"""What a run would compute and what it would find in the store, before anything is spent."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flows.approvals import read_approvals, thresholds_by_round
from flows.config import SelfTrainingConfig
from flows.decisions import Decisions
from flows.graph import EvaluationKind, ModelRef, RunGraph, Training, graph_of, model_of
from flows.opening import Pins, check_same, reopen_run, resolve_inputs
from flows.reading_costs import ReadBytes, ReadingCosts, SelectedItems, read_once, stream_reads
from models.weight_bytes import weight_bytes
from storage.checkpoints import newest_checkpoint
from storage.corpus import Corpus, Shard, load_corpus
from storage.manifest import read_provenance
from storage.runs import UnknownRun
from storage.store import Store
from tasks.guarding import BYTES_PER_DESCRIPTOR, SPLITS, shards_to_search
from tasks.labeling import shards_to_label
from tasks.labeling_config import resolved_form
from tasks.shard_openers import bytes_of_targets
from tasks.specifications import Specification, read_result
from tasks.training_orders import images_per_step

PLAN_SCHEMA = 1
_BYTES_PER_PREDICTION = 60  # key and scalar columns, without the probabilities
_BYTES_PER_TARGET = 2 + 4  # half float and class
_BYTES_PER_SELECTED = 30  # key and scalar columns, without the targets


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan.

    Attributes:
        kind: of the stage.
        part: of a training: teacher, student, baseline, finetune or resolution_fix; else None.
        round_index: 0 for the teacher.
        fingerprint: where its result is or will be.
        assumed: it depends on a promotion, or on the answer of a person, that is not there yet.
        state: reused, partial (goes on from what is there) or to_do.
        samples: images it reads, repetitions counted for training.
        teachers: of a labelling, fingerprints of who labels, the round's teacher first; else None.
        shards_done: shards already labelled or searched, None for other stages.
        shards: shards in all, None for other stages.
        estimated_seconds: 0 where it is reused; else, for what is left of it, from the rate of
            finished stages of this run that are like it, None where there is none.
        estimated_device_seconds: likewise, of all its devices together.
        estimated_bytes: to be written and kept, before compression; 0 where it is reused.
        read_bytes: of shards, fetched from where they lie if no cache is used; 0 where it is
            reused.
        read_bytes_cached: likewise with the config's cache, or with one that holds everything where
            the config has none. Labelling and evaluation read once, past the cache.
    """

    kind: str
    round_index: int
    fingerprint: str
    assumed: bool
    state: str
    samples: int
    part: str | None = None
    teachers: tuple[str, ...] | None = None
    shards_done: int | None = None
    shards: int | None = None
    estimated_seconds: float | None = None
    estimated_device_seconds: float | None = None
    estimated_bytes: int = 0
    read_bytes: int = 0
    read_bytes_cached: int = 0


def plan_run(store: Store, config: SelfTrainingConfig) -> list[PlannedStage]:
    """List the stages of a run in order, up to where it is known to end.

    What is not decided yet is assumed to come out well: every student that is still to be judged is
    promoted, every question that is still to be answered is accepted.

    The corpora are indexed (and the demo's are made) for it; the run itself is not created.

    Raises: RunExists, as the run itself would, if there is one of this name with another config.
    """
    try:
        run = check_same(reopen_run(store, config.name), config)
        config, pins = run.config, run.pins
        approvals = read_approvals(store, run.name, config)
    except UnknownRun:
        pins, approvals = resolve_inputs(store, config), []
    graph = graph_of(store, config, pins, thresholds_by_round(approvals))
    decisions = Decisions(store, config, graph, approvals)
    return _Planner(store, config, pins, graph, decisions).estimated_stages()


class _Measured(NamedTuple):
    """Finished stages of a kind: what they took, for how many images."""

    seconds: float = 0.0
    device_seconds: float = 0.0
    samples: int = 0


@dataclass
class _Planner:
    store: Store
    config: SelfTrainingConfig
    pins: Pins
    graph: RunGraph
    decisions: Decisions
    # By kind and, for trainings, network and image size.
    measured: dict[str, _Measured] = field(default_factory=dict[str, _Measured])
    likeness: dict[str, str] = field(default_factory=dict)
    # Share that is still to do, by fingerprint of a training with a checkpoint.
    to_do: dict[str, float] = field(default_factory=dict)
    costs: ReadingCosts = field(init=False)

    def __post_init__(self) -> None:
        cache = self.config.cache
        self.costs = ReadingCosts(None if cache is None else cache.max_bytes)

    def estimated_stages(self) -> list[PlannedStage]:
        """Return the stages with the seconds that those still to do will take."""
        return [self._with_estimate(stage) for stage in self.stages()]

    def stages(self) -> list[PlannedStage]:
        teacher = self.graph.first_model()
        models = [teacher]
        found = self._trainings(self.graph.teacher(), assumed=False)
        found += self._evaluations(teacher, assumed=False)
        last_round, assumed = 0, False
        for round_index in range(1, self.config.rounds + 1):
            begins = self.decisions.may_begin(round_index)
            if begins is False:
                break
            last_round, assumed = round_index, assumed or begins is None
            if self.graph.needs(round_index).selection:
                if not any(stage.kind == "guard" for stage in found):
                    found += self._guard(round_index)
                labelings = [self.graph.label(teacher)]
                if self.graph.labels_dev(teacher):
                    labelings.insert(0, self.graph.calibration(teacher))
                teachers = tuple(self.graph.teachers(teacher))
                for one in labelings:
                    found.append(self._label(one, round_index, teachers, assumed=assumed))
                selection = self.graph.select(teacher, round_index)
                found.append(self._select(selection, round_index, assumed=assumed))
            found += self._trainings(self.graph.student(teacher, round_index), assumed=assumed)
            student = self.graph.student_model(teacher, round_index)
            found += self._evaluations(student, assumed=assumed)
            promotion = self.graph.promote(teacher, student)
            dev_size = self._size(self.pins.dev)
            found.append(self._stage(promotion, round_index, dev_size, assumed=assumed))
            models.append(student)
            goes_on = self.decisions.goes_on_with(models)
            if goes_on is False or round_index == self.config.rounds:
                break
            teacher, assumed = student, assumed or goes_on is None
        if self.config.baseline and last_round > 0:
            # Of the last round, so it is assumed if that is.
            trainings = self.graph.baseline(last_round)
            found += self._trainings(trainings, assumed=assumed)
            found += self._evaluations(model_of(trainings), assumed=assumed)
        return found

    def _evaluations(self, model: ModelRef, *, assumed: bool) -> list[PlannedStage]:
        splits: list[tuple[EvaluationKind, str | None]] = [
            ("validate", self.pins.dev),
            ("test", self.pins.test),
        ]
        found: list[PlannedStage] = []
        for kind, digest in splits:
            if digest is None:
                continue
            corpus = load_corpus(self.store, digest)
            specification = self.graph.evaluate(kind, model)
            planned = self._stage(
                specification, model.round_index, corpus.num_samples, assumed=assumed
            )
            num_bytes = self._bytes_per_prediction("full") * corpus.num_samples
            planned = _reading(planned, read_once(corpus.num_bytes))
            found.append(_writing(planned, num_bytes))
        return found

    def _trainings(self, trainings: Sequence[Training], *, assumed: bool) -> list[PlannedStage]:
        labeled = load_corpus(self.store, self.pins.labeled)
        found: list[PlannedStage] = []
        for specification, config in trainings:
            steps = config.duration.to_steps(config.batch_size, labeled.num_samples)
            begun = newest_checkpoint(self.store, specification.fingerprint, verify=False)
            planned = self._stage(
                specification,
                specification.settings["round_index"],
                steps * images_per_step(config).all,
                assumed=assumed,
                is_begun=begun is not None,
            )
            if begun is not None:
                self.to_do[specification.fingerprint] = 1 - begun.step / steps
            if planned.state != "reused":
                reads = stream_reads(
                    config,
                    steps=steps - (0 if begun is None else begun.step),
                    labeled=labeled,
                    unlabeled=self._unlabeled_of(specification),
                    selected=self._selected(specification),
                )
                planned = _reading(planned, self.costs.of_training(reads))
                planned = _writing(
                    planned,
                    weight_bytes(
                        config.architecture,
                        num_classes=len(self.pins.class_names),
                        image_size=config.image_size,
                    ),
                )
            found.append(replace(planned, part=specification.settings["role"]))
        return found

    def _unlabeled_of(self, training: Specification) -> Corpus | None:
        if not {"selection", "unlabeled"} & training.inputs.keys():
            return None
        return load_corpus(self.store, self.graph.unlabeled)

    def _selected(self, training: Specification) -> SelectedItems | None:
        fingerprint = training.inputs.get("selection")
        if fingerprint is None:
            return None
        selection = read_result(self.store, "select", fingerprint)
        if selection is None:
            return None
        of_targets = bytes_of_targets(selection, len(self.pins.class_names))
        return SelectedItems(sum(selection.counts["items"].values()), sum(of_targets.values()))

    def _guard(self, round_index: int) -> list[PlannedStage]:
        """Return the search for leaks, where there is one: it depends on no teacher."""
        guard = self.graph.guard()
        if guard is None:
            return []
        splits = (load_corpus(self.store, guard.inputs[s]) for s in SPLITS if s in guard.inputs)
        return [
            self._by_shard(
                guard,
                round_index,
                load_corpus(self.store, self.graph.unlabeled),
                shards_to_search(self.store, guard),
                assumed=False,
                bytes_per_row=BYTES_PER_DESCRIPTOR,
                more_bytes_read=sum(split.num_bytes for split in splits),
            )
        ]

    def _label(
        self,
        specification: Specification,
        round_index: int,
        teachers: tuple[str, ...],
        *,
        assumed: bool,
    ) -> PlannedStage:
        corpus = load_corpus(self.store, specification.inputs["corpus"])
        planned = self._by_shard(
            specification,
            round_index,
            corpus,
            shards_to_label(self.store, specification.inputs["labeler"], corpus),
            assumed=assumed,
            bytes_per_row=self._bytes_per_prediction(
                resolved_form(self.config.labeling, len(self.pins.class_names))
            ),
            passes=len(teachers),
        )
        return replace(planned, teachers=teachers)

    def _select(
        self, specification: Specification, round_index: int, *, assumed: bool
    ) -> PlannedStage:
        """Return a selection, whose bytes are those of one that keeps every label."""
        size = self._size(self.graph.unlabeled)
        planned = self._stage(specification, round_index, size, assumed=assumed)
        labeling, num_classes = self.config.labeling, len(self.pins.class_names)
        is_soft = self.config.selection.target == "soft"
        is_full = resolved_form(labeling, num_classes) == "full"
        num_listed = (num_classes if is_full else labeling.k) if is_soft else 0
        return _writing(planned, size * (_BYTES_PER_SELECTED + _BYTES_PER_TARGET * num_listed))

    def _by_shard(
        self,
        specification: Specification,
        round_index: int,
        corpus: Corpus,
        missing: Sequence[Shard],
        *,
        assumed: bool,
        bytes_per_row: int,
        more_bytes_read: int = 0,
        passes: int = 1,
    ) -> PlannedStage:
        """Return a stage that commits shard by shard, of which some may be there."""
        planned = self._stage(
            specification,
            round_index,
            corpus.num_samples,
            assumed=assumed,
            is_begun=len(missing) < len(corpus.shards),
            passes=passes,
        )
        num_bytes = more_bytes_read + sum(shard.num_bytes for shard in missing)
        return replace(
            _reading(planned, read_once(num_bytes)),
            shards_done=len(corpus.shards) - len(missing),
            shards=len(corpus.shards),
            estimated_bytes=bytes_per_row * sum(shard.num_samples for shard in missing),
        )

    def _bytes_per_prediction(self, form: str) -> int:
        """Return the bytes of a row: its probabilities are half floats, with ids where few are."""
        labeling, num_classes = self.config.labeling, len(self.pins.class_names)
        probabilities = 2 * num_classes if form == "full" else _BYTES_PER_TARGET * labeling.k
        return _BYTES_PER_PREDICTION + probabilities

    def _stage(
        self,
        specification: Specification,
        round_index: int,
        samples: int,
        *,
        assumed: bool,
        is_begun: bool = False,
        passes: int = 1,
    ) -> PlannedStage:
        is_done = specification.result(self.store) is not None
        training = specification.settings.get("training")
        like = specification.kind + (
            f"{training['architecture']}{training['image_size']}" if training else ""
        )
        self.likeness[specification.fingerprint] = like
        if is_done:
            self._measure(specification, like, samples * passes)
        return PlannedStage(
            kind=specification.kind,
            round_index=round_index,
            fingerprint=specification.fingerprint,
            assumed=assumed,
            state="reused" if is_done else "partial" if is_begun else "to_do",
            samples=samples,
            estimated_seconds=0.0 if is_done else None,
            estimated_device_seconds=0.0 if is_done else None,
        )

    def _measure(self, specification: Specification, like: str, samples: int) -> None:
        """Note the seconds of a finished stage; `samples` counts each teacher's predictions."""
        provenance = read_provenance(self.store, specification.folder) or {}
        # A stage that was resumed tells the time of its last attempt only.
        if "seconds" in provenance and not provenance.get("resumed_at_step"):
            before, seconds = self.measured.get(like, _Measured()), provenance["seconds"]
            self.measured[like] = _Measured(
                before.seconds + seconds,
                before.device_seconds + seconds * (provenance.get("processes") or 1),
                before.samples + samples,
            )

    def _with_estimate(self, stage: PlannedStage) -> PlannedStage:
        measured = self.measured.get(self.likeness[stage.fingerprint], _Measured())
        if stage.estimated_seconds is not None or measured.samples == 0:
            return stage
        share = self.to_do.get(stage.fingerprint, 1.0)
        if stage.shards:
            share = 1 - (stage.shards_done or 0) / stage.shards
        predictions = stage.samples * len(stage.teachers or (None,))
        part = predictions * share / measured.samples
        return replace(
            stage,
            estimated_seconds=measured.seconds * part,
            estimated_device_seconds=measured.device_seconds * part,
        )

    def _size(self, digest: str) -> int:
        return load_corpus(self.store, digest).num_samples


def _reading(stage: PlannedStage, read: ReadBytes) -> PlannedStage:
    """Return the stage with what it will read; a reused one reads nothing."""
    if stage.state == "reused":
        return stage
    return replace(stage, read_bytes=read.uncached, read_bytes_cached=read.cached)


def _writing(stage: PlannedStage, num_bytes: int) -> PlannedStage:
    """Return the stage with what it will leave in the store; a reused one writes nothing."""
    return stage if stage.state == "reused" else replace(stage, estimated_bytes=num_bytes)
