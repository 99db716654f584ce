"""The processes of a selection: same bytes, replaced when they die, gone with their run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest

from models.balancing import CapMinConfig, TopKConfig
from models.debiasing import DistributionAlignmentConfig
from models.out_of_domain import EnergyConfig
from models.thresholds import FixedThresholdConfig, PercentileThresholdConfig
from models.weighting import ConfidenceWeightConfig, SoftMatchConfig, WeightNoneConfig
from storage.manifest import StoredObject
from storage.objects import CorruptObject
from storage.prediction_columns import PredictionReference
from storage.predictions import DamagedPredictions, prediction_record
from tasks import selection_processes
from tasks.distributions import Calibration
from tasks.kept_arrays import KeptArrays
from tasks.selection_config import SelectionConfig
from tasks.selection_gates import Gates
from tasks.selection_processes import (
    SelectionProcesses,
    SelectionStopped,
    SelectionThreads,
    SelectionWorkerLost,
    selection_groups,
    selection_workers,
)
from tasks.selection_rows import Rows, SelectionInputs

CRASH = "select.between_data_and_record"


@pytest.fixture(scope="module")
def workers():
    with closing(SelectionProcesses(2)) as workers:
        yield workers


def plant(lab):
    rng = np.random.default_rng(3)
    predictions = {}
    for shard in lab.unlabeled.shards:
        rows = [(str(i), int(rng.integers(3)), float(rng.uniform(0.4, 1))) for i in range(20)]
        deviations = rng.uniform(0, 0.1, 20).astype(np.float32)
        predictions[shard.stem] = replace(lab.predictions_of(rows), uncertainty=deviations)
    return lab.plant_labeling(lab.store, lab.unlabeled, predictions)


def groups_of(lab):
    stems = [shard.stem for shard in lab.unlabeled.shards]
    return [stems[:2], stems[2:4], stems[4:]]


def rules(**changes):
    settings = {
        "calibration": "none",
        "out_of_domain": EnergyConfig(max_energy=0.0),
        "threshold": PercentileThresholdConfig(),
        "weighting": SoftMatchConfig(),
        "balance": TopKConfig(k=11),
        "allow_collapse": True,
    }
    return SelectionConfig(**settings | changes)


def is_there(process):
    """Whether a process runs; a dead one may wait for whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def remaining(processes):
    """Which of some killed processes are still there when they have had time to go."""
    deadline = time.monotonic() + 10
    while any(map(is_there, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [process for process in processes if is_there(process)]


def test_processes_write_the_bytes_that_this_process_writes(lab, workers, tmp_path):
    config = rules()
    here = lab.select(plant(lab), None, config, groups=groups_of(lab))
    other = lab.in_store(tmp_path / "other")
    elsewhere = other.select(plant(other), None, config, groups=groups_of(lab), workers=workers)
    assert here.counts["unique"] > 0
    # The manifest names every file by its sha256.
    assert elsewhere.sha256 == here.sha256
    for stored in here.objects:
        assert other.store.read(stored.path) == lab.store.read(stored.path)


def test_passes_read_what_was_ranked_before_and_without_it_the_predictions(lab, monkeypatch):
    labels = plant(lab)
    reads = []
    read = Rows.read.__func__

    def noted(cls, store, inputs, stem, *, to_write=False):
        reads.append((inputs.done[-1], to_write))
        return read(cls, store, inputs, stem, to_write=to_write)

    monkeypatch.setattr(Rows, "read", classmethod(noted))
    ties = rules(threshold=FixedThresholdConfig(confidence=0.5), weighting=WeightNoneConfig())
    first = lab.select(labels, None, ties, groups=groups_of(lab))
    num_shards = len(lab.unlabeled.shards)
    num_reads = reads.count(("weight", False))
    assert num_reads > num_shards  # to count, and to look for the boundary
    reads.clear()
    shutil.rmtree(Path(lab.store.url) / "selections")
    with TemporaryFile() as scratch:
        second = lab.select(labels, None, ties, groups=groups_of(lab), scratch=scratch)
        size = scratch.seek(0, os.SEEK_END)
    assert reads.count(("weight", False)) == num_shards
    assert size > 0
    assert second.sha256 == first.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"debias": DistributionAlignmentConfig(target="uniform"), "target": "soft"},
        {"debias": DistributionAlignmentConfig(target="uniform"), "target": "hard"},
        {
            "balance": TopKConfig(k=11, upsample=False, classes_per_image=2),
            "target": "hard",
        },
        {"balance": CapMinConfig(floor=1, by="uncertainty"), "target": "hard"},
    ],
    ids=["debiased soft", "debiased hard", "two classes", "by uncertainty"],
)
def test_what_one_pass_keeps_for_the_next_changes_no_byte(
    lab, monkeypatch, changes: dict[str, Any]
):
    threshold, weighting = FixedThresholdConfig(confidence=0.5), ConfidenceWeightConfig()
    labels, config = plant(lab), rules(threshold=threshold, weighting=weighting, **changes)
    calibrated = []
    compute = Calibration.labels_and_confidences

    def noted(self, *arguments):
        calibrated.append(self)
        return compute(self, *arguments)

    monkeypatch.setattr(Calibration, "labels_and_confidences", noted)
    first = lab.select(labels, None, config, groups=groups_of(lab))
    assert first.counts["unique"] > 0
    num_calibrated = len(calibrated)
    calibrated.clear()
    shutil.rmtree(Path(lab.store.url) / "selections")
    with TemporaryFile() as scratch:
        second = lab.select(labels, None, config, groups=groups_of(lab), scratch=scratch)
    assert second.sha256 == first.sha256
    if "debias" in changes:
        assert len(calibrated) == len(lab.unlabeled.shards) < num_calibrated


def test_kept_arrays_come_back_as_they_were_or_not_at_all(monkeypatch):
    with TemporaryFile() as file:
        places = KeptArrays.of(file.fileno(), [("a", 27), ("b", 26), ("c", 0), ("d", 16)])
        assert places.kept("a") is None
        labels, values = np.array([7, 0], np.uint32), np.array([0.25, 1], np.float32)
        passes = np.array([True, False])
        places.keep("b", [labels, values, passes, np.array([0.125])])
        places.keep("c", [labels[:0].astype(np.int64), values[:0].astype(np.float64)])
        places.keep("d", [labels[::-1], labels])
        assert places.kept("a") is None
        found = places.of_shards(["b"]).kept("b")
        assert found is not None
        assert [one.dtype for one in found] == [np.uint32, np.float32, np.bool_, np.float64]
        assert [one.tolist() for one in found] == [[7, 0], [0.25, 1], [True, False], [0.125]]
        empty = places.kept("c")
        assert empty is not None
        assert [(len(one), one.dtype) for one in empty] == [(0, np.int64), (0, np.float64)]
        turned = places.kept("d")
        assert turned is not None
        assert [one.tolist() for one in turned] == [[0, 7], [7, 0]]
        # The disk fills up while arrays are written: they are not there.
        monkeypatch.setattr(os, "pwritev", lambda descriptor, parts, place: 1)
        places.keep("a", [labels, values])
        assert places.kept("a") is None


def test_workers_that_die_on_the_way_change_no_byte(lab, tmp_path, monkeypatch):
    here = lab.select(plant(lab), None, rules(), groups=groups_of(lab))
    other = lab.in_store(tmp_path / "other")
    # Every worker records one group, and is killed at its second one; its successor does that.
    monkeypatch.setenv("SELFTRAIN_CRASH_AT", f"{CRASH}#2")
    with closing(SelectionProcesses(1)) as workers:
        first = workers.run(os.getpid)
        elsewhere = other.select(
            plant(other), None, rules(), groups=groups_of(lab), workers=workers
        )
        assert workers.run(os.getpid) != first
    assert elsewhere.sha256 == here.sha256


def test_a_group_at_which_every_worker_dies_is_given_up_and_goes_on_later(
    lab, monkeypatch, tmp_path
):
    other = lab.in_store(tmp_path / "other")
    here = other.select(plant(other), None, rules(), groups=groups_of(lab))
    monkeypatch.setenv("SELFTRAIN_CRASH_AT", CRASH)
    with (
        closing(SelectionProcesses(1)) as workers,
        pytest.raises(SelectionWorkerLost, match=r"3 worker processes.*processes lower") as caught,
    ):
        lab.select(plant(lab), None, rules(), groups=groups_of(lab), workers=workers)
    assert "was ended by SIGKILL" in str(caught.value)
    monkeypatch.delenv("SELFTRAIN_CRASH_AT")
    assert lab.select(plant(lab), None, rules(), groups=groups_of(lab)).sha256 == here.sha256


def test_a_worker_that_is_killed_is_replaced_and_its_work_done_again(workers, tmp_path):
    script = f"mkdir {tmp_path}/once && kill -9 $PPID; echo done"
    assert workers.run(subprocess.check_output, ["sh", "-c", script]) == b"done\n"
    assert (tmp_path / "once").is_dir()


def test_errors_keep_their_type_and_message_and_tell_where(lab, workers):
    labels = plant(lab)
    digest = lab.unlabeled.shards[3].digest
    path = prediction_record(lab.store, labels.inputs["labeler"].fingerprint, digest)["object"]
    file = Path(lab.store.url) / path["path"]
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    with pytest.raises(DamagedPredictions, match=file.name) as caught:
        lab.select(labels, None, rules(), groups=groups_of(lab), workers=workers)
    assert isinstance(caught.value, CorruptObject)
    assert "in a process of the selection:\nTraceback" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="invalid literal for int"):
        workers.run(int, "x")


def test_workers_that_cannot_start_say_why(monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit('no numpy here')"]
    monkeypatch.setattr(selection_processes, "_COMMAND", command)
    with (
        closing(SelectionProcesses(1)) as workers,
        pytest.raises(SelectionWorkerLost, match="no numpy here"),
    ):
        workers.run(int, "1")


def test_passes_need_not_wait_for_workers_that_start(monkeypatch):
    with closing(SelectionProcesses(1)) as workers:
        worker = workers.run(os.getpid)  # which waits
        assert workers.run_at_once(os.getpid) == worker != os.getpid()
    never_ready = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(selection_processes, "_COMMAND", never_ready)
    with closing(SelectionProcesses(1)) as workers:
        assert workers.run_at_once(os.getpid) == os.getpid()
        assert workers.run_at_once(os.getpid) == os.getpid()


def test_closing_ends_what_goes_on_at_once_and_is_no_loss_of_workers():
    workers = SelectionProcesses(2)
    process = workers.run(os.getpid)
    found = []

    def sleep():
        try:
            workers.run(time.sleep, 60)
        except SelectionStopped as error:
            found.append(error)

    threads = [threading.Thread(target=sleep) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    workers.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - started < 5
    assert len(found) == 2
    assert not remaining([process])
    with pytest.raises(SelectionStopped):
        workers.run(os.getpid)


def test_nothing_is_carried_out_once_idle_workers_are_closed():
    workers = SelectionProcesses(1)
    workers.close()
    for run in (workers.run, workers.run_at_once):
        with pytest.raises(SelectionStopped):
            run(os.getpid)


@pytest.mark.parametrize("is_busy", [False, True])
def test_nothing_outlives_a_run_that_is_killed(is_busy):
    script = (
        "import os, sys, threading, time\n"
        "from tasks.selection_processes import SelectionProcesses\n"
        "workers = SelectionProcesses(2)\n"
        "functions = (os.getpid, os.getpid, os.getppid)\n"
        "print(*map(workers.run, functions), flush=True)\n"
        f"workers.run(time.sleep, 60) if {is_busy} else time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    processes = [int(number) for number in run.stdout.readline().split()]
    assert len(set(processes)) == 3
    assert all(map(is_there, processes))
    time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not remaining(processes)


def test_workers_whose_run_died_while_they_started_end():
    ours, theirs = Pipe()
    with ours, theirs:
        another = str(os.getppid())
        command = [sys.executable, "-m", "tasks.selection_worker", another, str(theirs.fileno())]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=60, check=False)
        assert done.returncode == 0
        assert not ours.poll(), "a worker was forked and said that it is ready"


def test_small_corpora_and_single_workers_stay_in_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)))
    monkeypatch.setattr(selection_processes, "SelectionProcesses", lambda count, descriptors: count)
    few, many = 10**7 - 1, 10**7
    cases: tuple[tuple[Any, int, int, int], ...] = (
        ("auto", few, 299, 0),
        ("auto", few, 300, 3),
        ("auto", many, 9, 3),
        ("auto", many, 2, 2),
        ("auto", many, 1, 0),
        (0, many, 9, 0),
        (1, many, 9, 0),
        (2, few, 9, 2),
    )
    for processes, num_rows, num_shards, expected in cases:
        groups = [[str(number)] for number in range(num_shards)]
        workers = selection_workers(processes, num_rows=num_rows, groups=groups)
        found = 0 if isinstance(workers, SelectionThreads) else workers
        assert found == expected, (processes, num_rows, num_shards)


def test_groups_depend_on_the_corpus_alone_and_are_many_where_processes_share_them():
    def sizes(num_shards, num_rows):
        stems = [f"{i:05d}" for i in range(num_shards)]
        groups = selection_groups(stems, num_rows=num_rows)
        assert [stem for group in groups for stem in group] == stems
        return [len(group) for group in groups]

    few, many = 1000, 10**9
    assert sizes(5, few) == [5]
    assert sizes(70, few) == [32, 32, 6]
    assert sizes(6400, few) == [64] * 100
    assert sizes(5, many) == [1] * 5
    assert sizes(70, many) == [3] * 23 + [1]
    assert sizes(1000, many) == [32] * 31 + [8]
    assert sizes(6400, many) == [64] * 100


def test_a_group_is_sent_its_own_shards_and_leaks_alone():
    shards = {
        stem: PredictionReference(
            StoredObject(stem, f"{stem}.parquet", 1, "0" * 64), 4, 3, None, ()
        )
        for stem in "abc"
    }
    gates = Gates({"a": frozenset("0"), "c": frozenset("12")})
    inputs = SelectionInputs(
        *("corpus", "labeler", 3, Calibration(), 5, 1), shards=shards, gates=gates
    )
    some = inputs.of_shards(["c", "b"])
    assert dict(some.shards) == {"c": shards["c"], "b": shards["b"]}
    assert dict(some.gates.leaked) == {"c": frozenset("12")}
    assert some.stream == 5
