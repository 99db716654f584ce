"""Label a corpus with a model: one task per group of shards."""

import threading
import time
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.graph import View
from storage.corpus import load_corpus
from storage.store import Store, open_store
from tasks import labeling
from tasks.calibrating import dev_temperature
from tasks.classifiers import StoredClassifier, load_classifier, read_description
from tasks.devices import DeviceChoice, resolve_device
from tasks.labeling import LabelingConfig, LabelingStopped
from tasks.live_progress import LiveProgress
from tasks.predicting import Cut
from tasks.specifications import finished_result
from tasks.stages import TASK_OPTIONS, Reference, reference, reused

# Threads do not see SIGTERM or Ctrl-C: the flow's main thread tells them, and they stop between
# shards. One flow of this kind runs in a process at a time.
_stopping = threading.Event()


# One thread, because one device: decoding has threads of its own. Any, because Prefect declares its
# own task runners as no subtype of what `flow` takes (3.8.8).
_ONE_THREAD: Any = ThreadPoolTaskRunner(max_workers=1)


@flow(name="label", task_runner=_ONE_THREAD, persist_result=False)
def label_corpus(
    store: str,
    model: str,
    corpus: str,
    config: LabelingConfig | None = None,
    class_names: list[str] | None = None,
    device: DeviceChoice = "auto",
    max_bad_samples: int = 0,
    label: str = "label",
    artifact: str = "label",
    validation: str | None = None,
) -> Reference | State:
    """Label every shard of a corpus that the model has not labelled yet.

    Args:
        store: URL of the store.
        model: fingerprint of the teacher.
        corpus: digest of the corpus, from `selftrain data index --store`.
        config: how to label.
        class_names: label space; default: the model's own.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.
        label: name of the stage in progress reports.
        artifact: key of the progress artifact.
        validation: fingerprint of the model's validation on dev, whose temperature the top_k form
            is calibrated by; the full form does not read it.
    """
    started = time.monotonic()
    opened = open_store(store)
    config = config or LabelingConfig()
    description = read_description(opened, model)
    class_names = class_names or list(description.class_names)
    labeler = labeling.labeler_fingerprint(
        config,
        teacher=model,
        view=View.of(description).to_json(),
        class_names=class_names,
        validation=validation,
    )
    specification = labeling.specify(labeler=labeler, corpus=corpus)
    there = reused(opened, specification)
    if there is not None:
        return there
    classifier = load_classifier(
        opened, model, device=resolve_device(device), class_names=class_names
    )
    whole = load_corpus(opened, corpus)
    missing = labeling.shards_to_label(opened, labeler, whole)
    batch_size = labeling.resolve_batch_size(
        opened,
        labeler,
        config,
        image_size=description.image_size,
        device=classifier.device,
    )
    cut = None
    if labeling.resolved_form(config, len(class_names)) == "top_k":
        assert validation is not None, "refused above"
        cut = Cut(
            config.k, dev_temperature(opened, finished_result(opened, "validate", validation))
        )
    progress = LiveProgress(label, "images", key=artifact)
    done = whole.num_samples - sum(shard.num_samples for shard in missing)
    progress.update(done, whole.num_samples)
    _stopping.clear()
    futures = []
    for group in labeling.group_shards(missing, config.shards_per_task):
        futures.append(
            label_group.with_options(task_run_name=f"{group[0].stem} + {len(group) - 1}").submit(
                opened,
                corpus,
                [shard.stem for shard in group],
                classifier,
                labeler=labeler,
                config=config,
                batch_size=batch_size,
                max_bad_samples=max_bad_samples,
                cut=cut,
                progress=progress,
                done_before=done,
                total=whole.num_samples,
            )
        )
        done += sum(shard.num_samples for shard in group)
    try:
        for future in futures:
            future.result()
    except BaseException:
        _stopping.set()
        raise
    return reference(labeling.finish(opened, specification, seconds=time.monotonic() - started))


@task(name="label-shards", **TASK_OPTIONS)
def label_group(
    store: Store,
    corpus: str,
    stems: list[str],
    classifier: StoredClassifier,
    *,
    labeler: str,
    config: LabelingConfig,
    batch_size: int,
    max_bad_samples: int,
    cut: Cut | None,
    progress: LiveProgress,
    done_before: int,
    total: int,
) -> int:
    """Label the shards of one group and return the number of images."""
    started, done = time.monotonic(), 0
    if _stopping.is_set():
        raise LabelingStopped("stopped before this group began")
    for num_samples in labeling.label_shards(
        store,
        corpus,
        stems,
        classifier,
        labeler=labeler,
        precision=config.precision,
        batch_size=batch_size,
        max_bad_samples=max_bad_samples,
        cut=cut,
    ):
        done += num_samples
        rate = done / (time.monotonic() - started)
        progress.update(done_before + done, total, images_per_second=rate)
        if _stopping.is_set():
            raise LabelingStopped(f"stopped after {done} images of this group")
    return done
