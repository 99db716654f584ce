"""kill -9 of the training alone, at any moment: same bytes; each part of a checkpoint matters."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import models.training
import models.training_state
import tasks.batches
from models.durations import Duration
from models.noise import (
    AffineConfig,
    CutoutConfig,
    NoiseConfig,
    PadShiftConfig,
    RandAugmentConfig,
    RandomResizedConfig,
)
from models.noise.mixup import MixupConfig
from models.objectives import JointConfig
from models.optimization import SGDConfig, SwaConfig
from models.training import TrainingState
from storage.manifest import read_provenance
from tasks.loading import LoadingConfig
from tasks.training import TrainingStopped
from tasks.training_orders import place_order

NOISE = NoiseConfig(
    crop=PadShiftConfig(pixels=2),
    horizontal_flip=True,
    affine=AffineConfig(),
    randaugment=RandAugmentConfig(num_ops=2, magnitude=9),
    cutout=CutoutConfig(fraction=0.3),
    mixing=MixupConfig(alpha=0.5),
    dropout=0.3,
)


@pytest.fixture
def student(pipeline, lab):
    """Return (lab, how to order a student in it); its store holds what a student reads."""
    copy_inputs(pipeline.lab, lab)

    def order(**changes):
        config = lab.config(**{"unlabeled_ratio": 2, "noise": NOISE} | changes)
        return lab.order(
            config, role="student", round_index=1, selection=pipeline.selection.fingerprint
        )

    return lab, order


def copy_inputs(source, target):
    for folder in ("labelings", "selections", "predictions"):
        shutil.copytree(Path(source.store.url) / folder, Path(target.store.url) / folder)


def start(lab, order, *more, **environment):
    command = [sys.executable, "-m", "tasks.worker", lab.store.url, order.specification.fingerprint]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--threads", "1", *more],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )


def newest_step(lab, order):
    folder = Path(lab.store.url) / order.specification.folder
    records = folder.glob("attempts/*/*/checkpoint.json")
    return max((int(path.parent.name) for path in records), default=0)


def provenance_of(lab, order):
    facts = read_provenance(lab.store, order.specification.folder)
    assert facts is not None
    return facts


@pytest.mark.slow
def test_a_worker_killed_while_it_writes_a_checkpoint_ends_in_the_same_bytes(student, tmp_path):
    lab, order_of = student
    order = order_of(checkpoint_every_steps=4)
    place_order(lab.store, order)
    # The third checkpoint's tensors are there and its record is not, so the second one counts. It
    # may be later than of step 8: while one is written the training goes on.
    killed = start(lab, order, SELFTRAIN_CRASH_AT="checkpoint.between_data_and_record#3")
    assert killed.wait(timeout=120) == -signal.SIGKILL
    reached = newest_step(lab, order)
    assert 8 <= reached < 20
    assert start(lab, order).wait(timeout=120) == 0
    assert provenance_of(lab, order)["resumed_at_step"] == reached
    other = lab.in_store(tmp_path / "other")
    copy_inputs(lab, other)
    resumed = order.specification.result(lab.store)
    assert resumed is not None
    assert resumed.sha256 == other.train(order).sha256


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_killed_at_random_moments_ends_in_the_same_bytes(student, tmp_path):
    lab, order_of = student
    total_steps = 400
    order = order_of(
        duration=Duration(steps=total_steps),
        # Decoded anew in every epoch, by another number of threads in every attempt.
        noise=NOISE.model_copy(update={"crop": RandomResizedConfig(scale=(0.3, 1.0))}),
        checkpoint_every_steps=3,
    )
    moments = random.Random(4)
    num_kills = 0
    for goal, threads in ((25, 1), (60, 3), (100, 2), (140, 7), (180, 1)):
        place_order(lab.store, replace(order, loading=LoadingConfig(loader_threads=threads)))
        process = start(lab, order)
        deadline = time.monotonic() + 120
        while process.poll() is None and newest_step(lab, order) < goal:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        num_kills += process.wait() == -signal.SIGKILL
        assert order.specification.result(lab.store) is None, "the training was not interrupted"
    assert num_kills == 5
    reached = newest_step(lab, order)
    place_order(lab.store, order)
    assert start(lab, order).wait(timeout=300) == 0
    facts = provenance_of(lab, order)
    assert facts["resumed_at_step"] == reached >= 180
    assert facts["steps"] == total_steps - reached
    other = lab.in_store(tmp_path / "other")
    copy_inputs(lab, other)
    resumed = order.specification.result(lab.store)
    assert resumed is not None
    assert resumed.sha256 == other.train(order).sha256


def nothing(state, fresh):
    """The control: all is restored."""


def weights(state, fresh):
    state.model.load_state_dict(fresh.model.state_dict() | buffers_of(state.model))


def batch_statistics(state, fresh):
    state.model.load_state_dict(buffers_of(fresh.model), strict=False)


def moving_average(state, fresh):
    state.ema.load_state_dict(fresh.ema.state_dict())


def mean_of_weights(state, fresh):
    state.swa.load_state_dict(fresh.swa.state_dict())


def optimizer(state, fresh):
    state.optimizer.state.clear()


def objective_state(state, fresh):
    state.objective_state = fresh.objective_state


def buffers_of(model):
    parameters = dict(model.named_parameters())
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def stop_at_report(number):
    seen = 0

    def should_stop():
        nonlocal seen
        seen += 1
        return seen == number

    return should_stop


@pytest.fixture
def interrupted(student, tmp_path):
    """Return a function: (lab, order, sha256 of the whole) of a training stopped at step 7 of 20.

    The objective carries moving averages of its losses; with `swa`, the mean of weights begins at
    step 5.
    """
    lab, order_of = student

    def stopped(**changes):
        objective = JointConfig(loss_normalization="moving_average")
        order = order_of(optimizer=SGDConfig(lr=0.1), objective=objective, **changes)
        whole = lab.in_store(tmp_path / "whole")
        copy_inputs(lab, whole)
        sha256 = whole.train(order).object("model").sha256
        with pytest.raises(TrainingStopped, match="stopped at step 7 of 20"):
            lab.train(order, should_stop=stop_at_report(7))
        return lab, order, sha256

    return stopped


@pytest.mark.parametrize(
    ("left_out", "changes"),
    [
        (nothing, {}),
        (weights, {}),
        (batch_statistics, {}),
        (moving_average, {}),
        (optimizer, {}),
        (objective_state, {}),
        (nothing, {"swa": SwaConfig(start_fraction=0.25)}),
        (mean_of_weights, {"swa": SwaConfig(start_fraction=0.25)}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__,
)
def test_each_part_of_the_state_is_needed_for_the_same_bytes(
    interrupted, monkeypatch, left_out, changes
):
    lab, order, sha256 = interrupted(**changes)
    restore = TrainingState.restore

    def restore_without(self, tensors, scalars):
        fresh = models.training_state.initial_state(order.config, 3, seed=1, device="cpu")
        restore(self, tensors, scalars)
        left_out(self, fresh)

    monkeypatch.setattr(TrainingState, "restore", restore_without)
    resumed = lab.train(order)
    assert provenance_of(lab, order)["resumed_at_step"] == 7
    assert (resumed.object("model").sha256 == sha256) is (left_out is nothing)


def test_the_position_in_the_data_is_needed_for_the_same_bytes(interrupted, monkeypatch):
    lab, order, sha256 = interrupted()
    batch = tasks.batches.TrainingBatches.batch
    asked = []

    def from_the_start(self, step, *part):
        asked.append(step)
        return batch(self, step - 7, *part)

    monkeypatch.setattr(tasks.batches.TrainingBatches, "batch", from_the_start)
    assert lab.train(order).object("model").sha256 != sha256
    assert asked == list(range(7, 20))


def test_the_position_in_the_schedule_is_needed_for_the_same_bytes(interrupted, monkeypatch):
    lab, order, sha256 = interrupted()
    rate = models.training.learning_rate
    monkeypatch.setattr(
        models.training, "learning_rate", lambda step, **more: rate(step - 7, **more)
    )
    assert lab.train(order).object("model").sha256 != sha256
