"""A run that is asked to stop: Ctrl-C and SIGTERM, what they leave behind, and the way back."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from flows.run_status import read_status
from storage.checkpoints import newest_checkpoint
from storage.manifest import read_provenance
from storage.runs import read_events
from storage.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Long enough to be stopped in the middle, short enough to be finished afterwards.
OVERRIDES = [
    "rounds=1",
    "baseline=false",
    "data.dev=40",
    "data.test=40",
    "teacher.architecture={kind: small_cnn, width: 4, depth: 1}",
    "student.architecture={kind: small_cnn, width: 4, depth: 1}",
    "teacher.duration.steps=600",
    "student.duration.steps=10",
    "student.warmup=null",
    "teacher.batch_size=20",
    "selection.threshold.confidence=0.1",
    "selection.allow_collapse=true",
]
MARK = "SELFTRAIN_TEST_MARK"


@pytest.mark.parametrize(
    ("stop", "has_own_server"), [(signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_stopped_run_leaves_a_checkpoint_and_no_child_and_resume_finishes_it(
    tmp_path: Path, prefect_api: str, stop: signal.Signals, has_own_server: bool
) -> None:
    store, log = tmp_path / "store", tmp_path / "stderr.txt"
    home, mark = tmp_path / "prefect", uuid.uuid4().hex
    environment = {**os.environ, MARK: mark}
    if has_own_server:
        del environment["PREFECT_API_URL"]
        environment["PREFECT_HOME"] = str(home)
    command = [sys.executable, "-m", "flows.cli", "run", "demo", "--name=stopped", "--json"]
    command += [f"--store={store}", *(f"--set={override}" for override in OVERRIDES)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
        )
    try:
        _wait_for(log, "round 0 · teacher: ", process)
        assert len(_processes_with(mark)) >= 2, "a worker is at work"
        asked_at = time.monotonic()
        process.send_signal(stop)
        assert process.wait(timeout=120) == 3, log.read_text()
        # Not the minutes for which Prefect would retry a server that is gone.
        assert time.monotonic() - asked_at < 60
    finally:
        process.kill()
        process.wait()

    output = log.read_text()
    assert f"stopped; go on with: selftrain resume stopped --store {store}\n" in output
    assert "Traceback" not in output
    assert _processes_with(mark) == []
    opened = open_store(str(store))
    status = read_status(opened, "stopped")
    assert status.state == "stopped"
    assert read_events(opened, "stopped")[-1]["type"] == "run_stopped"
    teacher = status.rounds[0].stages[0]
    assert (teacher["kind"], teacher["state"]) == ("train", "partial")
    checkpoint = newest_checkpoint(opened, teacher["fingerprint"])
    assert checkpoint is not None
    assert 0 < checkpoint.step < 600

    resumed = subprocess.run(
        [*command[:3], "resume", "stopped", f"--store={store}", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert resumed.returncode == 0, resumed.stderr
    finished = json.loads(resumed.stdout)
    assert finished["state"] == "done"
    provenance = read_provenance(opened, f"models/{teacher['fingerprint']}")
    assert provenance is not None
    assert provenance["resumed_at_step"] == checkpoint.step
    assert _processes_with(mark) == []
    if has_own_server:
        _assert_every_state_was_recorded(home / "prefect.db")


def _assert_every_state_was_recorded(database: Path) -> None:
    """The server was stopped only when its database knew how each task of the run had ended."""
    with sqlite3.connect(database) as connection:
        finished = connection.execute(
            "SELECT id FROM flow_run WHERE name = 'stopped' ORDER BY start_time DESC LIMIT 1"
        ).fetchone()
        states = connection.execute(
            "SELECT state_name FROM task_run WHERE flow_run_id = ?", finished
        ).fetchall()
        in_subflows = connection.execute(
            "SELECT state_name FROM task_run WHERE flow_run_id IN (SELECT flow_run.id FROM flow_run"
            " JOIN task_run ON flow_run.parent_task_run_id = task_run.id"
            " WHERE task_run.flow_run_id = ?)",
            finished,
        ).fetchall()
    # train, validate, test; label, select, train, validate, test, promote
    assert [name for (name,) in states] == ["Completed"] * 9
    # Groups of shards: 1 labelled, 1 counted, 1 written.
    assert len(in_subflows) >= 3
    assert {name for (name,) in in_subflows} == {"Completed"}


def _wait_for(log: Path, text: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 180
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _processes_with(mark: str) -> list[str]:
    """Return the command lines of all processes that have inherited the mark."""
    found: list[str] = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # ended meanwhile, or another user's
    return found
