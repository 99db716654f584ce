"""The flow `label` over many tiny shards: its time, the work in it, and its memory.

Run by itself, this file is one labelling: `python -m benchmarks.references.orchestration FOLDER
NUM_SHARDS`.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flows.engine_config import LocalEngine
from flows.labeling import label_corpus
from flows.server import prefect_server
from models.architectures import SmallCnnConfig, build_classifier
from models.description import ModelDescription, main_head, save_model
from storage.corpus import save_corpus
from storage.indexing import corpus_from_index, index_shards
from storage.patterns import expand_shards
from storage.store import Store, open_store
from tasks import label_processes
from tasks.importing import import_exported
from tasks.labeling import LabelingConfig

NUM_WORKERS = 2
NUM_GROUPS = 100

_CLASS_NAMES = tuple(f"class-{i}" for i in range(10))
_IMAGE_SIZE = 8


@dataclass(frozen=True)
class Labeling:
    """One labelling of tiny shards.

    Attributes:
        num_shards: of one image each.
        seconds: of the whole flow, start of the workers included.
        work_seconds: of all workers together, inside `label_shards`.
        driver_mib: peak of memory of the process that runs the flow.
        worker_mib: of the largest worker.
    """

    num_shards: int
    seconds: float
    work_seconds: float
    driver_mib: float
    worker_mib: float

    @property
    def overhead_seconds(self) -> float:
        """Seconds that a worker had no work, on average: all else that the flow does."""
        return self.seconds - self.work_seconds / NUM_WORKERS


def measure(folder: Path, num_shards: int) -> Labeling:
    """Label so many shards in a new process, with a Prefect server of its own.

    What it writes is below `folder` and gone when this returns.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        return _measure(Path(own), num_shards)


def _measure(folder: Path, num_shards: int) -> Labeling:
    # The Prefect home of the benchmark's own, so that no history of the user grows.
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }
    for name in [name for name in environment if name.startswith("PREFECT_API")]:
        del environment[name]
    command = [sys.executable, "-m", "benchmarks.references.orchestration", str(folder)]
    done = subprocess.run(
        [*command, str(num_shards)], stdout=subprocess.PIPE, env=environment, check=True
    )
    return Labeling(**json.loads(done.stdout.splitlines()[-1]))


def _label(folder: Path, num_shards: int) -> Labeling:
    store = open_store(str(folder / f"store-{num_shards}"))
    shards = folder / f"shards-{num_shards}"
    _write_shards(shards, num_shards)
    corpus, locations = corpus_from_index(index_shards(expand_shards(str(shards))))
    save_corpus(store, corpus, locations)
    model = _put_model(store, folder / f"model-{num_shards}")
    timed = folder / f"timed-{num_shards}"
    timed.mkdir()
    os.environ["TIMED_LABEL_WORKERS"] = str(timed)
    label_processes._COMMAND = [sys.executable, "-m", "benchmarks.references.timed_label_worker"]
    with prefect_server():
        started = time.perf_counter()
        label_corpus(
            store.url,
            model,
            corpus.digest,
            LabelingConfig(shards_per_task=max(1, num_shards // NUM_GROUPS)),
            device="cpu",
            engine=LocalEngine(processes=NUM_WORKERS),
        )
        seconds = time.perf_counter() - started
    workers = [json.loads(path.read_text()) for path in timed.iterdir()]
    assert len(workers) == NUM_WORKERS
    return Labeling(
        num_shards=num_shards,
        seconds=seconds,
        work_seconds=sum(worker["work_seconds"] for worker in workers),
        driver_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        worker_mib=max(worker["peak_mib"] for worker in workers),
    )


def _write_shards(folder: Path, num_shards: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(num_shards):
        pixels = random.integers(0, 256, (_IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        with tarfile.open(folder / f"s-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            info = tarfile.TarInfo("0.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)


def _put_model(store: Store, folder: Path) -> str:
    torch.manual_seed(0)
    architecture = SmallCnnConfig(width=4, depth=1)
    description = ModelDescription(
        architecture=architecture, heads=main_head(_CLASS_NAMES), image_size=_IMAGE_SIZE
    )
    network = build_classifier(architecture, len(_CLASS_NAMES), description.normalization)
    save_model(folder, network.eval(), description)
    return import_exported(store, str(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asdict(_label(Path(sys.argv[1]), int(sys.argv[2])))))
