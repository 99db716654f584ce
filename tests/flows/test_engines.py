"""Every engine gives the same bytes, outlives its workers, and says what it lacks."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from flows import engines
from flows.engine_config import DaskEngine, EngineConfig, LocalEngine, RayEngine
from flows.engines import EngineMissing, WorkersLost
from flows.labeling import label_corpus, label_group_here, local_workers
from storage.corpus import Shard
from tasks.devices import DeviceType
from tasks.label_processes import LabelWorkerLost, ThisProcess, WorkerProcesses
from tasks.labeling_config import LabelingConfig
from tasks.policies import GPU_LIMIT


def cluster(engine: Any, name: str) -> Any:
    """A parameter that is skipped where the engine is not installed; starting one takes long."""
    missing = importlib.util.find_spec(name) is None
    reason = f"{name} is not installed: pip install 'selftrain[{engine.kind}]'"
    # Each worker that dies costs the start of another, with all imports.
    marks = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(missing, reason=reason)]
    return pytest.param(engine, id=engine.kind, marks=marks)


ENGINES = [
    pytest.param(LocalEngine(processes=2), id="local"),
    cluster(DaskEngine(workers=2), "prefect_dask"),
    cluster(RayEngine(workers=2), "prefect_ray"),
]


@pytest.fixture
def taught(taught: Any, prefect_api: str) -> Any:
    """This test's store with the pipeline's teacher in it, and a server for its flows."""
    return taught


def label(lab: Any, model: str, engine: EngineConfig, *, shards_per_task: int = 2) -> Any:
    return label_corpus(
        lab.store.url,
        model,
        lab.unlabeled.digest,
        LabelingConfig(batch_size=16, shards_per_task=shards_per_task),
        list(lab.class_names),
        engine=engine,
    )


def with_one_worker(engine: EngineConfig) -> EngineConfig:
    return LocalEngine(processes=1) if engine.kind == "local" else type(engine)(workers=1)


def predictions_of(lab: Any, model: str) -> dict[str, str]:
    folder = Path(lab.store.url) / "predictions" / lab.labeler(model)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*-*.parquet")}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_bytes_of_one_process(
    engine: EngineConfig, pipeline: Any, taught: Any
) -> None:
    teacher = pipeline.teacher.fingerprint
    found = label(taught, teacher, engine)
    assert found["manifest_sha256"] == pipeline.labels.sha256
    assert predictions_of(taught, teacher) == predictions_of(pipeline.lab, teacher)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dask_cluster_that_is_there_is_used_by_its_address(pipeline: Any, taught: Any) -> None:
    dask: Any = pytest.importorskip("distributed", reason="pip install 'selftrain[dask]'")
    teacher = pipeline.teacher.fingerprint
    with dask.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as there:
        found = label(taught, teacher, DaskEngine(address=there.scheduler_address))
    assert found["manifest_sha256"] == pipeline.labels.sha256
    assert predictions_of(taught, teacher) == predictions_of(pipeline.lab, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_shards_of_a_killed_worker_are_labelled_by_another(
    engine: EngineConfig, pipeline: Any, taught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = pipeline.teacher.fingerprint
    # Every worker process dies, by SIGKILL, when it is about to store its third shard.
    monkeypatch.setenv("SELFTRAIN_CRASH_AT", "label.before_data#3")
    found = label(taught, teacher, with_one_worker(engine), shards_per_task=3)
    assert found["manifest_sha256"] == pipeline.labels.sha256
    assert predictions_of(taught, teacher) == predictions_of(pipeline.lab, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_workers_that_keep_dying_end_in_a_clear_error(
    engine: EngineConfig, pipeline: Any, taught: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFTRAIN_CRASH_AT", "label.before_data")
    with pytest.raises((LabelWorkerLost, WorkersLost), match="died") as caught:
        # One group: each has its own deaths, and each death costs the start of another worker.
        label(taught, pipeline.teacher.fingerprint, with_one_worker(engine), shards_per_task=5)
    assert "labeling.batch_size" in str(caught.value)


@pytest.mark.slow
def test_after_kill_9_of_the_flow_no_worker_lives_and_a_resume_labels_what_is_missing(
    pipeline: Any, taught: Any, tmp_path: Path
) -> None:
    teacher = pipeline.teacher.fingerprint
    mark = uuid.uuid4().hex
    script = (
        "import sys; from flows.labeling import label_corpus;"
        "from flows.engine_config import LocalEngine; from tasks.labeling import LabelingConfig;"
        "label_corpus(*sys.argv[1:4], LabelingConfig(batch_size=16, shards_per_task=3),"
        " sys.argv[4:], engine=LocalEngine(processes=2))"
    )
    arguments = [sys.executable, "-c", script, taught.store.url, teacher]
    arguments += [taught.unlabeled.digest, *taught.class_names]
    # The first worker to get to its third shard kills the flow, as a lost machine would.
    killed = subprocess.Popen(
        ["sh", "-c", 'SELFTRAIN_CRASH_PID=$$ exec "$@"', "sh", *arguments],
        env={**os.environ, "SELFTRAIN_CRASH_AT": "label.before_data#3", "SELFTRAIN_MARK": mark},
        stdin=subprocess.DEVNULL,
    )
    assert killed.wait(timeout=120) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _processes_marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes_marked(mark) == []
    folder = Path(taught.store.url) / "predictions" / taught.labeler(teacher)
    records = [path for path in folder.glob("*.json") if path.name != "resolved.json"]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in records}
    assert 2 <= len(before) < 5

    found = label(taught, teacher, LocalEngine())

    assert found["manifest_sha256"] == pipeline.labels.sha256
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert predictions_of(taught, teacher) == predictions_of(pipeline.lab, teacher)


def _processes_marked(mark: str) -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SELFTRAIN_MARK={mark}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


@pytest.mark.parametrize(
    ("engine", "module"), [(DaskEngine(), "distributed"), (RayEngine(), "prefect_ray")]
)
def test_a_missing_extra_names_the_command_that_installs_it(
    engine: DaskEngine | RayEngine, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(EngineMissing, match=rf"pip install 'selftrain\[{engine.kind}\]'"):
        engines.cluster_runner(engine, "cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "spark"}, "'local', 'dask', 'ray'"),
        ({"kind": "local", "address": "tcp://a:1"}, "Extra inputs are not permitted"),
        ({"kind": "local", "processes": -1}, "greater than or equal to 0"),
        ({"kind": "dask", "workers": 0}, "greater than or equal to 1"),
        ({"kind": "ray", "num_gpus": 2}, "Input should be 0, 1 or 'auto'"),
    ],
)
def test_wrong_engines_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(EngineConfig).validate_python(given)


def shards(num_samples: int, count: int) -> list[Shard]:
    return [Shard(f"s{i}", f"{i:064x}", num_samples, 0) for i in range(count)]


def test_a_small_corpus_is_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    small, larger, large = shards(100, 10), shards(500, 10), shards(10_000, 10)
    assert isinstance(local_workers(LocalEngine(), "cpu", small), ThisProcess)
    # Half of 5,000 images is 2,500 of work: five processes of 500.
    assert _num_processes(LocalEngine(), larger) == 5
    assert _num_processes(LocalEngine(), large) == 8
    assert _num_processes(LocalEngine(threads=4), large) == 2
    assert _num_processes(LocalEngine(processes=3), small) == 3
    assert _num_processes(LocalEngine(processes=30), small) == 10, "no more than shards"
    assert isinstance(local_workers(LocalEngine(processes=0), "cpu", large), ThisProcess)


def _num_processes(engine: LocalEngine, missing: list[Shard]) -> int:
    workers = local_workers(engine, "cpu", missing)
    assert isinstance(workers, WorkerProcesses)
    workers.close()
    return workers.num_workers


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")


@pytest.mark.usefixtures("two_gpus")
def test_every_worker_has_a_gpu_and_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = local_workers(LocalEngine(), "cuda", shards(10_000, 10))
    assert isinstance(workers, WorkerProcesses)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in workers._environments] == ["4", "6"]
    workers.close()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for engine, decoders in ((LocalEngine(), "6"), (LocalEngine(threads=3), "3")):
        workers = local_workers(engine, "cuda", shards(10_000, 10))
        assert isinstance(workers, WorkerProcesses)
        assert workers._options == ["--threads", "1", "--decoders", decoders]
        workers.close()
    with pytest.raises(ValueError, match=r"3 workers, but there are 2 GPUs \(4, 6\), and no two"):
        local_workers(LocalEngine(processes=3), "cuda", shards(10_000, 10))


@pytest.mark.usefixtures("two_gpus")
def test_the_workers_of_a_local_dask_cluster_have_one_gpu_each() -> None:
    pytest.importorskip("prefect_dask", reason="pip install 'selftrain[dask]'")
    runner: Any = engines.cluster_runner(DaskEngine(), "cuda")
    workers = runner.cluster_kwargs["workers"]
    options = [worker["options"] for worker in workers.values()]
    assert [one["env"]["CUDA_VISIBLE_DEVICES"] for one in options] == ["4", "6"]
    assert [one["resources"] for one in options] == [{"GPU": 1}] * 2
    assert [one["nthreads"] for one in options] == [1, 1]
    with pytest.raises(ValueError, match=r"set engine\.workers to 2 or less"):
        engines.cluster_runner(DaskEngine(workers=3), "cuda")


def test_the_device_of_a_cluster_is_that_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.device_of(DaskEngine(num_gpus=1), "auto") == "cuda", "though there is none here"
    assert engines.device_of(RayEngine(num_gpus=0), "auto") == "cpu"
    assert engines.device_of(RayEngine(), "cpu") == "cpu"
    with pytest.raises(ValueError, match=r"engine\.num_gpus=1, but device=cpu"):
        engines.device_of(DaskEngine(num_gpus=1), "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert engines.device_of(LocalEngine(), "auto") == "cuda"
    assert engines.device_of(LocalEngine(), "cpu") == "cpu"


def test_a_task_of_a_cluster_waits_for_a_gpu_of_its_own() -> None:
    dask: Any = pytest.importorskip("dask.base", reason="pip install 'selftrain[dask]'")
    with engines.taking_resources(DaskEngine(), "cuda"):
        assert dask.get_annotations() == {"resources": {"GPU": 1}}
    with engines.taking_resources(DaskEngine(), "cpu"):
        assert dask.get_annotations() == {}
    context: Any = pytest.importorskip("prefect_ray.context", reason="pip install 'selftrain[ray]'")
    numbers: dict[DeviceType, int] = {"cuda": 1, "cpu": 0}
    for device, gpus in numbers.items():
        with engines.taking_resources(RayEngine(), device):
            options = context.RemoteOptionsContext.get().current_remote_options
            assert (options["num_cpus"], options["num_gpus"]) == (1, gpus)


@pytest.mark.parametrize(("device", "slots"), [("cuda", 1), ("cpu", 0)])
def test_a_group_on_a_gpu_takes_a_slot_of_prefects_limit_while_it_is_labelled(
    monkeypatch: pytest.MonkeyPatch, device: str, slots: int
) -> None:
    held: list[str] = []

    @contextmanager
    def concurrency(name: str, *, occupy: int, lease_duration: float) -> Iterator[None]:
        held.extend([name] * occupy)
        yield
        held.clear()

    seen: list[list[str]] = []
    workers: Any = SimpleNamespace(label=lambda job, stems, on_shard: seen.append([*held]))
    monkeypatch.setattr("flows.labeling.concurrency", concurrency)
    label_here: Any = label_group_here.fn
    label_here(workers, SimpleNamespace(device=device), ["a"], print)
    assert seen == [[GPU_LIMIT] * slots]
    assert held == []
