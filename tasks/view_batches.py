"""Shards' samples to batches of views that a network takes, with what was found undecodable."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.samples import RawSample, in_shard_key
from tasks.decoding import DecodedBatch, Views, decoded_batches
from tasks.images import BadImage
from tasks.shard_items import BadSampleBudget
from tasks.teacher_views import TeacherViews


@dataclass(frozen=True)
class OpenShard:
    """A shard that was read.

    Attributes:
        digest: sha256 of the shard, which random views and dropout go by.
        samples: in the shard's order.
        budget: of its bad samples; knows its stem.
    """

    digest: str
    samples: Sequence[RawSample]
    budget: BadSampleBudget


@dataclass(frozen=True)
class ViewBatch:
    """The decodable samples among some that lie side by side in a shard.

    Attributes:
        shard: whose.
        number: which batch of its shard.
        is_last: of its shard.
        samples: B that could be decoded.
        views: T * V tensors (B, S, S, 3) uint8; none where B is 0.
        bad: keys of the others, and why they cannot be decoded.
    """

    shard: OpenShard
    number: int
    is_last: bool
    samples: Sequence[RawSample]
    views: Sequence[Tensor]
    bad: Mapping[str, BadImage]

    @classmethod
    def of(
        cls, batch: DecodedBatch[OpenShard], bad: Mapping[int, BadImage], views: Sequence[Tensor]
    ) -> "ViewBatch":
        """Put together a batch, whose own `views` are not looked at.

        Args:
            batch: all its samples.
            bad: those that cannot be decoded, by their place in it.
            views: of the others.
        """
        return cls(
            shard=batch.shard,
            number=batch.number,
            is_last=batch.is_last,
            samples=[sample for i, sample in enumerate(batch.samples) if i not in bad],
            views=views,
            bad={batch.samples[i].key: error for i, error in bad.items()},
        )


def view_batches(
    shards: Iterable[OpenShard],
    views: TeacherViews,
    *,
    batch_size: int,
    threads: int,
    is_beside_gpu: bool = False,
) -> Iterator[ViewBatch]:
    """Decode shards in this process, in order; the arguments are those of `decoded_batches`."""

    def views_of(shard: OpenShard, sample: RawSample, pixels: NDArray[np.uint8]) -> Views:
        key = in_shard_key(sample.key, shard.budget.stem)
        return views.of_image(pixels, shard=shard.digest, key=key)

    for batch in decoded_batches(
        shards, views_of, batch_size=batch_size, threads=threads, is_beside_gpu=is_beside_gpu
    ):
        yield ViewBatch.of(batch, *sorted_out(batch.views))


def sorted_out(
    decoded: Sequence[Views | BadImage],
) -> tuple[dict[int, BadImage], tuple[Tensor, ...]]:
    """Return what could not be decoded, by its place, and the T * V views of the rest, stacked."""
    bad = {i: one for i, one in enumerate(decoded) if isinstance(one, BadImage)}
    good = [one for one in decoded if not isinstance(one, BadImage)]
    # B lists of T * V views -> T * V arrays of B
    return bad, tuple(torch.from_numpy(np.stack(slot)) for slot in zip(*good, strict=True))
