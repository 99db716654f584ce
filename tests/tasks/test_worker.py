"""The worker process: exit codes, progress, SIGTERM; and how the flow's side reads them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tasks.training_orders
import tasks.worker
from models.durations import Duration
from models.optimization import AdamWConfig
from storage.checkpoints import newest_checkpoint
from storage.manifest import read_manifest
from storage.predictions import DamagedPredictions
from tasks.children import die_with_parent
from tasks.labeling import LabelingStopped
from tasks.launching import TrainingFailed, TrainingRefused, launch_worker
from tasks.policies import worth_retrying
from tasks.shard_items import TooManyBadSamples
from tasks.training import TrainingStopped
from tasks.training_orders import place_order
from tasks.worker import REFUSED, STOPPED, main


@pytest.fixture(autouse=True)
def _process_as_before():
    """The worker sets the process's threads and its handler of SIGTERM."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def work(lab, order, *more):
    arguments = [lab.store.url, order.specification.fingerprint, "--device", "cpu"]
    return main([*arguments, "--threads", "1", *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_worker_trains_what_is_ordered_and_says_how_far_it_is(lab, tmp_path):
    order = lab.order()
    place_order(lab.store, order)
    progress = tmp_path / "progress.jsonl"
    assert work(lab, order, "--progress", str(progress)) == 0
    assert order.specification.result(lab.store) is not None
    last = lines(progress)[-1]
    assert (last["step"], last["total_steps"]) == (20, 20)
    assert set(last) == {"step", "total_steps", "loss", "learning_rate"}


def test_a_finished_training_is_not_done_again(lab, monkeypatch):
    order = lab.order()
    place_order(lab.store, order)
    lab.train(order)
    monkeypatch.setattr(tasks.worker, "run_training", None)
    assert work(lab, order) == 0


def test_sigterm_writes_a_checkpoint_and_the_next_worker_goes_on(lab, tmp_path, monkeypatch):
    order = lab.order()
    place_order(lab.store, order)
    write = tasks.worker._ProgressFile.write

    def terminate_at_7(self, report, total_steps):
        if report.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, report, total_steps)

    monkeypatch.setattr(tasks.worker._ProgressFile, "write", terminate_at_7)
    assert work(lab, order, "--progress", str(tmp_path / "progress.jsonl")) == STOPPED == 3
    found = newest_checkpoint(lab.store, order.specification.fingerprint)
    assert found is not None
    assert found.step == 7
    assert order.specification.result(lab.store) is None
    monkeypatch.undo()
    assert work(lab, order) == 0
    assert order.specification.result(lab.store) == lab.in_store(tmp_path / "other").train(order)


def test_what_another_try_would_not_mend_is_refused(lab, tmp_path, capsys):
    config = lab.config(
        optimizer=AdamWConfig(lr=1e9, weight_decay=0), warmup=None, duration=Duration(steps=200)
    )
    diverging = lab.order(config)
    place_order(lab.store, diverging)
    assert work(lab, diverging) == REFUSED == 2
    message = capsys.readouterr().err
    assert "is not finite at step" in message
    assert "Traceback" not in message

    samples = [*lab.images_of("l", 8, start=0), ("bad", b"no image", 1)]
    folder = lab.write_split(tmp_path / "bad", {"bad-0": samples})
    broken = lab.with_corpora(labeled=lab.index_into(lab.store, folder)).order()
    place_order(lab.store, broken)
    assert work(lab, broken) == REFUSED
    assert "bad-0/bad" in capsys.readouterr().err


def test_an_order_that_is_missing_or_of_another_version_is_refused(lab, capsys, monkeypatch):
    assert main([lab.store.url, "0" * 64]) == REFUSED
    assert "no training is ordered" in capsys.readouterr().err
    order = lab.order()
    place_order(lab.store, order)
    monkeypatch.setattr(tasks.training_orders, "VERSION", 99)
    assert work(lab, order) == REFUSED
    assert "run flow and worker of one version" in capsys.readouterr().err


def test_a_reason_of_several_lines_becomes_one(lab, capsys, monkeypatch):
    def refuse(store, fingerprint):
        raise ValueError("2 problems\n  first\n  second")

    monkeypatch.setattr(tasks.worker, "read_order", refuse)
    assert main([lab.store.url, "0" * 64]) == REFUSED
    assert capsys.readouterr().err.splitlines()[-1] == "2 problems first second"


def launch(lab, order, on_progress=lambda line: None):
    launch_worker(lab.store, order.specification.fingerprint, device="cpu", on_progress=on_progress)


def long_order(lab):
    """Minutes of training, of which the test waits for the first seconds only."""
    return lab.order(lab.config(duration=Duration(steps=10**6), ema=None))


@pytest.fixture
def one_thread(monkeypatch):
    # On a busy machine the threads of tiny tensors wait for each other.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_launched_worker_reports_progress_and_is_stopped_with_a_checkpoint(lab, one_thread):
    order = long_order(lab)
    place_order(lab.store, order)
    seen = []

    class Enough(Exception):
        pass

    def on_progress(line):
        seen.append(line)
        if line["step"] > 0:
            raise Enough

    # As a Ctrl-C in the flow: the exception passes through, and the worker is stopped by SIGTERM.
    with pytest.raises(Enough):
        launch(lab, order, on_progress)
    found = newest_checkpoint(lab.store, order.specification.fingerprint)
    assert found is not None
    assert found.step >= seen[-1]["step"] > 0
    assert seen[-1]["total_steps"] == 10**6
    assert read_manifest(lab.store, order.specification.folder) is None


def test_a_launched_worker_computes_the_same_bytes_as_this_process(lab, tmp_path, one_thread):
    order = lab.order()
    place_order(lab.store, order)
    launch(lab, order)
    manifest = order.specification.result(lab.store)
    assert manifest == lab.in_store(tmp_path / "other").train(order)


def fake_worker(tmp_path, monkeypatch, script):
    """Let the launcher start a shell script instead of Python."""
    path = tmp_path / "worker"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_the_launcher_reads_exit_codes(lab, tmp_path, monkeypatch):
    fake_worker(tmp_path, monkeypatch, "echo noise; echo 'stopped at step 3' >&2; exit 3")
    with pytest.raises(TrainingStopped, match=r"^stopped at step 3$"):
        launch(lab, lab.order())
    fake_worker(tmp_path, monkeypatch, "echo noise; echo 'bad shard' >&2; exit 2")
    with pytest.raises(TrainingRefused, match=r"^bad shard$"):
        launch(lab, lab.order())
    fake_worker(tmp_path, monkeypatch, "echo 'out of memory'; kill -9 $$")
    with pytest.raises(TrainingFailed, match=r"\(exit code -9\): out of memory"):
        launch(lab, lab.order())
    fake_worker(tmp_path, monkeypatch, "exit 2")
    with pytest.raises(TrainingRefused, match="no output"):
        launch(lab, lab.order())


def test_a_child_dies_with_the_process_that_started_it():
    # Killed, so that nothing of the parent can clean up.
    script = (
        "import subprocess, time\n"
        "from tasks.children import die_with_parent\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def test_the_worker_is_started_as_such_a_child(lab, tmp_path, monkeypatch):
    started = []

    class Recording(subprocess.Popen):
        def __init__(self, command, **options):
            started.append((command, options))
            super().__init__(command, **options)

    fake_worker(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr(subprocess, "Popen", Recording)
    order = lab.order()
    launch(lab, order)
    ((command, options),) = started
    fingerprint = order.specification.fingerprint
    assert command[1:5] == ["-m", "tasks.worker", lab.store.url, fingerprint]
    assert options["preexec_fn"] is die_with_parent
    # A group of its own: a Ctrl-C in the terminal reaches the flow alone, which stops the worker.
    assert options["start_new_session"] is True


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


class FakeState:
    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("connection reset"), True),
        (TrainingFailed("training 0123 failed (exit code -9): killed"), True),
        # A worker's output may hold any word.
        (TrainingFailed("training 0123 failed (exit code 1): ValueError in a log line"), True),
        (TrainingRefused("shard a: 2 undecodable images"), False),
        (TrainingStopped("stopped at step 3"), False),
        (LabelingStopped("stopped"), False),
        (TooManyBadSamples("shard a"), False),
        (FileNotFoundError("shard a"), False),
        (PermissionError("store"), False),
        (DamagedPredictions("shard a"), False),
        (KeyError("x"), False),
    ],
)
def test_only_what_may_be_mended_is_tried_again(error, expected):
    assert worth_retrying(None, None, FakeState(error)) is expected
