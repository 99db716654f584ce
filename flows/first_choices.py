"""What to train on a user's data, how long, and behind which cache: rules for a first try."""

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from flows.first_look import FirstLook
from flows.machine import Machine
from models.architectures import ArchitectureConfig
from tasks.rates import Rates, measure_rates
from tasks.report_formats import duration, size

UNLABELED_RATIO = 3
ROUNDS = 3
_MEMORY_BYTES = 4 * 2**30  # of streams that stay decoded, tasks/cached_samples.py


@dataclass(frozen=True)
class Network:
    """What is trained, before it is known how long.

    Attributes:
        architecture: config of the network.
        image_size: side of its input, pixels.
        precision: fp32 or bf16.
        why: reasons of the three, in this order.
    """

    architecture: dict[str, Any]
    image_size: int
    precision: str
    why: tuple[str, str, str]

    def rates(self, num_classes: int) -> Rates:
        """Measure for two seconds how fast this machine computes with it."""
        return measure_rates(
            TypeAdapter(ArchitectureConfig).validate_python(self.architecture),
            image_size=self.image_size,
            num_classes=num_classes,
            precision="bf16" if self.precision == "bf16" else "fp32",
        )


def choose_network(look: FirstLook, machine: Machine) -> Network:
    """Choose architecture, image size and precision by the images and the device."""
    median = look.sizes.median
    seen = f"the median shorter side of {look.sizes.looked_at} images is {median} pixels"
    small = max(16, min(64, round(median / 8) * 8))
    if machine.gpus == 0:
        size = small
        architecture: dict[str, Any] = {"kind": "small_cnn", "width": 32, "depth": 1}
        why = (
            "the network that learns in minutes on a CPU, made for sides up to 64 pixels. With a"
            " GPU: {kind: resnet, name: resnet50}"
        )
    elif median <= 64:
        size = small
        architecture = {"kind": "wide_resnet", "depth": 28, "width": 2}
        why = "the usual network for sides up to 64 pixels; a GPU computes it in minutes"
    else:
        size = 224 if median >= 192 else 128
        name = "resnet50" if size == 224 else "resnet18"
        architecture = {"kind": "resnet", "name": name}
        why = (
            "a standard network for photographs. The student may be larger: a size up about doubles"
            " the cost of a step"
        )
    if size > 64:
        rule = "the usual size for photographs"
    elif median > 64:
        rule = "a CPU pays for each pixel, so 64 at most"
    elif size >= median + 8:
        rule = f"{size} is the least that the poolings of a network leave something of"
    else:
        rule = "more would only enlarge them"
    size_why = f"{seen}; {rule}. Twice the side costs four times."
    precision = "bf16" if machine.has_bf16 else "fp32"
    precision_why = (
        "this machine has instructions for bf16: less time a step, weights stay fp32"
        if machine.has_bf16
        else "this CPU has no instructions for bf16 and would emulate them many times more slowly"
    )
    return Network(architecture, size, precision, (why, size_why, precision_why))


def choose_cache(
    look: FirstLook, free: int | None, cache_dir: str
) -> tuple[dict[str, Any] | None, str]:
    """Return the cache of shards that pays: of remote ones that fit no memory but the disk."""
    read = [look.corpora[split] for split in ("labeled", "unlabeled")]
    wanted = sum(corpus.num_bytes for corpus in read)
    is_remote = any(
        "://" in look.patterns[split] or "://" in look.root for split in ("labeled", "unlabeled")
    )
    if not is_remote:
        return None, "Shards lie on a disk of this machine."
    if wanted <= _MEMORY_BYTES:
        return None, f"Shards are remote, but their {bytes_in_words(wanted)} stay in memory."
    room = 0 if free is None else int(0.8 * free)
    if room < wanted:
        return None, (
            f"Trainings read {bytes_in_words(wanted)} from afar in every pass, and {cache_dir} has"
            f" {bytes_in_words(free or 0)} free: name a larger disk in {{dir, max_bytes}}"
        )
    return (
        {"dir": cache_dir, "max_bytes": wanted + wanted // 10},
        f"Trainings read {bytes_in_words(wanted)} of remote shards once instead of in every pass.",
    )


def choose_batch_size(labels: int, network: Network, machine: Machine) -> int:
    """Return a power of two that the labels fill, as a multiple of the GPUs, two for each."""
    most = 64 if machine.gpus == 0 or network.image_size > 128 else 256
    batch = 1 << (max(2, min(most, labels)).bit_length() - 1)
    parts = max(1, machine.gpus)
    # BatchNorm needs two images of each part.
    return max(2 * parts, -(-batch // parts) * parts)


def choose_steps(labels: int, corpus: int, batch: int, machine: Machine) -> dict[str, int]:
    """Return the steps of teacher and student: bounded, else so many passes over what they read.

    30 over the labels for the teacher, two over the corpus for a student.
    """
    least, most = (300, 2_000) if machine.gpus == 0 else (1_000, 50_000)
    teacher = min(most, max(least, 30 * labels // batch))
    student = min(most, max(teacher, 2 * corpus // (batch * UNLABELED_RATIO)))
    return {"teacher": teacher, "student": student}


def choose_ema_decay(steps: int) -> float:
    """Return a decay whose average remembers about the last tenth of a training."""
    return round(1 - 10 / steps, 4)


def choose_crop(size: int) -> dict[str, Any]:
    """Return the crop that goes with a size: shifts of small images, boxes of large ones."""
    if size <= 64:
        return {"kind": "pad_shift", "pixels": size // 8}
    return {"kind": "random_resized", "scale": [0.25, 1.0]}


def bytes_in_words(num_bytes: int) -> str:
    """Return a number of bytes with a unit, in ASCII."""
    return _ascii(size(num_bytes))


def time_in_words(seconds: float) -> str:
    """Return a time as people say it, in ASCII."""
    return _ascii(duration(seconds))


def _ascii(text: str) -> str:
    return text.replace("\N{NARROW NO-BREAK SPACE}", " ")
