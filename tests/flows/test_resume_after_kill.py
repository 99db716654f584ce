"""kill -9 of the whole run, again and again, then resume: same bytes, nothing done twice."""

import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DRIVERS = Path(__file__).with_name("forked_drivers.py")

OVERRIDES = [
    "rounds=2",
    "data.test=60",
    "data.dev=60",
    "teacher.architecture={kind: small_cnn, width: 8, depth: 1}",
    "student.architecture={kind: small_cnn, width: 8, depth: 1}",
    "teacher.duration.steps=60",
    "student.duration.steps=60",
    "teacher.batch_size=20",
    "student.batch_size=20",
    "teacher.checkpoint_every_steps=10",
    "student.checkpoint_every_steps=10",
    # So short a training labels badly; what is tested here is that it does so twice alike.
    "selection.threshold.confidence=0.1",
    "selection.allow_collapse=true",
]

# In the order of the run; each kill lets it come a little further. `name#n`: when passed the n-th
# time in one process.
CRASH_POINTS = [
    "checkpoint.before_data#2",
    "checkpoint.between_data_and_record#2",
    "train.before_data",
    "train.before_manifest",
    "train.after_manifest",
    "validate.before_data",
    "validate.before_manifest",
    "validate.after_manifest",
    "test.before_data",
    "test.before_manifest",
    "test.after_manifest",
    "label.before_data#3",
    "label.between_data_and_record#2",
    "label.before_manifest",
    "label.after_manifest",
    "select.before_data#4",
    "select.between_data_and_record",
    "select.before_manifest",
    "select.after_manifest",
    "checkpoint.between_data_and_record#3",  # round 1's student
    "train.before_data",
    "train.before_manifest",
    "train.after_manifest",
    "promote.before_data",
    "promote.before_manifest",
    "promote.after_manifest",
]
NUM_RANDOM_KILLS = 3


@pytest.fixture
def drivers(prefect_api: str) -> Iterator[Any]:
    """What starts runs that are to be killed; the server is there already."""
    with runpy.run_path(str(DRIVERS))["forked_drivers"]() as started:
        yield started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Path:
    store = tmp_path_factory.mktemp("uninterrupted") / "store"
    assert _run([sys.executable, "-m", "flows.cli"], _run_in(store)) == 0
    return store


def test_killed_and_resumed_run_equals_uninterrupted_one_and_repeats_nothing(
    tmp_path: Path, uninterrupted: Path, drivers: Any
) -> None:
    store = tmp_path / "store"
    committed: dict[str, tuple[int, int]] = {}
    for point in CRASH_POINTS:
        killed = drivers.start(_run_in(store), {"SELFTRAIN_CRASH_AT": point})
        assert killed.wait(timeout=300) == -signal.SIGKILL, f"{point} was not reached"
        _assert_untouched(store, committed, after=point)
        committed = _committed_data(store)
    moments = random.Random(20)
    for _ in range(NUM_RANDOM_KILLS):
        killed = drivers.start(_run_in(store))
        try:
            assert killed.wait(timeout=moments.uniform(1, 8)) == 0  # done on a fast machine
        except TimeoutError:
            os.kill(killed.pid, signal.SIGKILL)
            assert killed.wait(timeout=60) == -signal.SIGKILL
        _assert_untouched(store, committed, after="a kill at a random moment")
        committed = _committed_data(store)
    resume = ["resume", "killed", "--store", str(store)]
    assert _run([sys.executable, "-m", "flows.cli"], resume) == 0

    _assert_untouched(store, committed, after="the last resume")
    assert _results(store) == _results(uninterrupted)
    # Work skipped: trainings that were killed at their end went on from a checkpoint near it.
    resumed = [p["resumed_at_step"] for p in _provenances(store) if "resumed_at_step" in p]
    assert sum(step >= 40 for step in resumed) >= 2, resumed


def test_control_without_reuse_repeats_work(tmp_path: Path, uninterrupted: Path) -> None:
    """The assertion above can fail: with the reuse checks switched off, it does."""
    store = tmp_path / "store"
    shutil.copytree(uninterrupted, store)
    committed = _committed_data(store)
    driver = (
        "import tasks.labeling, tasks.stages, flows.labeling, flows.selection, flows.cli, sys\n"
        "for module in (tasks.stages, flows.labeling, flows.selection):\n"
        "    module.reused = lambda store, specification: None\n"
        "tasks.labeling.shards_to_label = lambda *where, **how: list(where[2].shards)\n"
        "flows.cli.main()"
    )
    assert _run([sys.executable, "-c", driver], _run_in(store)) == 0
    with pytest.raises(AssertionError, match="was written again"):
        _assert_untouched(store, committed, after="a run that reuses nothing")


def _run_in(store: Path) -> list[str]:
    """Return the arguments of `selftrain` that run the config in a store."""
    overrides = [argument for override in OVERRIDES for argument in ("--set", override)]
    return ["run", "demo", "--name", "killed", "--store", str(store), *overrides]


def _run(command: list[str], arguments: list[str]) -> int:
    """Run the command line in an interpreter of its own, to its end; return the exit code."""
    return subprocess.run(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=600,
        check=False,
    ).returncode


def _committed_data(store: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every data object that a record or manifest names."""
    found: dict[str, tuple[int, int]] = {}
    for record in store.rglob("*.json"):
        if record.parent.name not in ("runs", "events") and "attempts" not in record.parts:
            for path in _paths_in(json.loads(record.read_bytes())):
                stat = (store / path).stat()
                found[path] = (stat.st_ino, stat.st_mtime_ns)
    return found


def _paths_in(value: object) -> list[str]:
    if isinstance(value, dict):
        if {"path", "sha256", "size", "name"} <= value.keys():
            return [value["path"]]
        return [path for one in value.values() for path in _paths_in(one)]
    if isinstance(value, list):
        return [path for one in value for path in _paths_in(one)]
    return []


def _assert_untouched(store: Path, committed: dict[str, tuple[int, int]], *, after: str) -> None:
    now = _committed_data(store)
    for path, identity in committed.items():
        assert now.get(path) == identity, f"{path} was written again after {after}"


def _results(store: Path) -> dict[str, str]:
    """Return the sha256 of what was computed: every manifest, record and named data object.

    Provenance (times, hosts) differs between honest computations and lies beside the results;
    data objects of killed attempts, which nothing names, are no results.
    """
    named = set(_committed_data(store))
    found: dict[str, str] = {}
    for folder in ("models", "predictions", "labelings", "selections", "evaluations"):
        for path in sorted((store / folder).rglob("*")):
            relative = str(path.relative_to(store))
            is_record = path.suffix == ".json" and (
                path.name == "manifest.json"
                or folder == "predictions"
                or path.parent.name == "shards"
            )
            if is_record or relative in named:
                found[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _provenances(store: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_bytes()) for p in (store / "models").rglob("provenance.json")]
