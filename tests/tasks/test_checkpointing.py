"""Checkpoints are written beside the training, one at a time, and none is lost in silence."""

import signal
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from prefect.client.schemas.objects import State
from safetensors.torch import save

import tasks.checkpointing
import tasks.stages
import tasks.training
from models.durations import Duration
from models.training import initial_state
from storage.checkpoints import newest_checkpoint
from tasks.checkpointing import CheckpointKeeper
from tasks.training import TrainingStopped
from tasks.training_orders import place_order
from tasks.worker import main

FP = "f" * 64


class HeldWriter:
    """Holds every write before it looks at its tensors, until released, and counts the writers."""

    def __init__(self, monkeypatch):
        self.release = threading.Event()
        self.started = threading.Event()
        self.error: Exception | None = None
        self.num_at_once = self.most_at_once = 0
        self.threads = set()
        monkeypatch.setattr(tasks.checkpointing, "save_tensors", self.write)

    def write(self, tensors):
        self.threads.add(threading.current_thread())
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        self.started.set()
        assert self.release.wait(10)
        self.num_at_once -= 1
        if self.error is not None:
            raise self.error
        return save(tensors)


@pytest.fixture
def state(lab):
    return initial_state(lab.config(), 3, seed=0, device="cpu")


def keeper_of(lab, **changes):
    return CheckpointKeeper(lab.store, FP, lab.config(**changes))


def steps_of(lab, fingerprint=FP):
    records = Path(lab.store.url).glob(f"models/{fingerprint}/attempts/*/*/checkpoint.json")
    return sorted(int(path.parent.name) for path in records)


def overwrite(state, value):
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(value)


def test_the_training_goes_on_while_a_checkpoint_is_written(lab, state, monkeypatch):
    """Fails for a keeper that writes in the training's thread, or one that writes live tensors."""
    writer = HeldWriter(monkeypatch)
    keeper = keeper_of(lab, checkpoint_every_steps=5)
    curve = [{"step": 5, "loss": 1.0}]
    overwrite(state, 5.0)
    state.step = 5
    keeper.save_if_due(state, curve)  # returns although nothing is written
    assert writer.started.wait(10)
    assert threading.current_thread() not in writer.threads
    assert steps_of(lab) == []
    overwrite(state, 6.0)
    state.step = 6
    curve.append({"step": 6, "loss": 1.0})
    writer.release.set()
    keeper.close()
    restored = initial_state(lab.config(), 3, seed=1, device="cpu")
    assert keeper_of(lab).resume(restored) == [{"step": 5, "loss": 1.0}]
    assert restored.step == 5
    assert all((parameter == 5.0).all() for parameter in restored.model.parameters())


def test_there_is_never_a_second_writer_and_what_fell_due_meanwhile_is_taken_after(
    lab, state, monkeypatch
):
    writer = HeldWriter(monkeypatch)
    keeper = keeper_of(lab, checkpoint_every_steps=5)
    for step in (5, 10, 15, 20):
        state.step = step
        keeper.save_if_due(state, [])
    writer.release.set()
    deadline = time.monotonic() + 10
    while steps_of(lab) != [5] and time.monotonic() < deadline:
        time.sleep(0.01)
    keeper.wait()
    state.step = 21  # 16 steps after the last one that was taken
    keeper.save_if_due(state, [])
    keeper.close()
    assert steps_of(lab) == [5, 21]
    assert writer.most_at_once == 1


def test_a_checkpoint_asked_for_at_the_end_waits_for_both_writes(lab, state, monkeypatch):
    writer = HeldWriter(monkeypatch)
    keeper = keeper_of(lab, checkpoint_every_steps=5)
    state.step = 5
    keeper.save_if_due(state, [])
    assert writer.started.wait(10)
    state.step = 7
    threading.Timer(0.2, writer.release.set).start()
    keeper.save(state, [])
    assert steps_of(lab) == [5, 7]
    assert writer.most_at_once == 1


def test_a_write_that_failed_is_raised_at_the_next_report(lab, state, monkeypatch):
    """Fails for a keeper that drops the future of its writer."""
    writer = HeldWriter(monkeypatch)
    writer.error = OSError(28, "No space left on device")
    writer.release.set()
    keeper = keeper_of(lab, checkpoint_every_steps=5)
    state.step = 5
    keeper.save_if_due(state, [])
    state.step = 6  # nothing is due at it
    assert keeper._write is not None
    futures.wait([keeper._write], timeout=10)
    with pytest.raises(OSError, match="No space left"):
        keeper.save_if_due(state, [])
    keeper.close()


def test_a_stop_whose_checkpoint_fails_does_not_say_that_it_was_written(lab, monkeypatch):
    writer = HeldWriter(monkeypatch)
    writer.error = OSError(28, "No space left on device")
    writer.release.set()
    with pytest.raises(OSError, match="No space left"):
        lab.train(should_stop=lambda: True)


def test_time_makes_a_checkpoint_due_as_steps_do(lab, state, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(tasks.checkpointing.time, "monotonic", lambda: now)
    keeper = keeper_of(lab, checkpoint_every_seconds=60.0)
    for step, now in ((1, 1059.0), (2, 1060.0), (3, 1119.0), (4, 1121.0)):  # noqa: B007
        state.step = step
        keeper.save_if_due(state, [])
        keeper.wait()
    assert steps_of(lab) == [2, 4]


@pytest.mark.parametrize("kept", [1, 3])
def test_the_last_k_are_kept_over_all_attempts(lab, state, kept):
    for steps in ((5, 10), (12, 15)):  # two attempts, the second from step 10
        keeper = keeper_of(lab, checkpoints_kept=kept)
        for step in steps:
            state.step = step
            keeper.save(state, [])
    assert steps_of(lab) == [5, 10, 12, 15][-kept:]


def test_how_many_are_kept_is_no_part_of_what_is_trained(lab):
    order = lab.order(lab.config(checkpoints_kept=7))
    assert order.specification.fingerprint == lab.order().specification.fingerprint


def test_a_kill_between_the_end_and_the_commit_repeats_no_step(lab, tmp_path, monkeypatch):
    order = lab.order()

    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    monkeypatch.setattr(tasks.training, "commit_manifest", killed)
    with pytest.raises(Killed):
        lab.train(order)
    monkeypatch.undo()
    assert steps_of(lab, order.specification.fingerprint) == [20]
    # A step that is made again would ask for a batch.
    monkeypatch.setattr(tasks.training.TrainingBatches, "batch", killed)
    resumed = lab.train(order)
    monkeypatch.undo()
    whole = lab.in_store(tmp_path / "other").train(order)
    assert resumed.sha256 == whole.sha256
    assert steps_of(lab, order.specification.fingerprint) == []


def worker_again(lab, order):
    handler = signal.getsignal(signal.SIGTERM)
    assert main([lab.store.url, order.specification.fingerprint, "--device", "cpu"]) == 0
    signal.signal(signal.SIGTERM, handler)  # the worker sets the process's


def stage_again(lab, order):
    state = tasks.stages.train.fn(lab.store, order, device="cpu", label="", artifact="")
    assert isinstance(state, State)
    assert state.name == "Reused"


@pytest.mark.parametrize("again", [worker_again, stage_again])
def test_what_a_kill_after_the_commit_left_is_deleted_by_who_finds_the_manifest(
    lab, monkeypatch, again
):
    order = lab.order()
    place_order(lab.store, order)
    monkeypatch.setattr(tasks.training, "delete_checkpoints", lambda store, fingerprint: None)
    fingerprint = lab.train(order).fingerprint
    assert steps_of(lab, fingerprint) == [20]
    again(lab, order)
    assert newest_checkpoint(lab.store, fingerprint) is None
    assert not list(Path(lab.store.url).glob(f"models/{fingerprint}/attempts/**/*.*"))


def test_one_found_checkpoint_restores_several_states_alike(lab):
    order = lab.order(lab.config(duration=Duration(steps=8)))
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=lambda: True)
    keeper = CheckpointKeeper(lab.store, order.specification.fingerprint, order.config)
    found = keeper.find()
    assert found is not None
    states = [initial_state(order.config, 3, seed=seed, device="cpu") for seed in (1, 2)]
    curves = [keeper.restore(state, found) for state in states]
    assert curves[0] == curves[1]
    assert [state.step for state in states] == [1, 1]
    for name, value in states[0].tensors().items():
        assert torch.equal(value, states[1].tensors()[name]), name
