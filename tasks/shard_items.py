"""The items of one opened shard that a training reads, and their pixels."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from models.noise import RandomResizedConfig, draw_boxes
from models.randomness import Draws
from models.training import TrainingConfig
from storage.samples import RawSample
from tasks.images import BadImage, clean_view, decode_image, random_resized_view

Pixels = NDArray[np.uint8]


class TooManyBadSamples(ValueError):
    """A shard holds more undecodable images than the run allows."""


class BadSampleBudget:
    """Counts the undecodable images of one shard and refuses too many."""

    def __init__(self, stem: str, limit: int) -> None:
        self.stem = stem
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def spend(self, key: str, error: BadImage) -> None:
        """Count one image; raises TooManyBadSamples, naming shard and key, above the limit."""
        self.reasons[key] = str(error)
        if len(self.reasons) > self.limit:
            raise TooManyBadSamples(
                f"shard {self.stem}: {len(self.reasons)} undecodable images (limit"
                f" max_bad_samples={self.limit}); {error}. Repair the shard, or raise"
                " max_bad_samples to skip such images"
            )


@dataclass(frozen=True)
class Targets:
    """What the items of a shard are trained on: labels, or probabilities with weights.

    Attributes:
        labels: (n,) int64 class ids; None for pseudo-labelled items.
        probs: (n, C) float32, rows sum to 1, one-hot where hard; None for labelled items.
        weights: (n,) float32 beside `probs`.
    """

    labels: NDArray[np.int64] | None = None
    probs: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None


@dataclass
class ShardItems:
    """Item i is sample `sample_of[i]` seen as its copy `copies[i]`.

    The number of items is known before any image is decoded. An undecodable image is therefore
    replaced, with its target, by the shard's next item, and counted.
    """

    samples: list[RawSample]
    sample_of: NDArray[np.int64]
    copies: NDArray[np.int64]
    key_hashes: NDArray[np.int64]
    targets: Targets
    budget: BadSampleBudget
    _clean_views: dict[int, Pixels] = field(default_factory=dict)

    def fetch(
        self,
        items: NDArray[np.int64],
        epochs: NDArray[np.int64],
        stream: int,
        config: TrainingConfig,
        decoders: Executor,
    ) -> tuple[NDArray[np.int64], list[Pixels]]:
        """Return the items that were decodable in the place of `items`, and their (S, S, 3) views.

        Args:
            items: (n,) indices into this shard's items.
            epochs: (n,) the epoch in which each is read; moves the random crop.
            stream: of the stage's input noise.
            config: view and crop.
            decoders: threads that decode.
        """

        def fetch_one(item: int, epoch: int) -> tuple[int, Pixels]:
            for step in range(len(self.sample_of)):
                candidate = (item + step) % len(self.sample_of)
                try:
                    return candidate, self._view(candidate, epoch, stream, config)
                except BadImage as error:
                    self.budget.spend(self.samples[int(self.sample_of[candidate])].key, error)
            raise TooManyBadSamples(f"shard {self.budget.stem}: no image could be decoded")

        found = list(decoders.map(fetch_one, items.tolist(), epochs.tolist()))
        return np.array([item for item, _ in found], dtype=np.int64), [view for _, view in found]

    def _view(self, item: int, epoch: int, stream: int, config: TrainingConfig) -> Pixels:
        index = int(self.sample_of[item])
        sample = self.samples[index]
        crop = config.noise.crop
        if not isinstance(crop, RandomResizedConfig):
            if index not in self._clean_views:
                image = decode_image(sample.image, where=sample.key)
                self._clean_views[index] = clean_view(
                    image, config.image_size, config.crop_padding, config.interpolation
                )
            return self._clean_views[index]
        image = decode_image(sample.image, where=sample.key)
        draws = Draws(
            stream,
            torch.tensor([int(self.key_hashes[item])]),
            torch.tensor([int(self.copies[item])]),
            torch.tensor([epoch]),
        )
        size = torch.tensor([image.width]), torch.tensor([image.height])
        left, top, right, bottom = draw_boxes(crop, draws, *size)[0].tolist()
        return random_resized_view(
            image, config.image_size, (left, top, right, bottom), config.interpolation
        )


OpenShard = Callable[[int], ShardItems]
"""Opens the shard of an index; called once per shard while it stays in memory."""
