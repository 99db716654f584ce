"""Carries out the stages of one run: records what it refers to, runs the task, says what came."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from prefect import get_run_logger

from flows.approvals import (
    Question,
    QuestionKind,
    WaitingForApproval,
    read_approval_or_ask,
    read_approvals,
    thresholds_by_round,
)
from flows.artifacts import artifact_key, show_results, tagged
from flows.going_on import asking_flow_run
from flows.graph import EvaluationKind, ModelRef, RunGraph, Training, graph_of, model_of
from flows.guarding import guard_corpus
from flows.labeling import LabelingOrder
from flows.mending import reading_predictions
from flows.opening import OpenRun
from flows.run_status import RunStatus, read_status
from flows.selection import select_pseudo_labels
from flows.tracking import Trackers
from flows.views import write_views
from flows.watching import Watcher
from models.architectures import architecture_name
from storage.manifest import Manifest
from storage.runs import append_event
from tasks import stages
from tasks.evaluation import read_report
from tasks.labeling_config import LabelingConfig
from tasks.loading import LoadingConfig
from tasks.specifications import Specification
from tasks.training_orders import TrainingOrder


@dataclass
class RunDriver:
    """One run in progress; its methods are the sentences of the method in self_training.py."""

    run: OpenRun
    watcher: Watcher
    trackers: Trackers
    graph: RunGraph = field(init=False)
    _is_guarded: bool = field(init=False, default=False)
    _note: str = field(init=False, default="")
    _num_computed: int = field(init=False, default=0)
    _num_shown: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        approvals = read_approvals(self.run.store, self.run.name, self.run.config)
        self.graph = graph_of(
            self.run.store, self.run.config, self.run.pins, thresholds_by_round(approvals)
        )

    def train_teacher(self) -> ModelRef:
        """Train the model of round 0 on the labels alone, or take the given one."""
        self._train(self.graph.teacher(), title="round 0")
        return self.graph.first_model()

    def reads_stored_labels(self, round_index: int) -> bool:
        """Return whether the round's student learns from labels made and selected beforehand.

        Online objectives (FixMatch, a teacher that is called while training) do not.
        """
        return self.graph.needs(round_index).selection

    def label(self, teacher: ModelRef, round_index: int) -> None:
        """Label the corpus with the teacher, and with the extra ones where there are any.

        Before it dev, where that calibrates the labels.
        """
        *of_dev, of_corpus = self._labelings(teacher, round_index)
        for one in of_dev:
            self._carry_out(one.specification, round_index, "label", one.run)
        self._carry_out(of_corpus.specification, round_index, "label", of_corpus.run, reads=of_dev)

    def _labelings(self, teacher: ModelRef, round_index: int) -> list[LabelingOrder]:
        """Return the labellings of a round: of dev, where that calibrates, and of the corpus."""
        config = self.run.config.labeling
        title = f"round {round_index} · label"
        _, *extra_teachers = self.graph.teachers(teacher)

        def of(specification: Specification, config: LabelingConfig, title: str) -> LabelingOrder:
            arguments: dict[str, Any] = {
                "store": self.run.store.url,
                "model": teacher.fingerprint,
                "more_models": extra_teachers,
                "corpus": specification.inputs["corpus"],
                "config": config,
                "class_names": list(self.run.pins.class_names),
                "device": self.run.config.device,
                "max_bad_samples": self.run.config.max_bad_samples,
                "engine": self.run.config.engine,
                "label": title,
                "artifact": self._artifact(round_index, "label"),
                "note": self._note,
                "validation": self.graph.calibration(teacher).fingerprint,
            }
            return LabelingOrder(specification, title, arguments)

        found = [of(self.graph.label(teacher), config, title)]
        if self.graph.labels_dev(teacher):
            found.insert(0, of(self.graph.calibration(teacher), config.for_dev(), f"{title} dev"))
        return found

    def guard(self, round_index: int) -> None:
        """Find copies of dev and test images in the corpus, once a run and if it is asked for."""
        specification = self.graph.guard()
        if specification is None or self._is_guarded:
            return
        title = f"round {round_index} · guard"
        self._carry_out(
            specification,
            round_index,
            "guard",
            lambda: guard_corpus.with_options(flow_run_name=title)(
                store=self.run.store.url,
                corpus=self.graph.unlabeled,
                dev=self.run.pins.dev,
                test=self.run.pins.test,
                config=self.run.config.selection.leak_guard,
                max_bad_samples=self.run.config.max_bad_samples,
                label=title,
                artifact=self._artifact(round_index, "guard"),
                return_state=True,
            ),
        )
        self._is_guarded = True

    def select(self, teacher: ModelRef, round_index: int) -> None:
        """Select pseudo-labels from the teacher's predictions."""
        specification = self.graph.select(teacher, round_index)
        guard = self.graph.guard()
        title = f"round {round_index} · select"
        self._carry_out(
            specification,
            round_index,
            "select",
            lambda: select_pseudo_labels.with_options(flow_run_name=title)(
                store=self.run.store.url,
                labeling=self.graph.label(teacher).fingerprint,
                validation=self.graph.calibration(teacher).fingerprint,
                class_names=list(self.run.pins.class_names),
                config=self.graph.selection_rules(round_index),
                seed=self.run.config.seed,
                round_index=round_index,
                label=title,
                labeled=self.run.pins.labeled,
                leaks=None if guard is None else guard.fingerprint,
                engine=self.run.config.engine,
                return_state=True,
            ),
            reads=self._labelings(teacher, round_index),
        )

    def train_student(self, teacher: ModelRef, round_index: int) -> ModelRef:
        """Train the round's student under noise, and what its order of training puts after it."""
        self._train(self.graph.student(teacher, round_index), title=f"round {round_index}")
        return self.graph.student_model(teacher, round_index)

    def train_baseline(self, last_round: int) -> None:
        """Train and test the last student's network on labels alone, with the same budget.

        Where no student was trained there is nothing to compare.
        """
        if not self.run.config.baseline or last_round == 0:
            return
        trainings = self.graph.baseline(last_round)
        self._train(trainings, title="baseline", event_role="baseline")
        model = model_of(trainings)
        self._evaluate("validate", model, title="baseline · validate", role="baseline")
        if self.run.pins.test is not None:
            self._evaluate("test", model, title="baseline · test", role="baseline")

    def validate(self, model: ModelRef) -> float:
        """Evaluate on dev, which steers the loop, and return the accuracy."""
        title = f"round {model.round_index} · validate"
        accuracy = self._evaluate("validate", model, title=title, role=model.role)
        self._note = f"last dev accuracy {100 * accuracy:.1f} % (round {model.round_index})"
        return accuracy

    def test(self, model: ModelRef) -> None:
        """Evaluate on test, which nothing reads; without a test split nothing happens."""
        if self.run.pins.test is not None:
            title = f"round {model.round_index} · test"
            self._evaluate("test", model, title=title, role=model.role)

    def may_begin(self, round_index: int, teacher: ModelRef) -> bool:
        """Return whether a round may begin, which the config may leave to a person.

        Raises: WaitingForApproval while nobody has answered.
        """
        return self._is_approved("round", round_index - 1, teacher)

    def is_better(self, teacher: ModelRef, student: ModelRef) -> bool:
        """Return whether the student is good enough to be the teacher: not worse on dev."""
        specification = self.graph.promote(teacher, student)
        title = f"round {student.round_index} · promote"
        manifest = self._carry_out(
            specification,
            student.round_index,
            "promote",
            lambda: stages.promote.with_options(task_run_name=title)(
                self.run.store,
                specification,
                teacher=self.graph.evaluate("validate", teacher),
                student=self.graph.evaluate("validate", student),
                return_state=True,
            ),
        )
        return bool(read_report(self.run.store, manifest)["is_promoted"])

    def may_promote(self, student: ModelRef) -> bool:
        """Return whether the student becomes the teacher, which may be left to a person, too.

        Raises: WaitingForApproval while nobody has answered.
        """
        return self._is_approved("promotion", student.round_index, student)

    def _is_approved(self, kind: QuestionKind, round_index: int, model: ModelRef) -> bool:
        if self.run.config.approve != kind:
            return True
        question = Question(kind, round_index, model.fingerprint)
        approval = read_approval_or_ask(self.run.store, self.run.name, question, asking_flow_run())
        if approval is None:
            self._show_results()  # who answers looks at them
            status = read_status(self.run.store, self.run.name)
            raise WaitingForApproval(status.question_in_words())
        # Another driver may have been answered since this one began.
        if approval.threshold is not None:
            thresholds = {**self.graph.thresholds, **thresholds_by_round([approval])}
            self.graph = replace(self.graph, thresholds=thresholds)
        return approval.is_accepted

    def conclude_round(self) -> None:
        """Tell the trackers, and rebuild run.json, report.html and the table in the Prefect UI.

        Where nothing was computed since they were made, they are left as they are. A view that
        cannot be made costs the run nothing: it is logged, and `selftrain report` makes it again.
        """
        if self._num_computed > self._num_shown:
            self._show_results()

    def _show_results(self) -> None:
        self._num_shown = self._num_computed
        self.trackers.publish()  # first: the views say which tracker failed
        try:
            status = write_views(self.run)
        except Exception:
            get_run_logger().exception("the report could not be written; the run goes on")
            status = read_status(self.run.store, self.run.name)
        show_results(self.run.store, status)

    def finish(self, stop_reason: str, model: ModelRef) -> RunStatus:
        """Record how the run ended and which model is its result."""
        append_event(
            self.run.store,
            self.run.name,
            "run_done",
            stop_reason=stop_reason,
            model=model.fingerprint,
            round_index=model.round_index,
            stages_computed=self._num_computed,
        )
        self._show_results()
        return read_status(self.run.store, self.run.name)

    def _train(
        self, trainings: Sequence[Training], *, title: str, event_role: str | None = None
    ) -> None:
        """Carry out the trainings of a model one after the other.

        Args:
            trainings: each starts from the model of the one before.
            title: of the first's model; the stages are named behind it.
            event_role: of all of them in the events; default: each its own.
        """
        for specification, config in trainings:
            round_index, part = (specification.settings[key] for key in ("round_index", "role"))
            role = event_role or part
            label = title if part == title else f"{title} · {part.replace('_', ' ')}"
            named = f"{label} ({architecture_name(config.architecture)})"
            artifact = self._artifact(round_index, role if role == part else f"{role}-{part}")
            order = TrainingOrder(
                specification,
                config,
                self.run.config.max_bad_samples,
                LoadingConfig(
                    cache=self.run.config.cache,
                    loader_threads=self.run.config.loader_threads,
                    materialize=self.run.config.materialize,
                ),
            )
            with self.trackers.following(specification.fingerprint):
                self._carry_out(
                    specification,
                    round_index,
                    role,
                    partial(
                        stages.train.with_options(task_run_name=named),
                        self.run.store,
                        order,
                        device=self.run.config.device,
                        label=label,
                        artifact=artifact,
                        launch=self.run.config.launch,
                        note=self._note,
                        return_state=True,
                    ),
                )

    def _evaluate(self, kind: EvaluationKind, model: ModelRef, *, title: str, role: str) -> float:
        specification = self.graph.evaluate(kind, model)
        manifest = self._carry_out(
            specification,
            model.round_index,
            role,
            lambda: stages.evaluate.with_options(task_run_name=title)(
                self.run.store,
                specification,
                device=self.run.config.device,
                max_bad_samples=self.run.config.max_bad_samples,
                return_state=True,
            ),
        )
        return float(manifest.counts["accuracy"])

    def _carry_out(
        self,
        specification: Specification,
        round_index: int,
        role: str,
        compute: Callable[[], Any],
        *,
        reads: Sequence[LabelingOrder] = (),
    ) -> Manifest:
        """Record the reference, run the stage, record its end; return the committed result.

        Args:
            specification: of the stage.
            round_index: that it belongs to.
            role: of the stage in its round.
            compute: runs it and returns its final state.
            reads: labellings whose predictions it reads; damaged ones are made again.
        """
        facts = {
            "kind": specification.kind,
            "role": role,
            "round_index": round_index,
            "fingerprint": specification.fingerprint,
        }
        if specification.kind == "train":
            facts["part"] = specification.settings["role"]
        if specification.kind == "label":
            # Its shards are recorded under the labeler: a restart counts them there.
            facts["labeler"] = specification.inputs["labeler"]
        # Before it is used, so that garbage collection sees what a run is about to need.
        append_event(self.run.store, self.run.name, "stage_referenced", **facts)
        started = time.monotonic()

        def succeed() -> Any:
            state = compute()
            state.result()
            return state

        def mend() -> None:
            for one in reads:
                one.mend()

        with tagged(self.run.name, role if role == "baseline" else f"round-{round_index}"):
            state = reading_predictions(succeed, mend, log=get_run_logger())
        manifest = specification.result(self.run.store)
        if manifest is None:
            raise RuntimeError(
                f"stage {specification.kind} ended without {specification.folder}/manifest.json:"
                " was the store changed while the run went on?"
            )
        is_reused = state.name == "Reused"
        self._num_computed += not is_reused
        append_event(
            self.run.store,
            self.run.name,
            "stage_done",
            **facts,
            manifest_sha256=manifest.sha256,
            is_reused=is_reused,
            seconds=round(time.monotonic() - started, 3),
        )
        self.watcher.on_stage(specification.kind, round_index, manifest, is_reused=is_reused)
        return manifest

    def _artifact(self, round_index: int, role: str) -> str:
        return artifact_key("progress", self.run.name, f"r{round_index}", role)
