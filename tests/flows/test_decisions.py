"""Plans of runs that are known to end: promotions, answers and accuracies that the store has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.approvals import answer
from flows.config import SelfTrainingConfig
from flows.graph import RunGraph, graph_of
from flows.opening import open_run
from flows.planning import PlannedStage, plan_run
from flows.terminal import print_plan
from storage.checkpoints import save_checkpoint
from storage.manifest import InputReference, Manifest, commit_manifest, write_provenance
from storage.runs import append_event
from storage.store import Store
from tasks.specifications import Specification

MakeConfig = Callable[..., SelfTrainingConfig]


@pytest.fixture
def store(lab: Any, tmp_path: Path) -> Store:
    return lab.in_empty_store(tmp_path / "own").store


def opened(store: Store, config: SelfTrainingConfig) -> RunGraph:
    return graph_of(store, config, open_run(store, config).pins, {})


def commit(store: Store, specification: Specification, counts: dict[str, Any]) -> None:
    """Commit a result that is nothing but its counts."""
    inputs = {role: InputReference(one, "a" * 64) for role, one in specification.inputs.items()}
    commit_manifest(
        store,
        specification.folder,
        Manifest(
            kind=specification.kind,
            fingerprint=specification.fingerprint,
            stage_version=specification.version,
            settings=specification.settings,
            inputs=inputs,
            objects=(),
            counts=counts,
        ),
    )


def judge(store: Store, graph: RunGraph, *, is_promoted: bool, accuracies: list[float]) -> None:
    """Commit the validations of the models of rounds 0, 1, ... and the last one's promotion."""
    models = [graph.first_model()]
    for round_index in range(1, len(accuracies)):
        models.append(graph.student_model(models[-1], round_index))
    for model, accuracy in zip(models, accuracies, strict=True):
        commit(store, graph.evaluate("validate", model), {"accuracy": accuracy})
    commit(store, graph.promote(*models[-2:]), {"is_promoted": is_promoted})


def by_round(stages: list[PlannedStage]) -> dict[int, set[bool]]:
    """Return, by round, whether its stages are assumed; the baseline is of the last round."""
    return {
        index: {one.assumed for one in stages if one.round_index == index}
        for index in sorted({one.round_index for one in stages})
    }


def baseline_rounds(stages: list[PlannedStage]) -> list[int]:
    return [one.round_index for one in stages if one.part == "baseline"]


def test_plan_assumes_promotions_that_are_still_to_come(
    store: Store, tiny_config: MakeConfig
) -> None:
    stages = plan_run(store, tiny_config(store.url, "rounds=3"))

    assert by_round(stages) == {0: {False}, 1: {False}, 2: {True}, 3: {True}}
    assert baseline_rounds(stages) == [3]


def test_promotion_that_is_in_the_store_is_not_assumed(
    store: Store, tiny_config: MakeConfig
) -> None:
    config = tiny_config(store.url, "rounds=3")
    judge(store, opened(store, config), is_promoted=True, accuracies=[0.5, 0.4])

    assert by_round(plan_run(store, config)) == {0: {False}, 1: {False}, 2: {False}, 3: {True}}


def test_plan_ends_with_the_round_whose_student_was_not_promoted(
    store: Store, tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(store.url, "rounds=3")
    judge(store, opened(store, config), is_promoted=False, accuracies=[0.5, 0.1])

    stages = plan_run(store, config)

    assert by_round(stages) == {0: {False}, 1: {False}}
    assert baseline_rounds(stages) == [1]
    print_plan(stages, 3)
    shown = capsys.readouterr().out
    assert "no round after round 1 of 3" in shown
    assert "assuming" not in shown


@pytest.mark.parametrize(("second", "rounds"), [(0.5, [0, 1]), (0.6, [0, 1, 2, 3])])
def test_plan_ends_where_patience_has_run_out(
    store: Store, tiny_config: MakeConfig, second: float, rounds: list[int]
) -> None:
    config = tiny_config(store.url, "rounds=3", "stop.patience_rounds=1")
    judge(store, opened(store, config), is_promoted=True, accuracies=[0.5, second])

    assert list(by_round(plan_run(store, config))) == rounds


def test_plan_follows_the_answers_about_promotions(store: Store, tiny_config: MakeConfig) -> None:
    config = tiny_config(store.url, "rounds=3", "approve=promotion")
    graph = opened(store, config)
    judge(store, graph, is_promoted=True, accuracies=[0.5, 0.6])
    assert by_round(plan_run(store, config)) == {0: {False}, 1: {False}, 2: {True}, 3: {True}}

    student = graph.student_model(graph.first_model(), 1).fingerprint
    append_event(store, "tiny", "run_waiting", question="promotion", round_index=1, model=student)
    answer(store, "tiny", "reject", by="ada@lab")

    stages = plan_run(store, config)
    assert by_round(stages) == {0: {False}, 1: {False}}
    assert baseline_rounds(stages) == [1]


def test_what_follows_an_open_question_is_assumed_whatever_another_run_has_computed(
    store: Store, tiny_config: MakeConfig
) -> None:
    config = tiny_config(store.url, "rounds=3", "approve=promotion")
    graph = opened(store, config)
    judge(store, graph, is_promoted=True, accuracies=[0.5, 0.6])
    append_event(store, "tiny", "run_waiting", question="promotion", round_index=1, model="a" * 64)
    other = tiny_config(store.url, "rounds=3", name="other")
    judge(store, opened(store, other), is_promoted=True, accuracies=[0.5, 0.6, 0.7])

    assert by_round(plan_run(store, other)) == {0: {False}, 1: {False}, 2: {False}, 3: {False}}
    assert by_round(plan_run(store, config)) == {0: {False}, 1: {False}, 2: {True}, 3: {True}}


def test_plan_follows_the_answers_about_rounds(store: Store, tiny_config: MakeConfig) -> None:
    config = tiny_config(store.url, "rounds=2", "approve=round")
    graph = opened(store, config)
    assert by_round(plan_run(store, config)) == {0: {False}, 1: {True}, 2: {True}}

    teacher = graph.first_model().fingerprint
    append_event(store, "tiny", "run_waiting", question="round", round_index=0, model=teacher)
    answer(store, "tiny", "reject", by="ada@lab")

    stages = plan_run(store, config)
    assert by_round(stages) == {0: {False}}
    assert baseline_rounds(stages) == [], "no student was trained that it could be held against"


def test_training_with_a_checkpoint_is_estimated_by_what_is_left_of_it(
    store: Store, tiny_config: MakeConfig
) -> None:
    config = tiny_config(store.url, "rounds=1", "student.unlabeled_ratio=1")
    graph = opened(store, config)
    ((teacher, _),) = graph.teacher()
    ((student, _),) = graph.student(graph.first_model(), 1)
    commit(store, teacher, {})
    # 12 steps of 6 images in 36 s: 2 images a second.
    write_provenance(store, teacher.folder, {"seconds": 36.0})

    def seconds() -> float | None:
        stages = plan_run(store, config)
        return next(one.estimated_seconds for one in stages if one.part == "student")

    assert seconds() == pytest.approx(72)  # 12 steps of 6 + 6 images
    save_checkpoint(store, student.fingerprint, "first", 4, b"state", {})
    assert seconds() == pytest.approx(48)  # 8 of the 12 steps are left
