"""The training loop one would write by hand: tensors in memory, the same network and noise.

It has no checkpoints, no checks, no logs, no resume and no schedule.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.architectures import build_classifier
from models.draws import input_draws
from models.noise import apply_input_noise
from models.optimization import SGDConfig
from models.training import TrainingConfig

NoisedImages = Tensor
"""(B, 3, H, W) float32 in [0, 1]."""


@dataclass(frozen=True)
class HandBatch:
    """Labelled images first, then pseudo-labelled ones."""

    images: NoisedImages
    labels: Tensor
    pseudo_targets: Tensor


@dataclass(frozen=True)
class MemoryData:
    """Decoded images of one size.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        pseudo_images: (M, 3, H, W) uint8.
        pseudo_targets: (M, C) float32.
    """

    images: Tensor
    labels: Tensor
    pseudo_images: Tensor
    pseudo_targets: Tensor

    @classmethod
    def random(cls, num_labeled: int, num_pseudo: int, *, size: int, classes: int) -> "MemoryData":
        """Make noise of that many images."""
        made = torch.Generator().manual_seed(0)
        return cls(
            torch.randint(0, 256, (num_labeled, 3, size, size), generator=made, dtype=torch.uint8),
            torch.randint(0, classes, (num_labeled,), generator=made),
            torch.randint(0, 256, (num_pseudo, 3, size, size), generator=made, dtype=torch.uint8),
            torch.rand((num_pseudo, classes), generator=made).softmax(dim=1),
        )


def batches_in_memory(data: MemoryData, config: TrainingConfig) -> Iterator[HandBatch]:
    """Gather random rows and apply the config's input noise to the whole batch, for ever."""
    num_pseudo = config.batch_size * config.unlabeled_ratio
    labeled, pseudo = _indices(len(data.images)), _indices(len(data.pseudo_images))
    step = 0
    while True:
        rows, pseudo_rows = labeled(config.batch_size), pseudo(num_pseudo)
        keys = torch.cat([rows, pseudo_rows + len(data.images)])
        draws = input_draws(0, keys, torch.zeros_like(keys), torch.full_like(keys, step))
        images = torch.cat([data.images[rows], data.pseudo_images[pseudo_rows]])
        noised = apply_input_noise(images, config.noise, draws)
        yield HandBatch(noised, data.labels[rows], data.pseudo_targets[pseudo_rows])
        step += 1


def bare_loop(
    config: TrainingConfig, num_classes: int, batches: Iterator[HandBatch]
) -> Iterator[None]:
    """Train by SGD with Nesterov momentum and a moving average, yielding after each step."""
    optimizer_config = config.optimizer
    assert isinstance(optimizer_config, SGDConfig)
    assert config.ema is not None
    torch.manual_seed(0)
    model = build_classifier(
        config.architecture,
        num_classes,
        config.normalization,
        dropout=config.noise.dropout,
        stochastic_depth=config.noise.stochastic_depth,
    )
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=optimizer_config.lr,
        momentum=optimizer_config.momentum,
        nesterov=optimizer_config.nesterov,
        weight_decay=optimizer_config.weight_decay,
    )
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    pairs = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    model.train()
    for batch in batches:
        logits = model(batch.images)
        num_labeled = len(batch.labels)
        labeled = F.cross_entropy(logits[:num_labeled], batch.labels, reduction="sum")
        pseudo = F.cross_entropy(logits[num_labeled:], batch.pseudo_targets, reduction="sum")
        optimizer.zero_grad()
        ((labeled + pseudo) / num_labeled).backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, 1 - config.ema.decay)  # pyright: ignore[reportPrivateImportUsage]
        yield


def _indices(count: int) -> Callable[[int], Tensor]:
    """Return a function that gives the next rows of endless random epochs."""
    order = torch.randperm(count)

    def take(number: int) -> Tensor:
        nonlocal order
        while len(order) < number:
            order = torch.cat([order, torch.randperm(count)])
        taken, order = order[:number], order[number:]
        return taken

    return take
