"""Batches as most training scripts make them: torchvision's transforms, one image at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.references.bare_loop import HandBatch, MemoryData
from models.noise import NoiseConfig, PadShiftConfig
from models.training import TrainingConfig


def batches_of_loaders(
    data: MemoryData, config: TrainingConfig, *, num_workers: int
) -> Iterator[HandBatch]:
    """Pair the batches of a loader of labelled and one of pseudo-labelled images, for ever."""
    num_pseudo = config.batch_size * config.unlabeled_ratio
    transform = _transform(config.noise, config.image_size)
    labeled = _endless(_Images(data.images, data.labels, transform), config.batch_size, num_workers)
    pseudo = _endless(
        _Images(data.pseudo_images, data.pseudo_targets, transform), num_pseudo, num_workers
    )
    for (images, labels), (pseudo_images, targets) in zip(labeled, pseudo, strict=False):
        yield HandBatch(torch.cat([images, pseudo_images]), labels, targets)


class _Images(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self._images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self._targets = targets
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(Image.fromarray(self._images[index])), self._targets[index]


def _endless(images: _Images, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        images,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    while True:
        yield from loader


def _transform(noise: NoiseConfig, size: int) -> Callable[[Any], Tensor]:
    """The same techniques with torchvision's own settings of them."""
    assert isinstance(noise.crop, PadShiftConfig)
    assert noise.randaugment is not None
    assert noise.cutout is not None
    share = noise.cutout.fraction**2
    made: Any = transforms.Compose(
        [
            transforms.RandomCrop(size, padding=noise.crop.pixels, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(noise.randaugment.num_ops, int(noise.randaugment.magnitude)),
            transforms.ToTensor(),
            transforms.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0.5),  # type: ignore[arg-type]
        ]
    )
    return made
