"""From an engine's config to the Prefect task runner that its work goes through."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, assert_never

from prefect.task_runners import TaskRunner

from flows.engine_config import DaskEngine, EngineConfig, LocalEngine, RayEngine
from tasks.devices import DeviceChoice, DeviceType, visible_gpus, wants_cuda
from tasks.label_processes import DEATHS_AT_ONE_SHARD


class EngineMissing(ImportError):
    """The packages of an engine are not installed."""


class WorkersLost(RuntimeError):
    """The workers of a cluster died again and again at one group of shards."""


# What Dask and Ray raise when they give up a task whose workers die; by name, since neither need be
# installed.
_LOST = {"KilledWorker", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError"}


def device_of(engine: EngineConfig, device: DeviceChoice) -> DeviceType:
    """Return the type of device, `cpu` or `cuda`, that all workers of the engine compute on.

    Raises: ValueError where CUDA is asked for and is not there, or a cluster contradicts it.
    """
    if isinstance(engine, LocalEngine) or engine.num_gpus == "auto":
        return "cuda" if wants_cuda(device) else "cpu"
    if engine.num_gpus == 1 and device == "cpu":
        raise ValueError(
            f"engine.num_gpus=1, but device=cpu: leave engine.num_gpus of {engine.kind} at auto, or"
            " set device to auto or cuda"
        )
    return "cuda" if engine.num_gpus == 1 else "cpu"


def num_local_workers(wanted: int | str, device: DeviceChoice, *, threads: int = 1) -> int:
    """Return how many workers this machine is given: one for each GPU or core unless set."""
    if wanted != "auto":
        return int(wanted)
    if device == "cuda":
        return max(1, len(visible_gpus()))
    return max(1, len(os.sched_getaffinity(0)) // threads)


def cluster_runner(engine: DaskEngine | RayEngine, device: DeviceChoice) -> TaskRunner[Any]:
    """Return the task runner of a cluster engine, not yet started.

    Args:
        engine: which.
        device: of the work, from `device_of`.
    Raises: EngineMissing, with the command that installs it.
    """
    match engine:
        case DaskEngine():
            return _dask_runner(engine, device)
        case RayEngine():
            return _ray_runner(engine, device)
        case _ as unreachable:
            assert_never(unreachable)


def taking_resources(engine: EngineConfig, device: DeviceChoice) -> AbstractContextManager[Any]:
    """Return a context in which submitted tasks each wait for a GPU of their own, on CUDA."""
    if isinstance(engine, DaskEngine) and device == "cuda":
        from dask.base import annotate

        return annotate(resources={"GPU": 1})
    if isinstance(engine, RayEngine):
        from prefect_ray.context import remote_options

        return remote_options(
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
            max_retries=DEATHS_AT_ONE_SHARD - 1,
        )
    return nullcontext()


def num_workers_of(engine: EngineConfig, runner: Any) -> int:
    """Return how many tasks a started runner of a cluster carries out at a time."""
    if isinstance(engine, DaskEngine):
        return max(1, sum(runner.client.nthreads().values()))
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def explaining_lost_workers(engine: EngineConfig) -> Iterator[None]:
    """Say what became of a group of shards whose workers died again and again."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in _LOST:
            raise
        raise WorkersLost(
            f"the {engine.kind} engine gave up a group of shards: its workers died again and again"
            f" ({type(error).__name__}: {error}). If they are out of memory, use fewer workers or a"
            " smaller labeling.batch_size; what is labelled is kept, and the next run goes on there"
        ) from error


def _dask_runner(engine: DaskEngine, device: DeviceChoice) -> Any:
    with _extra("dask"):
        from distributed import Nanny, Scheduler, SpecCluster
        from prefect_dask.task_runners import DaskTaskRunner
    if engine.address is not None:
        return DaskTaskRunner(address=engine.address)
    count, gpus = _workers_and_gpus(engine, device)
    # No memory limit: Dask would give a worker the share of one core, also where it has a GPU.
    options: dict[str, Any] = {"nthreads": 1, "host": "127.0.0.1", "memory_limit": 0}
    common = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    workers = {
        number: {
            "cls": Nanny,
            "options": options
            | {"env": common | {"CUDA_VISIBLE_DEVICES": gpus[number] if gpus else ""}}
            | ({"resources": {"GPU": 1}} if gpus else {}),
        }
        for number in range(count)
    }
    # A LocalCluster, but each worker with an environment of its own.
    options = {"host": "127.0.0.1", "dashboard": False}
    options["allowed_failures"] = DEATHS_AT_ONE_SHARD - 1
    scheduler = {"cls": Scheduler, "options": options}
    return DaskTaskRunner(
        cluster_class=SpecCluster, cluster_kwargs={"workers": workers, "scheduler": scheduler}
    )


def _ray_runner(engine: RayEngine, device: DeviceChoice) -> Any:
    with _extra("ray"):
        from prefect_ray.task_runners import RayTaskRunner
    if engine.address is not None:
        return RayTaskRunner(address=engine.address)
    count, gpus = _workers_and_gpus(engine, device)
    return RayTaskRunner(
        init_kwargs={
            "num_cpus": count,
            "num_gpus": len(gpus),
            "include_dashboard": False,
        }
    )


def _workers_and_gpus(
    engine: DaskEngine | RayEngine, device: DeviceChoice
) -> tuple[int, list[str]]:
    """Return how many workers a cluster on this machine has, and its GPUs."""
    gpus = visible_gpus() if device == "cuda" else []
    count = num_local_workers(engine.workers, device)
    refuse_shared_gpus(count, gpus, device, named="engine.workers")
    return count, gpus


def refuse_shared_gpus(
    num_workers: int, gpus: Sequence[str], device: DeviceChoice, *, named: str
) -> None:
    """Raise ValueError where there are fewer GPUs than workers to have one each."""
    if device == "cuda" and num_workers > len(gpus):
        raise ValueError(
            f"{num_workers} workers, but there are {len(gpus)} GPUs ({', '.join(gpus)}), and no two"
            f" workers may share one: set {named} to {len(gpus)} or less, or to auto"
        )


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineMissing(
            f"engine.kind={name} needs packages that are not installed ({error}):"
            f" pip install 'selftrain[{name}]', or use engine.kind=local"
        ) from error
