"""Worker processes on this machine: same bytes, replaced when they die, stopped between shards."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import label_jobs, label_processes
from tasks.batch_sizes import largest_output_bytes
from tasks.label_jobs import LabelJob, label_group
from tasks.label_processes import (
    LabelingFailed,
    LabelingRefused,
    LabelWorkerLost,
    ThisProcess,
    WorkerProcesses,
)
from tasks.labeling import LabelingConfig, LabelingStopped
from tasks.predicting import Cut


def job_of(lab: Any, model: str, **changes: Any) -> LabelJob:
    settings: dict[str, Any] = {
        "store": lab.store.url,
        "corpus": lab.unlabeled.digest,
        "labeler": lab.labeler(model),
        "models": (model,),
        "class_names": lab.class_names,
        "config": LabelingConfig(batch_size=16),
        "device": "cpu",
        "max_bad_samples": 0,
        "cut": None,
    }
    return LabelJob(**settings | changes)


def predictions_of(lab: Any, labeler: str) -> dict[str, str]:
    """Name -> sha256 of every object and record of a labeler."""
    folder = Path(lab.store.url) / "predictions" / labeler
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*-*.parquet")}


def stems_of(lab: Any) -> list[str]:
    return [shard.stem for shard in lab.unlabeled.shards]


@pytest.fixture
def workers() -> Any:
    opened: list[WorkerProcesses] = []

    def open_workers(num_workers: int) -> WorkerProcesses:
        opened.append(WorkerProcesses(num_workers, threads=1))
        return opened[-1]

    yield open_workers
    for one in opened:
        one.stop()
        one.close()


def label_side_by_side(
    workers: WorkerProcesses, job: LabelJob, groups: Sequence[Sequence[str]]
) -> list[int]:
    """Label every group by a worker of its own; return the samples of each shard as reported."""
    sizes: list[int] = []
    threads = [threading.Thread(target=workers.label, args=(job, g, sizes.append)) for g in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sizes


def test_a_job_is_the_same_after_it_was_sent(pipeline: Any) -> None:
    changes = {"class_names": ("ä", "b", "c"), "cut": Cut(2, 0.1 + 0.2)}
    job = job_of(pipeline.lab, pipeline.teacher.fingerprint, **changes)
    assert LabelJob.from_json(job.to_json()) == job


def test_two_processes_give_the_bytes_of_one_and_report_every_shard(
    pipeline: Any, taught: Any, workers: Any, tmp_path: Path
) -> None:
    job = job_of(taught, pipeline.teacher.fingerprint)
    two = workers(2)
    sizes = label_side_by_side(two, job, [stems_of(taught)[:2], stems_of(taught)[2:]])
    assert sizes == [10] * 5
    expected = predictions_of(pipeline.lab, job.labeler)
    assert len(expected) == 5
    assert predictions_of(taught, job.labeler) == expected
    # A group that fails costs the worker nothing: it goes on with the next one.
    broken = taught.write_split(tmp_path / "x", {"x-0": [("u", b"\xff\xd8\xff cut", None)]})
    corpus = taught.index_into(taught.store, broken).digest
    with pytest.raises(LabelingRefused, match=r"shard x-0: 1 undecodable .*x-0/u"):
        two.label(job_of(taught, job.models[0], corpus=corpus), ["x-0"], sizes.append)
    two.label(job, stems_of(taught), sizes.append)
    assert sizes == [10] * 10


def test_four_processes_give_the_bytes_of_one(pipeline: Any, taught: Any, workers: Any) -> None:
    job, four = job_of(taught, pipeline.teacher.fingerprint), workers(4)
    first, second, *others = stems_of(taught)
    sizes = label_side_by_side(four, job, [[second, first], *([stem] for stem in others)])
    assert sizes == [10] * 5
    assert len({worker._process.pid for worker in four._running.values()}) == 4
    assert predictions_of(taught, job.labeler) == predictions_of(pipeline.lab, job.labeler)


def test_a_worker_labels_without_the_compiler(pipeline: Any, taught: Any) -> None:
    # The batch size is found, too.
    job = job_of(taught, pipeline.teacher.fingerprint, config=LabelingConfig())
    # The worker's end of stdout is its parent's alone: what is printed goes to stderr.
    script = (
        "import sys; from tasks.label_worker import main; main([])\n"
        "print({'torch', 'torch._dynamo', 'sympy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps({"job": job.to_json(), "stems": stems_of(taught)[:1]}),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"done": 10},
        {"ended": "ok"},
    ]
    assert done.stderr.splitlines()[-1] == "{'torch'}", "its import would take longer than all else"


def test_what_makes_a_network_ready_does_not_count_as_its_activations(
    pipeline: Any, taught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the largest activation of the first image the batch size is found. A last layer's weights
    # may be larger than any, and were copied then.
    job = job_of(taught, pipeline.teacher.fingerprint, config=LabelingConfig())
    found: list[int] = []

    def find(device: torch.device, predict: Callable[[int], object]) -> int:
        found.extend(largest_output_bytes(predict) for _ in range(2))
        return 4

    monkeypatch.setattr("tasks.labeling.find_batch_size", find)
    label_jobs._ensemble.cache_clear()
    list(label_group(job, stems_of(taught)[:1]))
    label_jobs._ensemble.cache_clear()
    first, again = found
    assert first == again


def test_a_stopped_worker_ends_after_its_present_shard(
    pipeline: Any, taught: Any, workers: Any
) -> None:
    job, one = job_of(taught, pipeline.teacher.fingerprint), workers(1)
    stopping: list[threading.Thread] = []

    def stop_at_first(num_samples: int) -> None:
        if not stopping:
            stopping.append(threading.Thread(target=one.stop))
            stopping[0].start()
            stopping[0].join()  # the worker goes on meanwhile, to the end of a shard

    with pytest.raises(LabelingStopped, match="stopped after"):
        one.label(job, stems_of(taught) * 200, stop_at_first)

    with pytest.raises(LabelingStopped, match="before this group began"):
        one.label(job, stems_of(taught), stop_at_first)


# A worker without torch: a shard's stem says what becomes of it.
_PRETENDER = """
import json, os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
for line in sys.stdin:
    order, answer = json.loads(line), {"ended": "ok"}
    for stem in order["stems"]:
        if stem == "dies" or (stem == "dies-once" and not (folder / stem).exists()):
            (folder / stem).touch()
            print("about to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if stem == "fails":
            print("Traceback", file=sys.stderr, flush=True)
            answer = {"ended": "failed", "error": "OSError", "message": "disk"}
            break
        print(json.dumps({"done": 10}), flush=True)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def pretending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", _PRETENDER, str(tmp_path)]
    monkeypatch.setattr(label_processes, "_COMMAND", command)


@pytest.fixture
def job(pipeline: Any) -> LabelJob:
    return job_of(pipeline.lab, pipeline.teacher.fingerprint)


@pytest.mark.usefixtures("pretending")
def test_a_worker_that_is_killed_is_replaced_and_the_rest_sent_again(
    job: LabelJob, workers: Any
) -> None:
    sizes: list[int] = []
    workers(1).label(job, ["a", "b", "dies-once", "c"], sizes.append)
    assert sizes == [10] * 4, "what was reported is not reported again"


@pytest.mark.usefixtures("pretending")
def test_workers_that_keep_dying_end_in_an_error_that_names_the_shard(
    job: LabelJob, workers: Any
) -> None:
    one, sizes = workers(1), []
    with pytest.raises(
        LabelWorkerLost,
        match=r"(?s)3 worker processes in a row died at shard dies .*by SIGKILL.*about to die",
    ):
        one.label(job, ["a", "b", "dies", "c"], sizes.append)
    assert sizes == [10, 10]
    one.label(job, ["d"], sizes.append)
    assert sizes == [10] * 3, "the next group has a worker again"


@pytest.mark.usefixtures("pretending")
def test_a_listener_that_fails_leaves_no_answers_for_the_next_group(
    job: LabelJob, workers: Any
) -> None:
    one, sizes = workers(1), []

    def fail(num_samples: int) -> None:
        raise ConnectionError("the progress cannot be shown")

    with pytest.raises(ConnectionError):
        one.label(job, ["a", "b", "c"], fail)
    one.label(job, ["a", "b"], sizes.append)
    assert sizes == [10, 10]


@pytest.mark.usefixtures("pretending")
def test_a_failure_that_may_pass_comes_with_the_end_of_the_output(
    job: LabelJob, workers: Any
) -> None:
    with pytest.raises(LabelingFailed, match=r"(?s)OSError: disk.*Traceback"):
        workers(1).label(job, ["a", "fails"], lambda num_samples: None)


# Ends well once another worker has come to its end as well; exit code 3 if none does.
_WAITS_FOR_ANOTHER = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
for line in sys.stdin:
    print(json.dumps({"ended": "ok"}), flush=True)
(folder / f"{os.getpid()}.ended").touch()
deadline = time.monotonic() + 15
while len(list(folder.glob("*.ended"))) < 2:
    if time.monotonic() > deadline:
        sys.exit(3)
    time.sleep(0.01)
"""


def test_workers_that_have_nothing_to_do_end_side_by_side(
    job: LabelJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", _WAITS_FOR_ANOTHER, str(tmp_path)]
    monkeypatch.setattr(label_processes, "_COMMAND", command)
    two = WorkerProcesses(2, threads=1)
    for _ in range(2):  # a slot that was used goes behind the other
        two.label(job, ["a"], lambda num_samples: None)
    processes = [worker._process for worker in two._running.values()]
    two.close()
    assert [process.returncode for process in processes] == [0, 0]


def test_each_worker_sees_one_gpu_and_workers_on_the_cpu_see_none() -> None:
    workers = WorkerProcesses(2, threads=3, gpus=["2", "MIG-7"])
    assert [e["CUDA_VISIBLE_DEVICES"] for e in workers._environments] == ["2", "MIG-7"]
    assert workers._environments[0]["OMP_NUM_THREADS"] == "1"
    assert workers._options == ["--threads", "1", "--decoders", "3"]
    workers.close()
    workers = WorkerProcesses(1, threads=1)
    assert workers._environments[0]["CUDA_VISIBLE_DEVICES"] == ""
    workers.close()


def test_labelling_in_this_process_stops_between_shards(pipeline: Any, taught: Any) -> None:
    job, own, sizes = job_of(taught, pipeline.teacher.fingerprint), ThisProcess(threads=1), []

    def stop_at_second(num_samples: int) -> None:
        sizes.append(num_samples)
        if len(sizes) == 2:
            own.stop()

    with pytest.raises(LabelingStopped, match="stopped after 2 shards of this group"):
        own.label(job, stems_of(taught), stop_at_second)
    assert len(predictions_of(taught, job.labeler)) == 2
