"""Label a corpus with a model: one task per group of shards, on the engine of the config."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from flows import engines
from flows.engine_config import LOCAL_ENGINE, EngineConfig, LocalEngine
from storage.corpus import Shard, load_corpus
from storage.store import Store, open_store
from tasks import labeling
from tasks.calibrating import dev_temperature, finished_calibration
from tasks.classifiers import read_description
from tasks.devices import DeviceChoice, threads_of_labeler, visible_gpus
from tasks.label_jobs import LabelJob, label_as_a_worker
from tasks.label_processes import LocalWorkers, OnShard, ThisProcess, WorkerProcesses
from tasks.labeling_config import LabelingConfig, resolved_form
from tasks.live_progress import LiveProgress
from tasks.policies import GPU_LEASE_SECONDS, GPU_LIMIT
from tasks.predicting import Cut
from tasks.shard_groups import group_shards, work_of
from tasks.specifications import Specification
from tasks.stages import TASK_OPTIONS, Reference, reference, reused
from tasks.teacher_views import Shown

# Processes need seconds to start: below so many images' work the run's own is sooner done, and
# above it each of them has so many at least.
_IMAGES_WORTH_PROCESSES, _IMAGES_OF_A_PROCESS = 2_000, 500


@flow(name="label", persist_result=False)
def label_corpus(
    store: str,
    model: str,
    corpus: str,
    config: LabelingConfig | None = None,
    class_names: list[str] | None = None,
    device: DeviceChoice = "auto",
    max_bad_samples: int = 0,
    engine: EngineConfig = LOCAL_ENGINE,
    label: str = "label",
    artifact: str = "label",
    validation: str | None = None,
    more_models: list[str] | None = None,
    mend: bool = False,
    note: str = "",
) -> Reference | State:
    """Label every shard of a corpus that the model, or the ensemble, has not labelled yet.

    Args:
        store: URL of the store.
        model: fingerprint of the teacher.
        corpus: digest of the corpus, from `selftrain data index --store`.
        config: how to label.
        class_names: label space; default: the model's own.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.
        engine: whose workers label.
        label: name of the stage in progress reports.
        artifact: key of the progress artifact.
        validation: fingerprint of the model's validation on dev, whose temperature the top_k form
            is calibrated by; the full form does not read it. Where labels come from several
            predictions, of dev's labelling under `config.for_dev()`.
        more_models: fingerprints of further teachers, whose predictions are averaged with the
            first one's; class orders are matched by name, and the order of teachers means nothing.
        mend: look at all predictions, though the labelling may be finished, and make lost and
            damaged ones again. Every object is read for it, whatever `config.verify` says.
        note: shown with the progress, such as the teacher's dev accuracy.
    Raises: ManifestMismatch where mended predictions are not those that a finished labelling names.
    """
    started = time.monotonic()
    opened = open_store(store)
    config = config or LabelingConfig()
    models = [model, *(more_models or [])]
    labeler, class_names = labeler_of(opened, models, config, class_names, validation=validation)
    specification = labeling.specify(labeler=labeler, corpus=corpus)
    there = None if mend else reused(opened, specification)
    if there is not None:
        return there
    whole = load_corpus(opened, corpus)
    verify = "full" if mend else config.verify
    missing = labeling.shards_to_label(opened, labeler, whole, verify=verify)
    progress = _LabelingProgress(
        LiveProgress(label, "images", key=artifact, note=note),
        done=whole.num_samples - sum(shard.num_samples for shard in missing),
        total=whole.num_samples,
    )
    processes = 1
    if missing:
        cut = None
        if resolved_form(config, len(class_names)) == "top_k":
            assert validation is not None, "refused above"
            dev = finished_calibration(opened, validation)
            cut = Cut(config.k, dev_temperature(opened, dev))
        job = LabelJob(
            store=opened.url,
            corpus=corpus,
            labeler=labeler,
            models=tuple(models),
            class_names=tuple(class_names),
            config=config,
            device=engines.device_of(engine, device),
            max_bad_samples=max_bad_samples,
            cut=cut,
        )
        processes = _label_all(job, missing, engine, progress)
    seconds = time.monotonic() - started
    return reference(labeling.finish(opened, specification, seconds=seconds, processes=processes))


@dataclass(frozen=True)
class LabelingOrder:
    """A labelling of a run.

    Attributes:
        specification: of the stage.
        title: of the flow run.
        arguments: of `label_corpus`.
    """

    specification: Specification
    title: str
    arguments: Mapping[str, Any]

    def run(self) -> State:
        """Label what is not labelled yet, and return the final state."""
        label: Any = label_corpus.with_options(flow_run_name=self.title)
        return label(**self.arguments, return_state=True)

    def mend(self) -> None:
        """Label again what was lost or damaged since."""
        label: Any = label_corpus.with_options(flow_run_name=f"{self.title} (mending)")
        label(**self.arguments, mend=True)


def labeler_of(
    store: Store,
    models: Sequence[str],
    config: LabelingConfig,
    class_names: Sequence[str] | None = None,
    *,
    validation: str | None = None,
) -> tuple[str, list[str]]:
    """Return the address of one or several teachers' predictions, and their label space.

    Args:
        store: holds the models.
        models: fingerprints.
        config: how to label.
        class_names: label space; default: the first model's own.
        validation: fingerprint of what calibrates the top_k form.
    Raises: ValueError for a model that is named twice, or a setting without effect.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"a teacher is named twice: {', '.join(one[:12] for one in models)}")
    descriptions = {model: read_description(store, model) for model in models}
    views = {model: Shown.of(one).to_json() for model, one in descriptions.items()}
    names = list(class_names or descriptions[models[0]].class_names)
    first, *others = models
    labeler = labeling.labeler_fingerprint(
        config,
        teacher=first,
        view=views[first],
        class_names=names,
        validation=validation,
        more_teachers={model: views[model] for model in others},
    )
    return labeler, names


def _label_all(
    job: LabelJob, missing: Sequence[Shard], engine: EngineConfig, progress: "_LabelingProgress"
) -> int:
    """Label the shards; return how many workers did."""
    with _running(engine, job, missing, progress) as running:
        groups = group_shards(
            missing,
            job.config.shards_per_task,
            num_workers=running.num_workers,
            device=job.device,
        )
        get_run_logger().info(
            "%d shards in %d groups for %d workers of engine %s on %s",
            len(missing),
            len(groups),
            running.num_workers,
            engine.kind,
            job.device,
        )
        futures = [
            running.submit(f"{group[0].stem} + {len(group) - 1}", [shard.stem for shard in group])
            for group in groups
        ]
        try:
            with engines.explaining_lost_workers(engine):
                for future, group in zip(futures, groups, strict=True):
                    future.result()
                    running.on_group(sum(shard.num_samples for shard in group))
        except BaseException:
            running.stop()
            raise
        return running.num_workers


@dataclass(frozen=True)
class _Running:
    """An engine that runs.

    Attributes:
        num_workers: groups that are labelled at a time.
        submit: takes the name of a task run and the stems of a group.
        on_group: called with the samples of a group that is done.
        stop: has all groups end after their present shards, where the engine can.
    """

    num_workers: int
    submit: Callable[[str, list[str]], PrefectFuture[Any]]
    on_group: OnShard
    stop: Callable[[], None]


@contextmanager
def _running(
    engine: EngineConfig, job: LabelJob, missing: Sequence[Shard], progress: "_LabelingProgress"
) -> Iterator[_Running]:
    if not isinstance(engine, LocalEngine):
        runner = engines.cluster_runner(engine, job.device)

        def submit(name: str, stems: list[str]) -> PrefectFuture[Any]:
            named = label_group.with_options(task_run_name=name)
            with engines.taking_resources(engine, job.device):
                return runner.submit(named, {"job": job.to_json(), "stems": stems})

        with runner:
            yield _Running(
                engines.num_workers_of(engine, runner), submit, progress.add, lambda: None
            )
        return
    workers = local_workers(engine, job.device, missing)
    runner = ThreadPoolTaskRunner(max_workers=workers.num_workers)

    def submit_here(name: str, stems: list[str]) -> PrefectFuture[Any]:
        named = label_group_here.with_options(task_run_name=name)
        return runner.submit(
            named, {"workers": workers, "job": job, "stems": stems, "on_shard": progress.add}
        )

    try:
        with runner:
            yield _Running(workers.num_workers, submit_here, lambda num_samples: None, workers.stop)
    finally:
        workers.close()


def local_workers(
    engine: LocalEngine, device: DeviceChoice, missing: Sequence[Shard]
) -> LocalWorkers:
    """Return this machine's workers for so much work, none of them started yet.

    Raises: ValueError if there are fewer GPUs than workers.
    """
    threads = engine.threads
    count = engines.num_local_workers(
        engine.processes, device, threads=1 if threads == "auto" else threads
    )
    if engine.processes == "auto":
        work = work_of(missing)
        is_worth_processes = work >= _IMAGES_WORTH_PROCESSES
        count = min(count, int(work / _IMAGES_OF_A_PROCESS)) if is_worth_processes else 0
    count = min(count, len(missing))
    if threads == "auto":
        threads = threads_of_labeler(device, max(count, 1))
    if count == 0:
        return ThisProcess(threads)
    gpus = visible_gpus() if device == "cuda" else []
    engines.refuse_shared_gpus(count, gpus, device, named="engine.processes")
    return WorkerProcesses(count, threads=threads, gpus=gpus)


@task(name="label-shards", **TASK_OPTIONS)
def label_group_here(
    workers: LocalWorkers, job: LabelJob, stems: list[str], on_shard: OnShard
) -> None:
    """Have a worker of this machine label the shards of one group."""
    with _gpu_slot(job):
        workers.label(job, stems, on_shard)


@task(name="label-shards", **TASK_OPTIONS)
def label_group(job: dict[str, Any], stems: list[str]) -> None:
    """Label the shards of one group in this process, which is a worker of a cluster."""
    label_as_a_worker(LabelJob.from_json(job), stems)


def _gpu_slot(job: LabelJob) -> AbstractContextManager[None]:
    if job.device != "cuda":
        return nullcontext()
    # A limit that nobody has made is none, and a lease that cannot be renewed stops nobody.
    return concurrency(GPU_LIMIT, occupy=1, lease_duration=GPU_LEASE_SECONDS)


class _LabelingProgress:
    """Adds up the images that the workers' threads report."""

    def __init__(self, shown: LiveProgress, *, done: int, total: int) -> None:
        self._shown, self._total = shown, total
        self._done = done
        self._lock = threading.Lock()
        shown.update(done, total)

    def add(self, num_samples: int) -> None:
        """Count images; called from any thread."""
        with self._lock:
            self._done += num_samples
            self._shown.update(self._done, self._total)
