"""The parts of a labelling on one GPU: decoding on all cores or on the GPU, and the network."""

import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.references.labeling_data import CLASS_NAMES, CROP_PADDING, IMAGE_SIZE, NETWORKS
from benchmarks.references.labeling_speeds import num_processes
from models.architectures import Normalization, build_classifier
from models.inference import InferenceNetwork, Precision
from models.views import CleanViewConfig
from storage.corpus import Shard, load_corpus, load_locations, read_samples
from storage.store import open_store
from tasks.decode_processes import view_batches_from_processes
from tasks.overlapping import read_ahead
from tasks.shard_items import BadSampleBudget
from tasks.teacher_views import Shown, TeacherViews
from tasks.view_batches import OpenShard

_CUDA = torch.device("cuda")
# What torchvision hands to the decoder at a time; a few sizes were tried and differ little.
_GPU_DECODE_BATCH = 100


def stage_decoding(store_url: str, digest: str, *, batch_size: int, num_shards: int) -> float:
    """Images a second of reading, decoding and resizing as the stage does it beside a GPU."""
    torch.set_num_threads(1)  # as in a label worker, whose cores are for those that decode
    store = open_store(store_url)
    corpus, locations = load_corpus(store, digest), load_locations(store, digest)

    def read(shard: Shard) -> OpenShard:
        samples = read_samples(corpus, locations, shard.stem)
        return OpenShard(shard.digest, samples, BadSampleBudget(shard.stem, 0))

    batches = view_batches_from_processes(
        read_ahead(corpus.shards[: 1 + num_shards], read),
        TeacherViews(CleanViewConfig(), (Shown(IMAGE_SIZE, CROP_PADDING, "bilinear"),)),
        batch_size=batch_size,
        processes=num_processes(),
        is_pinned=True,
    )
    with closing(batches):
        for batch in batches:  # the first shard: processes start meanwhile
            if batch.is_last:
                break
        return _rate(lambda: sum(len(batch.samples) for batch in batches))


def gpu_decoding(paths: Sequence[Path]) -> float:
    """Images a second of torchvision's JPEG decoder on the GPU, resized and cut there too."""
    short = IMAGE_SIZE + CROP_PADDING

    def decode(paths: Sequence[Path]) -> int:
        count = 0
        for path in paths:
            with tarfile.open(path) as tar:
                members = [tar.extractfile(member) for member in tar]
                files = [
                    torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
                    for file in members
                    if file is not None
                ]
            for start in range(0, len(files), _GPU_DECODE_BATCH):
                batch = files[start : start + _GPU_DECODE_BATCH]
                images = decode_jpeg(batch, mode=ImageReadMode.RGB, device="cuda")
                views: list[torch.Tensor] = []
                for image in images:
                    height, width = image.shape[1:]
                    longer = short * max(height, width) // min(height, width)
                    sides = (short, longer) if height <= width else (longer, short)
                    resized = F.interpolate(
                        image[None].float(), sides, mode="bilinear", antialias=True
                    )
                    top, left = (sides[0] - IMAGE_SIZE) // 2, (sides[1] - IMAGE_SIZE) // 2
                    views.append(resized[0, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
                count += len(torch.stack(views).round_().byte())
        torch.cuda.synchronize()
        return count

    decode(paths[:1])
    return _rate(lambda: decode(paths))


def best_forward(
    name: str,
    *,
    precisions: Sequence[Precision] = ("bf16", "fp32"),
    batch_sizes: Sequence[int],
    seconds: float,
) -> tuple[float, str]:
    """Return the best rate of the network alone on a batch in the GPU's memory, and how."""
    rates: dict[str, float] = {}
    for precision in precisions:
        torch.manual_seed(0)
        classifier = build_classifier(NETWORKS[name], len(CLASS_NAMES), Normalization()).to(_CUDA)
        network = InferenceNetwork(classifier, precision)
        for batch_size in batch_sizes:
            shape = (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
            batch = torch.randint(0, 256, shape, dtype=torch.uint8, device=_CUDA)
            batch = batch.contiguous(memory_format=torch.channels_last)
            rates[f"{precision}, batch {batch_size}"] = _forward_rate(network, batch, seconds)
    best = max(rates, key=lambda how: rates[how])
    return rates[best], best


def _forward_rate(network: InferenceNetwork, batch: torch.Tensor, seconds: float) -> float:
    with torch.inference_mode():
        for _ in range(3):
            network(batch)
        torch.cuda.synchronize()
        count, started = 0, time.monotonic()
        while count == 0 or time.monotonic() < started + seconds:
            for _ in range(5):
                network(batch)
            torch.cuda.synchronize()
            count += 5 * len(batch)
    return count / (time.monotonic() - started)


def _rate(work: Callable[[], int]) -> float:
    started = time.monotonic()
    count = work()
    return count / (time.monotonic() - started)
