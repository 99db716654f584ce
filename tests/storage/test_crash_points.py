"""A process killed at any named point leaves a store from which a second one ends the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.checkpoints import newest_checkpoint
from storage.manifest import read_manifest
from storage.store import open_store

STAGE = """
import sys
from storage.checkpoints import newest_checkpoint, prune_checkpoints, save_checkpoint
from storage.manifest import Manifest, commit_manifest, put_object
from storage.store import open_store

store = open_store(sys.argv[1])
begin = newest_checkpoint(store, "fp")
for step in range(begin.step + 1 if begin else 1, 5):
    save_checkpoint(store, "fp", sys.argv[2], step, b"state %d" % step, {"position": step})
    prune_checkpoints(store, "fp")
objects = tuple(
    put_object(store, "models/fp", name, name.encode(), "bin", crash_kind="train")
    for name in ("model", "metrics")
)
commit_manifest(store, "models/fp", Manifest("train", "fp", 1, {}, {}, objects))
"""

POINTS = [
    "checkpoint.before_data",
    "checkpoint.before_data#3",
    "checkpoint.between_data_and_record",
    "checkpoint.between_data_and_record#4",
    "train.before_data",
    "train.before_data#2",
    "train.before_manifest",
    "train.after_manifest",
]


def run_stage(store: Path, attempt: str, **environment: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", STAGE, str(store), attempt],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=60,
    ).returncode


def results_of(store: Path) -> dict[str, bytes]:
    files = (p for p in (store / "models" / "fp").iterdir() if p.is_file())
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("point", POINTS)
def test_a_stage_killed_anywhere_is_finished_by_the_next_with_equal_bytes(
    tmp_path: Path, point: str
):
    assert run_stage(tmp_path / "whole", "a") == 0
    assert run_stage(tmp_path / "cut", "a", SELFTRAIN_CRASH_AT=point) == -9
    done = read_manifest(open_store(str(tmp_path / "cut")), "models/fp")
    assert (done is not None) == (point == "train.after_manifest")
    assert run_stage(tmp_path / "cut", "b") == 0
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")


def test_the_cut_between_data_and_record_costs_that_checkpoint_only(tmp_path: Path):
    point = "checkpoint.between_data_and_record#3"
    assert run_stage(tmp_path, "a", SELFTRAIN_CRASH_AT=point) == -9
    found = newest_checkpoint(open_store(str(tmp_path)), "fp")
    assert found is not None
    assert found.step == 2


def test_points_that_are_not_named_or_not_reached_do_nothing(tmp_path: Path):
    assert run_stage(tmp_path / "a", "a", SELFTRAIN_CRASH_AT="label.before_manifest") == 0
    assert run_stage(tmp_path / "b", "a", SELFTRAIN_CRASH_AT="train.before_manifest#2") == 0


def test_another_process_is_killed_with_it(tmp_path: Path):
    driver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code = run_stage(
            tmp_path,
            "a",
            SELFTRAIN_CRASH_AT="train.before_manifest",
            SELFTRAIN_CRASH_PID=str(driver.pid),
        )
        assert code == -9
        assert driver.wait(timeout=10) == -9
    finally:
        driver.kill()
