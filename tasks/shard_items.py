"""The items of one opened shard that a training reads, and their pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.draws import Draws
from models.noise import RandomResizedConfig, draw_boxes
from models.training import TrainingConfig
from storage.samples import RawSample
from tasks.images import (
    BadImage,
    clean_view,
    decode_pixels,
    largest_reduction,
    random_resized_view,
    upright_size,
)
from tasks.sparse_targets import SparseTargets

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright image, right and bottom exclusive."""


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
    """What items are trained on: labels, or probabilities with weights, or nothing.

    Attributes:
        labels: (n,) int64 class ids; None for pseudo-labelled items.
        probs: n distributions over C classes, those that matter listed; None for labelled items.
        weights: (n,) float32 beside `probs`.
        confidences: (n,) float32 beside `probs`, the labeller's; None where nothing reads it.
    """

    labels: NDArray[np.int64] | None = None
    probs: SparseTargets | None = None
    weights: NDArray[np.float32] | None = None
    confidences: NDArray[np.float32] | None = None

    def take(self, rows: NDArray[np.int64]) -> "Targets":
        """Return the targets of some rows, in their order."""
        return Targets(**{name: _taken(values, rows) for name, values in self._present().items()})

    @property
    def num_bytes(self) -> int:
        """What the arrays hold."""
        return sum(
            values.num_bytes if isinstance(values, SparseTargets) else values.nbytes
            for values in self._present().values()
        )

    def _present(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def in_places(parts: Sequence["Targets"], places: Sequence[NDArray[np.int64]]) -> "Targets":
        """Put targets of one kind together.

        Args:
            parts: at least one.
            places: of the targets of each part in the result; all of them are 0 .. n - 1.
        """
        names = parts[0]._present()
        joined = Targets(**{n: _joined([p._present()[n] for p in parts]) for n in names})
        return joined.take(np.argsort(np.concatenate(places), kind="stable"))


def _taken(values: Any, rows: NDArray[np.int64]) -> Any:
    return values.take(rows) if isinstance(values, SparseTargets) else values[rows]


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], SparseTargets):
        return SparseTargets.joined(parts)
    return np.concatenate(parts)


class HeldBytes(NamedTuple):
    """What an open shard takes: of the process's own memory, and of the node's cache."""

    own: int
    mapped: int


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
    num_bytes: int = 0
    """What the images hold: of the process's memory or, where mapped, of the node's cache."""
    is_mapped: bool = False

    @property
    def held(self) -> HeldBytes:
        """What the images and their targets hold; targets are never mapped."""
        images = HeldBytes(0, self.num_bytes) if self.is_mapped else HeldBytes(self.num_bytes, 0)
        return HeldBytes(images.own + self.targets.num_bytes, images.mapped)

    def in_memory(self) -> "ShardItems":
        """Return the same items with images that keep no file of the cache in use."""
        if not self.is_mapped:
            return self
        samples = [replace(s, image=memoryview(bytes(s.image))) for s in self.samples]
        num_bytes = sum(len(sample.image) for sample in samples)
        return replace(self, samples=samples, num_bytes=num_bytes, is_mapped=False)

    def decode(
        self, item: int, epoch: int, streams: Sequence[int], config: TrainingConfig
    ) -> tuple[int, list[Pixels]]:
        """Return the item that was decodable in the place of `item`, and its (S, S, 3) views.

        Args:
            item: index into this shard's items.
            epoch: in which it is read; moves the random crop.
            streams: of the input noise, one for each view that is cropped differently.
            config: view and crop.
        """
        for step in range(len(self.sample_of)):
            candidate = (item + step) % len(self.sample_of)
            sample = self.samples[int(self.sample_of[candidate])]
            try:
                boxes = None
                if isinstance(config.noise.crop, RandomResizedConfig):
                    boxes = self._boxes(candidate, epoch, streams, config.noise.crop)
                return candidate, views_of(sample, boxes, config)
            except BadImage as error:
                self.budget.spend(sample.key, error)
        raise TooManyBadSamples(f"shard {self.budget.stem}: no image could be decoded")

    def _boxes(
        self, item: int, epoch: int, streams: Sequence[int], crop: RandomResizedConfig
    ) -> list[Box]:
        sample = self.samples[int(self.sample_of[item])]
        width, height = np.array(upright_size(sample.image, where=sample.key))[:, None]
        place = (self.key_hashes[[item]], self.copies[[item]], np.array([epoch]))
        return [draw_crops(crop, stream, *place, width, height)[0] for stream in streams]


def draw_crops(
    crop: RandomResizedConfig,
    stream: int,
    key_hashes: NDArray[np.int64],
    copies: NDArray[np.int64],
    epochs: NDArray[np.int64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
) -> list[Box]:
    """Return the crop of every sample's view, all arguments but the first two (n,)."""
    place = (torch.from_numpy(np.asarray(one)) for one in (key_hashes, copies, epochs))
    sides = (torch.from_numpy(np.asarray(one)) for one in (widths, heights))
    return [
        (left, top, right, bottom)
        for left, top, right, bottom in draw_boxes(crop, Draws(stream, *place), *sides).tolist()
    ]


def views_of(
    sample: RawSample, boxes: Sequence[Box] | None, config: TrainingConfig
) -> list[Pixels]:
    """Return the (S, S, 3) views of a sample: its crops, or its clean view without boxes.

    Raises: BadImage.
    """
    size, interpolation = config.image_size, config.interpolation

    def reduction(width: int, height: int) -> int:
        if boxes is None:
            side = min(width, height) * size / (size + config.crop_padding)
            return largest_reduction(side, side, size)
        return min(largest_reduction(box[2] - box[0], box[3] - box[1], size) for box in boxes)

    is_reduced = config.decode == "reduced"
    image = decode_pixels(
        sample.image, where=sample.key, reduction=reduction if is_reduced else None
    )
    if boxes is None:
        return [clean_view(image, size, config.crop_padding, interpolation)]
    if is_reduced:
        whole = upright_size(sample.image, where=sample.key)
        height, width = image.shape[:2]
        boxes = [scaled_box(box, whole, (width, height)) for box in boxes]
    return [random_resized_view(image, size, box, interpolation) for box in boxes]


def scaled_box(box: Box, whole: tuple[int, int], reduced: tuple[int, int]) -> Box:
    """Return where a box of the whole image lies in the reduced one."""
    across, down = reduced[0] / whole[0], reduced[1] / whole[1]
    left, top, right, bottom = box
    # A product such as 3 * (1 / 3) may end a rounding error outside.
    return (
        left * across,
        top * down,
        min(right * across, reduced[0]),
        min(bottom * down, reduced[1]),
    )


OpenShard = Callable[[int], ShardItems]
"""Opens the shard of an index; called once per shard while it stays in memory."""
