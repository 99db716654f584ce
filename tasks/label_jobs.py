"""What a worker of any engine is told about a labelling, and how it labels a group of shards."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter

from storage.store import open_store
from tasks import labeling
from tasks.devices import DeviceType, gpus_of_machine, resolve_device, threads_of_labeler
from tasks.ensembles import Ensemble, load_ensemble
from tasks.labeling_config import LabelingConfig
from tasks.predicting import Cut


@dataclass(frozen=True)
class LabelJob:
    """All that the workers of one labelling have in common; plain values that JSON can hold.

    Attributes:
        store: URL of the store.
        corpus: digest of the corpus.
        labeler: address of the predictions.
        models: fingerprints of the teachers.
        class_names: label space in the run's order.
        config: how to label.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.
        cut: how the top_k form is cut and calibrated; None: the full form.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    store: str
    corpus: str
    labeler: str
    models: tuple[str, ...]
    class_names: tuple[str, ...]
    config: LabelingConfig
    device: DeviceType
    max_bad_samples: int
    cut: Cut | None

    def to_json(self) -> dict[str, Any]:
        """Return the form in which it is sent."""
        return _form.dump_python(self, mode="json")

    @classmethod
    def from_json(cls, sent: dict[str, Any]) -> "LabelJob":
        """Read the form in which it is sent."""
        return _form.validate_python(sent)


_form = TypeAdapter(LabelJob)


def label_group(job: LabelJob, stems: Sequence[str], *, decode_processes: int = 0) -> Iterator[int]:
    """Label shards one by one and yield the number of samples of each once it is committed.

    Models are loaded once a process. The first worker to get here settles the batch size for all.
    `decode_processes` of this process's children decode; 0: threads of its own do.
    """
    store = open_store(job.store)
    ensemble = _ensemble(job)

    def predict(batch_size: int) -> object:
        side = ensemble.largest_view
        image = np.zeros((side, side, 3), np.uint8)
        views = ensemble.views.of_image(image, shard=job.corpus, key="")
        batch = [torch.from_numpy(np.stack([view] * batch_size)) for view in views]
        return ensemble.predict(batch, shard=job.corpus, batch=0)

    batch_size = labeling.resolve_batch_size(
        store,
        job.labeler,
        job.config,
        device=ensemble.device,
        predict=predict,
    )
    yield from labeling.label_shards(
        store,
        job.corpus,
        list(stems),
        ensemble,
        labeler=job.labeler,
        batch_size=batch_size,
        max_bad_samples=job.max_bad_samples,
        cut=job.cut,
        decode_processes=decode_processes,
    )


def label_as_a_worker(job: LabelJob, stems: Sequence[str]) -> None:
    """Label shards in a process that is a cluster's worker.

    On as many CPU threads as the worker processes of one machine have each: the order of sums, and
    with it the last bits, may depend on their number.
    """
    torch.set_num_threads(threads_of_labeler(job.device, gpus_of_machine()))
    for _ in label_group(job, stems):
        pass


# One: the next round's teachers take the place of the last one's.
@functools.lru_cache(maxsize=1)
def _ensemble(job: LabelJob) -> Ensemble:
    ensemble = load_ensemble(
        open_store(job.store),
        job.models,
        job.config,
        device=resolve_device(job.device),
        class_names=job.class_names,
    )
    for teacher in ensemble.teachers:
        # Now, or the first batch, by which the batch size is found, would take memory for it.
        teacher.ready(job.config.precision)
    return ensemble
