"""How fast this machine computes with a network: a second of it, on noise."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from models.architectures import ArchitectureConfig, Normalization, build_classifier
from models.inference import InferenceNetwork, Precision
from tasks.devices import DeviceChoice, resolve_device

_BATCH_SIZE = 32
_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Images a second of the arithmetic alone, without decoding and noise.

    Attributes:
        training: forward and backward pass.
        labeling: forward pass of the network as it labels.
    """

    training: float
    labeling: float

    def to_json(self) -> dict[str, float]:
        """Return the documented form."""
        return asdict(self)


def measure_rates(
    architecture: ArchitectureConfig,
    *,
    image_size: int,
    num_classes: int,
    precision: Precision,
    device: DeviceChoice = "auto",
    seconds: float = _SECONDS,
) -> Rates:
    """Compute batches of noise for about a second each way, after one that is not counted.

    The global generators are left as they were. The optimiser's step is not counted: it costs
    little beside a batch of images.
    """
    chosen = resolve_device(device)
    with torch.random.fork_rng(devices=[] if chosen.type == "cpu" else [chosen]):
        network = build_classifier(architecture, num_classes, normalization=Normalization())
        network = network.to(chosen)
        images = torch.rand(_BATCH_SIZE, 3, image_size, image_size, device=chosen)
        labels = torch.arange(_BATCH_SIZE, device=chosen) % num_classes

        def train() -> Tensor:
            with torch.autocast(chosen.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            return loss

        training = _rate(train, chosen, seconds)
        inference = InferenceNetwork(network, precision)
        pixels = (images * 255).to(torch.uint8).to(memory_format=torch.channels_last)

        def label() -> Tensor:
            with torch.inference_mode():
                return inference(pixels)

        return Rates(training, _rate(label, chosen, seconds))


def _rate(compute: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    compute()
    _wait_for(device)
    started, batches = time.perf_counter(), 0
    while batches == 0 or time.perf_counter() - started < seconds:
        compute()
        _wait_for(device)
        batches += 1
    return batches * _BATCH_SIZE / (time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
