"""Runs whose students are not trained in one joint stage, each whole: stages, events and status."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config import SelfTrainingConfig
from flows.loading import load_config
from flows.opening import open_run
from flows.planning import plan_run
from flows.run_status import RunStatus, read_status
from flows.self_training import self_training
from flows.terminal import print_status
from storage.runs import append_event, list_runs, read_events
from storage.shard_cache import CacheTooSmall
from storage.store import Store, open_store
from tasks.report_facts import trainings
from tasks.specifications import read_result

pytestmark = pytest.mark.usefixtures("prefect_api", "trained_here")

MakeConfig = Callable[..., SelfTrainingConfig]

_FINETUNE = "duration: {steps: 4}, optimizer: {kind: sgd, lr: 0.01}, batch_size: 6"
FINETUNE = f"student.finetune={{{_FINETUNE}}}"
FIX = f"student.resolution_fix={{{_FINETUNE}, image_size: 12, frozen_fraction: 0.5}}"
TEACHER_FIX = f"teacher.resolution_fix={{{_FINETUNE}, image_size: 12}}"
ONLINE = ("rounds=1", "baseline=false", "selection={}")


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders") / "store"


def carried_out(config: SelfTrainingConfig) -> tuple[Store, RunStatus]:
    self_training(config)
    assert config.store is not None
    store = open_store(config.store)
    return store, read_status(store, config.name)


def kinds(stages: list[dict[str, Any]]) -> list[str]:
    return [stage["part"] or stage["kind"] for stage in stages]


@pytest.fixture(scope="module")
def fixed(
    folder: Path, prefect_api: str, trained_here: list[str], tiny_config: MakeConfig
) -> tuple[SelfTrainingConfig, Store]:
    """One round: fine-tuned on labels last, then at a higher resolution; so is the baseline."""
    config = tiny_config(
        folder,
        "rounds=1",
        "student.order=finetune_on_labels_last",
        FINETUNE,
        FIX,
        TEACHER_FIX,
        "selection.allow_collapse=true",  # so short a training labels badly
        name="fixed",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.views.write_report", lambda store, status, inputs: None)
        store, _ = carried_out(config)
    return config, store


def test_stages_on_labels_follow_the_training_and_their_last_model_is_the_rounds(
    fixed: tuple[SelfTrainingConfig, Store],
) -> None:
    _, store = fixed
    status = read_status(store, "fixed")
    teacher, student = status.rounds
    assert kinds(teacher.stages) == ["teacher", "resolution_fix", "validate", "test"]
    assert kinds(student.stages) == [
        *("label", "select", "student", "finetune", "resolution_fix"),
        *("validate", "test", "promote"),
    ]
    assert status.baseline is not None
    assert kinds(status.baseline.stages) == [
        *("baseline", "finetune", "resolution_fix", "validate", "test"),
    ]
    fingerprints = {kinds([stage])[0]: stage["fingerprint"] for stage in student.stages}
    assert student.fingerprint == fingerprints["resolution_fix"]
    # What labels and is compared is the model after the fix, at its resolution.
    label = read_result(store, "label", fingerprints["label"])
    validated = read_result(store, "validate", fingerprints["validate"])
    assert label is not None
    assert validated is not None
    assert validated.inputs["model"].fingerprint == student.fingerprint
    assert validated.settings["view"]["image_size"] == 12
    fix = read_result(store, "train", fingerprints["resolution_fix"])
    assert fix is not None
    assert fix.inputs["init"].fingerprint == fingerprints["finetune"]


def test_the_report_tells_of_every_training(fixed: tuple[SelfTrainingConfig, Store]) -> None:
    _, store = fixed
    found = trainings(store, read_status(store, "fixed").to_json())
    assert [one.label for one in found] == [
        "round 0 (teacher)",
        "round 0 (teacher) · resolution fix",
        "round 1",
        "round 1 · finetune",
        "round 1 · resolution fix",
        "baseline",
        "baseline · finetune",
        "baseline · resolution fix",
    ]


def test_the_plan_lists_the_stages_that_the_run_has(
    fixed: tuple[SelfTrainingConfig, Store],
) -> None:
    config, store = fixed
    planned = plan_run(store, config)
    events = [event for event in read_events(store, "fixed") if event["type"] == "stage_done"]
    assert [stage.fingerprint for stage in planned] == [e["fingerprint"] for e in events]
    assert [stage.part for stage in planned] == [e.get("part") for e in events]
    assert {stage.state for stage in planned} == {"reused"}
    # Four steps of six images.
    assert {stage.samples for stage in planned if stage.part == "finetune"} == {24}


def test_a_round_whose_last_training_is_not_finished_has_no_model_yet(
    fixed: tuple[SelfTrainingConfig, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    # The teacher is done, its resolution fix only begun: `export` must not find a model here.
    config, store = fixed
    done = read_status(store, "fixed").rounds[0].stages[0]["fingerprint"]
    half = open_run(store, config.model_copy(update={"name": "half"}))
    facts = {"kind": "train", "role": "teacher", "round_index": 0}
    append_event(store, half.name, "stage_referenced", **facts, part="teacher", fingerprint=done)
    assert read_status(store, "half").model_url is not None
    facts |= {"role": "resolution_fix", "part": "resolution_fix"}
    append_event(store, half.name, "stage_referenced", **facts, fingerprint="a" * 64)
    assert read_status(store, "half").model_url is None
    print_status(read_status(store, "half"))
    assert "model:  none yet" in capsys.readouterr().out


def test_pretraining_comes_before_the_labels(
    folder: Path, tiny_config: MakeConfig, trained_here: list[str]
) -> None:
    config = tiny_config(
        folder,
        "rounds=1",
        "baseline=false",
        "student.order=pretrain_then_finetune",
        FINETUNE,
        name="pretrained",
    )
    store, status = carried_out(config)
    fingerprints = {kinds([stage])[0]: stage["fingerprint"] for stage in status.rounds[1].stages}
    pretraining = read_result(store, "train", fingerprints["student"])
    finetune = read_result(store, "train", fingerprints["finetune"])
    assert pretraining is not None
    assert finetune is not None
    assert pretraining.counts["labeled_images_seen"] == 0
    assert finetune.counts["pseudo_images_seen"] == 0
    assert status.rounds[1].fingerprint == finetune.fingerprint


@pytest.mark.parametrize("objective", ["fixmatch", "distillation"])
def test_an_online_student_needs_neither_labelling_nor_selection(
    objective: str, folder: Path, tiny_config: MakeConfig
) -> None:
    config = tiny_config(folder, *ONLINE, f"student.objective.kind={objective}", name=objective)
    store, status = carried_out(config)
    student = status.rounds[1]
    assert kinds(student.stages) == ["student", "validate", "test", "promote"]
    assert student.pseudo_labels is None
    assert [stage.kind for stage in plan_run(store, config)] == [
        *("train", "validate", "test"),
        *("train", "validate", "test", "promote"),
    ]


def test_students_that_start_from_their_teachers(folder: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config(folder, "student.init.kind=teacher", name="warm")
    store, status = carried_out(config)
    last = 0
    for one in status.rounds[1:]:
        assert one.fingerprint is not None
        manifest = read_result(store, "train", one.fingerprint)
        assert manifest is not None
        assert manifest.inputs["init"].fingerprint == status.rounds[last].fingerprint
        last = one.round_index if one.promoted else last


def test_a_cache_without_room_is_refused_before_anything_is_computed(
    tmp_path: Path, tiny_config: MakeConfig, trained_here: list[str]
) -> None:
    num_trained = len(trained_here)
    cache = f"cache={{dir: '{tmp_path / 'cache'}', max_bytes: 1000}}"
    config = tiny_config(tmp_path / "store", cache, name="cramped")
    with pytest.raises(CacheTooSmall, match="max_bytes=1000 is less than the"):
        self_training(config)
    assert len(trained_here) == num_trained
    # The name is still free for the same run with a larger cache.
    assert list_runs(open_store(str(tmp_path / "store"))) == []


# What presets of other methods train with, before their selection rules exist.
CURRICULUM = (
    "student.noise={horizontal_flip: true, mixing: {kind: mixup, alpha: 1.0}}",
    "student.ema=null",
    "student.swa={start_fraction: 0.5, every_steps: 2}",
    "selection.target=hard",
)
DEBIASED = ("student.objective={kind: joint, margin: 0.4}", "selection.target=hard")
NAIVE = (
    "student.noise={horizontal_flip: true}",
    "student.order=finetune_on_labels_last",
    FINETUNE,
    "selection={threshold: {kind: fixed, confidence: 0.0}, balance: {kind: none}, target: hard,"
    " allow_collapse: true}",
)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("curriculum", CURRICULUM), ("debiased", DEBIASED), ("naive", NAIVE)],
)
def test_a_student_trains_as_other_methods_train_theirs(
    name: str, overrides: tuple[str, ...], folder: Path, tiny_config: MakeConfig
) -> None:
    config = tiny_config(folder, "rounds=1", *overrides, name=name)
    _, status = carried_out(config)
    assert (status.state, status.stop_reason) in {("done", "max_rounds"), ("done", "no_gain")}
    assert status.rounds[1].dev_accuracy is not None
    assert status.baseline is not None
    assert status.baseline.dev_accuracy is not None


# So short a training labels badly.
LOW_BAR = (
    "rounds=1",
    "selection.allow_collapse=true",
    "selection.threshold={kind: fixed, confidence: 0.05}",
)


def _slow(recipe: str, changes: tuple[str, ...]) -> Any:
    """Leave the recipe to `make test-slow`: ten seconds each, of the same loop with other rules."""
    return pytest.param(recipe, changes, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("supervised", ()),
        ("fixmatch_online", ()),
        ("noisy_student", ("student.ladder=[]", *LOW_BAR)),
        _slow("billion_scale", ("student.finetune.duration={steps: 2}", *LOW_BAR)),
        _slow("distillation", ()),
        _slow("noisy_student_topk", ("student.ladder=[]", *LOW_BAR)),
        _slow("fixmatch_offline", LOW_BAR),
        _slow(
            "curriculum_labeling",
            ("rounds=1", "selection.allow_collapse=true", "student.swa.every_steps=1"),
        ),
        _slow("debiased", LOW_BAR),
        _slow(
            "naive_student",
            (
                "rounds=1",
                "student.ladder=[]",
                "student.finetune.duration={steps: 2}",
                "labeling.view.scales=[1.0, 1.5]",
                "selection.calibration=temperature",
                "selection.allow_collapse=true",
            ),
        ),
        _slow(
            "ups",
            (
                "rounds=1",
                "selection.allow_collapse=true",
                "selection.threshold={kind: uncertainty, confidence: 0.05, max_std: 0.2}",
            ),
        ),
    ],
)
def test_a_small_recipe_runs_to_its_end(
    recipe: str, changes: tuple[str, ...], tmp_path: Path
) -> None:
    few = ["duration={steps: 6}", "warmup=null", "image_size=8"]
    sections = ("teacher",) if recipe == "supervised" else ("teacher", "student")
    config = load_config(
        recipe,
        overrides=[
            f"store={tmp_path / 'store'}",
            "device=cpu",
            "data={kind: digits, labels_per_class: 1, dev: 20, test: 20, shard_size: 600}",
            *(f"{section}.{change}" for section in sections for change in few),
            *changes,
        ],
    )
    _, status = carried_out(config)
    assert status.state == "done"
    assert [one.round_index for one in status.rounds] == list(range(config.rounds + 1))
    assert all(one.dev_accuracy is not None for one in status.rounds)
    assert (status.baseline is not None) == config.baseline
