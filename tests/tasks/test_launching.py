"""Who starts a training's processes: this machine by torchrun, or somebody else, waited for."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import tasks.launching
from storage.store import Store
from tasks.children import die_with_parent
from tasks.launching import (
    ExternalLaunch,
    LaunchConfig,
    LocalLaunch,
    TrainingFailed,
    TrainingNotSeen,
    TrainingRefused,
    launch_worker,
)
from tasks.policies import worth_retrying
from tasks.progress_records import ProgressRecord, ProgressRecords, read_progress
from tasks.training import TrainingStopped
from tasks.training_orders import place_order
from tasks.worker import REFUSED, STOPPED, main

EXTERNAL = ExternalLaunch(timeout_seconds=60, poll_seconds=0.02)
FIGURES = {"step": 3, "total_steps": 20, "loss": 0.5, "learning_rate": 0.1}


def launch(lab, order, settings, *, on_progress=lambda line: None, announce=lambda text: None):
    launch_worker(
        lab.store,
        order.specification.fingerprint,
        device="cpu",
        on_progress=on_progress,
        launch=settings,
        announce=announce,
    )


class Waiting:
    """A run that waits in a thread for what somebody else trains."""

    def __init__(self, lab, order, settings=EXTERNAL):
        self.announced, self.seen, self.error = [], [], None
        self._thread = threading.Thread(target=self._wait, args=(lab, order, settings))
        self._thread.start()
        while not self.announced:
            time.sleep(0.01)

    def _wait(self, lab, order, settings):
        try:
            launch(
                lab, order, settings, on_progress=self.seen.append, announce=self.announced.append
            )
        except Exception as error:
            self.error = error

    def end(self):
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        return self.error


def record_of(lab, order, state, message="", progress=FIGURES):
    records = ProgressRecords(lab.store, order.specification.fingerprint, seconds=0.01)
    if progress:
        records.write(progress)
    records.close(state, message)


def test_a_run_waits_for_what_somebody_else_trains(lab):
    order = lab.order()
    place_order(lab.store, order)
    waiting = Waiting(lab, order)
    fingerprint = order.specification.fingerprint
    worker = f"-m tasks.worker {lab.store.url} {fingerprint} --device cpu"
    assert f"python {worker}" in waiting.announced[0]
    assert f"torchrun --nproc-per-node N {worker}" in waiting.announced[0]
    assert main([lab.store.url, fingerprint, "--device", "cpu", "--threads", "1"]) == 0
    assert waiting.end() is None
    record = read_progress(lab.store, fingerprint)
    assert record is not None
    assert record.state == "committed"
    assert (record.progress["step"], record.progress["total_steps"]) == (20, 20)


def test_the_progress_of_others_is_shown_as_it_comes(lab):
    order = lab.order()
    waiting = Waiting(lab, order)
    record_of(lab, order, "stopped", "stopped at step 3")  # pre-empted: somebody will go on
    while not waiting.seen:
        time.sleep(0.01)
    assert waiting.seen[0] == FIGURES
    lab.train(order)
    assert waiting.end() is None


def test_what_others_refuse_is_refused_at_once_but_not_what_they_refused_before(lab):
    order = lab.order()
    record_of(lab, order, "refused", "old grief", progress={})
    waiting = Waiting(lab, order)
    assert waiting.error is None
    record_of(lab, order, "refused", "shard a: 2 undecodable images", progress={})
    error = waiting.end()
    assert isinstance(error, TrainingRefused)
    assert str(error) == "shard a: 2 undecodable images"


def test_a_worker_that_refuses_says_so_in_the_store(lab, monkeypatch, capsys):
    order = lab.order()
    place_order(lab.store, order)
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "4")  # any rank's reason counts
    fingerprint = order.specification.fingerprint
    assert main([lab.store.url, fingerprint, "--device", "cpu"]) == REFUSED
    record = read_progress(lab.store, fingerprint)
    assert record is not None
    assert record.state == "refused"
    assert record.message in capsys.readouterr().err


def test_silence_ends_the_wait_with_the_command_that_was_missing(lab):
    order = lab.order()
    record_of(lab, order, "stopped")
    started = time.monotonic()
    with pytest.raises(TrainingNotSeen) as caught:
        launch(lab, order, ExternalLaunch(timeout_seconds=0.3, poll_seconds=0.02))
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert "no sign of life" in message
    assert "for 0.3 s (last seen stopped at step 3 of 20)" in message
    assert f"python -m tasks.worker {lab.store.url} {order.specification.fingerprint}" in message
    assert "launch.timeout_seconds" in message
    # Three times the silence would help nobody.
    assert worth_retrying(None, None, Failed(caught.value)) is False


class Failed:
    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


def test_signs_of_life_put_off_the_end_of_the_wait(lab):
    order = lab.order()
    waiting = Waiting(lab, order, ExternalLaunch(timeout_seconds=2.0, poll_seconds=0.02))
    records = ProgressRecords(lab.store, order.specification.fingerprint, seconds=0.01)
    for step in range(12):
        records.write(FIGURES | {"step": step})
        time.sleep(0.25)
    assert waiting.error is None  # after more than the time-out
    assert isinstance(waiting.end(), TrainingNotSeen)
    records.close("stopped")


def test_progress_that_cannot_be_written_costs_the_training_nothing(lab, monkeypatch, caplog):
    def fail(self, path, data):
        raise OSError("no space left")

    monkeypatch.setattr(Store, "replace", fail)
    order = lab.order()
    with caplog.at_level(logging.WARNING):
        record_of(lab, order, "stopped")
    assert "not written: no space left" in caplog.text


def test_a_damaged_or_newer_progress_record_is_no_record(lab):
    order = lab.order()
    fingerprint = order.specification.fingerprint
    assert read_progress(lab.store, fingerprint) is None
    record_of(lab, order, "stopped", "why")
    record = read_progress(lab.store, fingerprint)
    assert isinstance(record, ProgressRecord)
    assert (record.state, record.message, record.progress) == ("stopped", "why", FIGURES)
    path = Path(lab.store.url) / order.specification.folder / "progress.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert read_progress(lab.store, fingerprint) is None


def fake_python(tmp_path, monkeypatch, script):
    """Let the launcher start a shell script instead of Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def endings(*lines):
    """A torchrun whose ranks say how they ended, and which itself only fails."""
    written = "".join(
        json.dumps({"rank": rank, "exit_code": code, "message": message}) + "\n"
        for rank, code, message in lines
    )
    # The path is the last argument.
    return f"for last; do :; done\ncat > $last <<'END'\n{written}END\nexit 1"


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        # Rank 1 found the reason; rank 0, first to be heard, only that rank 1 was gone.
        (
            [(0, 1, "RuntimeError: Connection closed by peer"), (1, REFUSED, "bad shard")],
            TrainingRefused,
            r"^bad shard$",
        ),
        ([(1, STOPPED, "stopped at 3"), (0, STOPPED, "stopped at 3")], TrainingStopped, r"^stop"),
        ([(0, 1, "RuntimeError: peer")], TrainingFailed, r"rank 1 of 2 was lost \(killed"),
        ([], TrainingFailed, r"rank 0, 1 of 2 was lost"),
        ([(1, 1, "OSError: disk"), (0, 1, "x")], TrainingFailed, r"\(exit code 1\): rank 1: OSE"),
        ([(1, 0, ""), (0, 0, "")], TrainingFailed, "torchrun failed after its ranks"),
    ],
)
def test_the_ranks_endings_say_more_than_torchruns_exit_code(
    lab, tmp_path, monkeypatch, lines, error, message
):
    fake_python(tmp_path, monkeypatch, endings(*lines))
    with pytest.raises(error, match=message):
        launch(lab, lab.order(), LocalLaunch(processes=2))


def test_a_line_of_progress_may_be_seen_before_it_is_whole(lab, tmp_path, monkeypatch):
    """Known-broken variant: the first half is thrown away, and the second is no JSON."""
    text = json.dumps(FIGURES)
    halves = f"printf '%s' '{text[:9]}' >> $last\nsleep 0.7\nprintf '%s\\n' '{text[9:]}' >> $last"
    fake_python(tmp_path, monkeypatch, f"for last; do :; done\n{halves}\nsleep 0.7\nexit 0")
    seen = []
    launch(lab, lab.order(), LocalLaunch(), on_progress=seen.append)
    assert seen == [FIGURES]


def test_a_worker_does_not_wait_for_the_ranks_of_a_launcher_around_it(lab, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    seen = tmp_path / "environment"
    fake_python(tmp_path, monkeypatch, f"env > '{seen}'\nexit 0")
    launch(lab, lab.order(), LocalLaunch())
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert "PATH" in names
    assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"}


def test_several_local_processes_are_started_by_torchrun_on_loopback(lab, tmp_path, monkeypatch):
    started = []

    class Recording(subprocess.Popen):
        def __init__(self, command, **options):
            started.append((command, options))
            super().__init__(command, **options)

    fake_python(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr(subprocess, "Popen", Recording)
    monkeypatch.setattr(tasks.launching.os, "cpu_count", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    order = lab.order()
    launch(lab, order, LocalLaunch(processes=3))
    ((command, options),) = started
    text = " ".join(command)
    assert "-m torch.distributed.run --standalone --local-addr 127.0.0.1" in text
    assert "--nproc-per-node 3 -m tasks.worker" in text
    assert options["preexec_fn"] is die_with_parent
    assert options["start_new_session"] is True
    environment = options["env"]
    assert environment["OMP_NUM_THREADS"] == "2"  # 7 cores among 3
    # Below the launcher's own patience, so that ranks are ended by their agent.
    assert 0 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 60


@pytest.mark.parametrize(
    ("processes", "device", "has_cuda", "expected"),
    [
        (3, "cpu", False, 3),
        ("auto", "cpu", True, 1),
        ("auto", "auto", True, 8),
        ("auto", "auto", False, 1),
        ("auto", "cuda", True, 8),
    ],
)
def test_auto_is_one_process_a_device(monkeypatch, processes, device, has_cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 if has_cuda else 0)
    launch = LocalLaunch(processes=processes)
    assert tasks.launching._num_processes(launch, device) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "local", "processes": 0},
        {"kind": "local", "processes": "many"},
        {"kind": "local", "timeout_seconds": 5},
        {"kind": "external", "processes": 2},
        {"kind": "external", "timeout_seconds": 0},
        {"kind": "external", "poll_seconds": 0},
    ],
)
def test_launches_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(LaunchConfig).validate_python(settings)
