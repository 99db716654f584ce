"""Orders of trainings: fingerprints, the way through the store, and the baseline's budget."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.durations import Duration
from models.noise import NoiseConfig
from models.objectives import DistillationConfig, FixMatchConfig, JointConfig
from models.optimization import AdamWConfig, EmaConfig, RMSpropTFConfig, SGDConfig, learning_rate
from models.optimization.optimizers import peak_learning_rate
from models.optimization.schedules import ConstantConfig, CosineConfig, StaircaseConfig
from storage.manifest import ManifestMismatch, sealed
from tasks import training_orders
from tasks.training_orders import (
    ImagesPerStep,
    Needs,
    TrainingOrder,
    baseline_config,
    images_per_step,
    needs_of,
    place_order,
    pretraining_config,
    read_order,
    specify,
)

NUM_LABELED = 3500


def test_an_order_comes_back_from_the_store_as_it_was(lab):
    order = lab.order(lab.config(checkpoint_every_steps=7), max_bad_samples=3)
    place_order(lab.store, order)
    read = read_order(lab.store, order.specification.fingerprint)
    assert read == order
    assert read.specification.fingerprint == order.specification.fingerprint


def test_an_order_may_be_placed_again_with_other_tolerances(lab):
    order = lab.order()
    place_order(lab.store, order)
    place_order(lab.store, TrainingOrder(order.specification, order.config, 5))
    assert read_order(lab.store, order.specification.fingerprint).max_bad_samples == 5


def test_an_order_that_is_not_there_names_the_place(lab):
    with pytest.raises(ValueError, match=f"no training is ordered at {lab.store.url}/models/0000"):
        read_order(lab.store, "0" * 64)


def test_an_order_under_another_fingerprint_is_refused(lab):
    order = lab.order()
    place_order(lab.store, order)
    source = lab.store.read(f"models/{order.specification.fingerprint}/specification.json")
    lab.store.replace(f"models/{'1' * 64}/specification.json", source)
    with pytest.raises(ManifestMismatch, match=f"specifies {order.specification.fingerprint}, not"):
        read_order(lab.store, "1" * 64)


def test_an_order_of_another_stage_version_is_refused(lab, monkeypatch):
    order = lab.order()
    place_order(lab.store, order)
    monkeypatch.setattr(training_orders, "VERSION", training_orders.VERSION + 1)
    with pytest.raises(ValueError, match=r"by another version of selftrain .*run flow and"):
        read_order(lab.store, order.specification.fingerprint)


def test_an_order_whose_config_is_not_the_fingerprinted_one_is_refused(lab):
    order = lab.order()
    place_order(lab.store, order)
    path = f"{order.specification.folder}/specification.json"
    body = json.loads(lab.store.read(path))
    del body["sha256"]
    body["config"]["batch_size"] = 7
    lab.store.replace(path, sealed(body))
    with pytest.raises(ValueError, match="another version of selftrain"):
        read_order(lab.store, order.specification.fingerprint)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 7},
        {"image_size": 16},
        {"duration": Duration(steps=21)},
        {"noise": NoiseConfig()},
        {"ema": None},
        {"ema": EmaConfig(decay=0.5)},
        {"optimizer": SGDConfig()},
        {"objective": JointConfig(label_smoothing=0)},
        {"precision": "bf16"},
        {"interpolation": "bicubic"},
        {"crop_padding": 1},
    ],
)
def test_what_changes_the_weights_changes_the_fingerprint(lab, changes):
    assert (
        lab.order(lab.config(**changes)).specification.fingerprint
        != lab.order().specification.fingerprint
    )


def test_when_checkpoints_are_written_does_not_change_the_fingerprint(lab):
    config = lab.config(checkpoint_every_steps=3, checkpoint_every_seconds=5.0)
    assert lab.order(config).specification.fingerprint == lab.order().specification.fingerprint
    assert (
        lab.order(max_bad_samples=9).specification.fingerprint
        == lab.order().specification.fingerprint
    )


def test_class_order_and_labels_and_selection_are_in_the_fingerprint(lab):
    given: dict[str, Any] = {
        "seed": 0,
        "round_index": 1,
        "role": "student",
        "class_names": ("a", "b"),
        "labeled": "1" * 64,
        "selection": "2" * 64,
    }
    config = lab.config(unlabeled_ratio=2)
    first = specify(config, **given).fingerprint
    others: list[dict[str, Any]] = [
        {"class_names": ("b", "a")},
        {"labeled": "3" * 64},
        {"selection": "3" * 64},
        {"seed": 1},
        {"round_index": 2},
        {"role": "baseline"},
    ]
    for changes in others:
        assert specify(config, **given | changes).fingerprint != first


@pytest.mark.parametrize(("ratio", "selection"), [(0, "2" * 64), (2, None)])
def test_ratio_and_selection_must_agree(lab, ratio, selection):
    with pytest.raises(
        ValueError, match=f"student: .*unlabeled_ratio={ratio} reads .* selection, but"
    ):
        specify(
            lab.config(unlabeled_ratio=ratio),
            seed=0,
            round_index=1,
            role="student",
            class_names=("a", "b"),
            labeled="1" * 64,
            selection=selection,
        )


def steps_and_rates(config, num_labeled=NUM_LABELED):
    total = config.duration.to_steps(config.batch_size, num_labeled)
    rates = [
        learning_rate(
            step,
            peak=peak_learning_rate(config.optimizer, batch_size=config.batch_size),
            schedule=config.schedule,
            warmup=config.warmup,
            total_steps=total,
            batch_size=config.batch_size,
            num_labeled=num_labeled,
        )
        for step in range(0, total, max(1, total // 97))
    ]
    return total, rates


DURATIONS = {
    "steps": (Duration(steps=500), Duration(steps=20)),
    "labeled_epochs": (Duration(labeled_epochs=30.1), Duration(labeled_epochs=0.7)),
    "samples_seen": (Duration(samples_seen=100_001), Duration(samples_seen=1_999)),
}
SCHEDULES = {
    "cosine": CosineConfig(final_fraction=0.1),
    "constant": ConstantConfig(),
    "staircase_epochs": StaircaseConfig(decay_every=Duration(labeled_epochs=2.4)),
    "staircase_steps": StaircaseConfig(decay_every=Duration(steps=33)),
    "staircase_samples": StaircaseConfig(decay_every=Duration(samples_seen=4_097)),
}
OPTIMIZERS = {
    "adamw": AdamWConfig(),
    "linear_256": RMSpropTFConfig(),
    "sgd_linear_256": SGDConfig(lr=0.1, lr_scaling="linear_256"),
}


@pytest.mark.parametrize("duration", DURATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ratio", [1, 14])
def test_the_baseline_keeps_steps_and_learning_rates(lab, duration, schedule, optimizer, ratio):
    length, warmup = DURATIONS[duration]
    student = lab.config(
        batch_size=96,
        unlabeled_ratio=ratio,
        duration=length,
        warmup=warmup,
        schedule=SCHEDULES[schedule],
        optimizer=OPTIMIZERS[optimizer],
    )
    baseline = baseline_config(student)
    assert baseline.batch_size == 96 * (1 + ratio)
    assert baseline.unlabeled_ratio == 0
    (steps, rates), (baseline_steps, baseline_rates) = (
        steps_and_rates(student),
        steps_and_rates(baseline),
    )
    assert baseline_steps == steps
    assert baseline_rates == pytest.approx(rates, rel=1e-12)
    # As many images a step, and all else as it was.
    same = {"architecture", "noise", "ema", "objective", "precision", "image_size", "normalization"}
    assert {n: getattr(baseline, n) for n in same} == {n: getattr(student, n) for n in same}
    type(baseline).model_validate(baseline.model_dump())


def test_the_baseline_of_the_paper(lab):
    # 350 epochs at 2048 with ratio 14: the baseline sees 15 times as many labels a step, so its
    # 5,250 epochs are the same steps, and lr per 256 of the student's 2048 is 0.128.
    student = lab.config(
        batch_size=2048,
        unlabeled_ratio=14,
        duration=Duration(labeled_epochs=350),
        warmup=Duration(labeled_epochs=5),
        schedule=StaircaseConfig(decay_every=Duration(labeled_epochs=2.4)),
        optimizer=RMSpropTFConfig(lr=0.016),
    )
    baseline = baseline_config(student)
    assert baseline.batch_size == 30_720
    assert baseline.duration == Duration(labeled_epochs=5250)
    assert baseline.warmup == Duration(labeled_epochs=75)
    assert isinstance(baseline.schedule, StaircaseConfig)
    assert baseline.schedule.decay_every == Duration(labeled_epochs=36)
    assert baseline.optimizer.lr == pytest.approx(0.128)
    assert baseline.optimizer.lr_scaling == "none"
    assert student.duration.to_steps(2048, 1_281_167) == baseline.duration.to_steps(
        30_720, 1_281_167
    )


def test_epochs_are_scaled_as_the_decimals_that_users_write(lab):
    # 0.1 * 3 is 0.30000000000000004 in binary: 29 steps of 100 instead of 30 elsewhere.
    student = lab.config(unlabeled_ratio=2, duration=Duration(labeled_epochs=0.1))
    assert baseline_config(student).duration.labeled_epochs == 0.3


def test_nothing_is_left_in_the_store_by_specifying(lab):
    before = sorted(Path(lab.store.url).rglob("*"))
    lab.order()
    assert sorted(Path(lab.store.url).rglob("*")) == before


GIVEN: dict[str, Any] = {
    "seed": 0,
    "round_index": 1,
    "role": "student",
    "class_names": ("a", "b"),
    "labeled": "1" * 64,
}


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (JointConfig(), Needs(selection=True, unlabeled=False, teacher=False)),
        (FixMatchConfig(), Needs(selection=False, unlabeled=True, teacher=False)),
        (DistillationConfig(), Needs(selection=False, unlabeled=True, teacher=True)),
    ],
)
def test_an_objective_is_given_what_it_reads_and_nothing_else(lab, objective, needs):
    config = lab.config(unlabeled_ratio=2, objective=objective)
    assert needs_of(config) == needs
    names = ("selection", "unlabeled", "teacher")
    wanted: dict[str, Any] = {name: "2" * 64 for name in names if getattr(needs, name)}
    assert specify(config, **GIVEN, **wanted).inputs == {"labeled": "1" * 64} | wanted
    for name in names:
        others = {k: v for k, v in wanted.items() if k != name}
        if name not in wanted:
            others |= {name: "2" * 64}
        with pytest.raises(ValueError, match=f"student: objective {objective.kind!r} .* {name}"):
            specify(config, **GIVEN, **others)


def test_where_the_weights_come_from_and_what_is_frozen_change_the_fingerprint(lab):
    config = lab.config()
    init = {"init": "3" * 64}
    specifications = [
        specify(config, **GIVEN),
        specify(config, **GIVEN, init=init),
        # A model and weights from elsewhere of the same name would still be two things.
        specify(config, **GIVEN, init={"init_weights": "3" * 64}),
        specify(config, **GIVEN, init=init, frozen_fraction=0.5),
        specify(config, **GIVEN, init=init, frozen_fraction=0.25),
    ]
    assert len({one.fingerprint for one in specifications}) == len(specifications)
    assert specify(config, **GIVEN, init={}, frozen_fraction=0.0) == specifications[0]


def test_random_weights_are_never_frozen(lab):
    with pytest.raises(ValueError, match=r"student: frozen_fraction=0.5 of fresh, random weights"):
        specify(lab.config(), **GIVEN, frozen_fraction=0.5)


@pytest.mark.parametrize(
    ("objective", "labeled", "unlabeled"),
    [
        (JointConfig(), 6, 18),
        (JointConfig(labeled_images=False), 0, 18),
        # Two views of an image are one image read.
        (FixMatchConfig(), 6, 18),
        (DistillationConfig(), 0, 18),
        (DistillationConfig(label_share=0.5), 6, 18),
    ],
)
def test_the_baseline_sees_as_many_labels_a_step_as_its_student_images(
    lab, objective, labeled, unlabeled
):
    student = lab.config(batch_size=6, unlabeled_ratio=3, objective=objective)
    assert images_per_step(student) == ImagesPerStep(labeled, unlabeled)
    baseline = baseline_config(student)
    assert images_per_step(baseline) == ImagesPerStep(labeled + unlabeled, 0)
    assert baseline.duration == student.duration
    assert needs_of(baseline) == Needs(selection=False, unlabeled=False, teacher=False)
    type(baseline).model_validate(baseline.model_dump())


def test_pretraining_keeps_steps_and_schedule_and_drops_the_labels(lab):
    student = lab.config(unlabeled_ratio=3, duration=Duration(labeled_epochs=10))
    pretraining = pretraining_config(student)
    assert images_per_step(pretraining) == ImagesPerStep(labeled=0, unlabeled=18)
    assert steps_and_rates(pretraining) == steps_and_rates(student)
