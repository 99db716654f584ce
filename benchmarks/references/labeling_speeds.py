"""What a labelling is held against: its parts alone, on as many processes as there are cores."""

import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

from benchmarks.references.labeling_data import (
    CLASS_NAMES,
    CROP_PADDING,
    IMAGE_SIZE,
    NETWORKS,
)
from models.architectures import Normalization, build_classifier
from models.inference import InferenceNetwork, Precision
from storage.corpus import Shard, load_corpus, load_locations, read_samples
from storage.store import open_store
from tasks.decoding import decoded_batches
from tasks.devices import emulates_bf16
from tasks.images import clean_view
from tasks.kept_memory import keep_freed_memory
from tasks.overlapping import read_ahead
from tasks.shard_items import BadSampleBudget
from tasks.view_batches import OpenShard

_BATCH = 16


def images_per_second(work: Callable[..., int], shares: Sequence[tuple[Any, ...]]) -> float:
    """Run one process of one thread for each share, all at once, and return their rate together.

    Starting and warming up are not timed.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(shares)), context.Queue()
    processes = [
        context.Process(target=_timed, args=(work, share, barrier, results)) for share in shares
    ]
    for process in processes:
        process.start()
    spans = [results.get(timeout=900) for _ in processes]
    for process in processes:
        process.join()
    seconds = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    return sum(count for _, _, count in spans) / seconds


def _timed(work: Callable[..., int], share: tuple[Any, ...], barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the stage's workers
    work(*share, is_warmup=True)
    barrier.wait()
    started = time.monotonic()
    count = work(*share, is_warmup=False)
    results.put((started, time.monotonic(), count))


def num_processes() -> int:
    """Return one process a core."""
    return len(os.sched_getaffinity(0))


def stage_decoding(store_url: str, digest: str, stems: list[str], *, is_warmup: bool) -> int:
    """Read, decode and resize as the stage does, with the network taken out of it."""
    store = open_store(store_url)
    corpus, locations = load_corpus(store, digest), load_locations(store, digest)
    wanted = [corpus.shard(stem) for stem in (stems[:1] if is_warmup else stems)]

    def read(shard: Shard) -> OpenShard:
        samples = read_samples(corpus, locations, shard.stem)
        return OpenShard(shard.digest, samples, BadSampleBudget(shard.stem, 0))

    count = 0
    for batch in decoded_batches(
        read_ahead(wanted, read),
        lambda shard, sample, pixels: [clean_view(pixels, IMAGE_SIZE, CROP_PADDING, "bilinear")],
        batch_size=_BATCH,
        threads=0,
    ):
        count += len(np.stack([views[0] for views in batch.views]))  # type: ignore[index]
    return count


def alone_decoding(paths: list[Path], *, is_warmup: bool) -> int:
    """Read, decode and resize as fast as a script can that does nothing else.

    No checksum, no metadata, no care for odd images.
    """
    short, size = IMAGE_SIZE + CROP_PADDING, IMAGE_SIZE
    batch = torch.empty((_BATCH, size, size, 3), dtype=torch.uint8)
    count = 0
    for path in paths[:1] if is_warmup else paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(file.read(), "RGB"))
                height, width = pixels.shape[:2]
                longer = short * max(height, width) // min(height, width)
                sides = (short, longer) if height <= width else (longer, short)
                resized = F.interpolate(
                    pixels[None].permute(0, 3, 1, 2), sides, mode="bilinear", antialias=True
                )
                top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
                cut = resized[0, :, top : top + size, left : left + size]
                batch[count % _BATCH] = cut.permute(1, 2, 0)
                count += 1
    return count


def resident_forward(
    name: str, precision: Precision, batch_size: int, seconds: float, *, is_warmup: bool
) -> int:
    """Run the network alone on one normalised batch that stays where it is."""
    torch.manual_seed(0)
    classifier = build_classifier(NETWORKS[name], len(CLASS_NAMES), Normalization())
    network = InferenceNetwork(classifier, precision).network
    batch = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    batch = batch.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    batch = batch.contiguous(memory_format=torch.channels_last)
    count, end = 0, time.monotonic() + (seconds / 4 if is_warmup else seconds)
    with torch.inference_mode():
        while count == 0 or time.monotonic() < end:
            network(batch)
            count += batch_size
    return count


@dataclass(frozen=True)
class Forward:
    """How the network alone is computed.

    Attributes:
        name: of the network.
        precision: of its weights and activations.
        batch_size: images.
    """

    name: str
    precision: Precision
    batch_size: int

    def rate(self, seconds: float) -> float:
        """Return images a second, on as many processes as there are cores."""
        share = (self.name, self.precision, self.batch_size, seconds)
        return images_per_second(resident_forward, [share] * num_processes())

    def __str__(self) -> str:
        return f"{self.precision}, batch {self.batch_size}"


def best_forward(name: str, *, batch_sizes: Sequence[int], seconds: float) -> Forward:
    """Return how the network alone is fastest."""
    precisions: tuple[Precision, ...] = ("fp32",) if emulates_bf16("cpu") else ("fp32", "bf16")
    tried = [Forward(name, precision, size) for precision in precisions for size in batch_sizes]
    return max(tried, key=lambda forward: forward.rate(seconds))
