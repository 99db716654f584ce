"""Shards' samples to views, batch by batch, decoded ahead in threads across shards."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from storage.samples import RawSample
from tasks.images import BadImage, decode_pixels

Views = list[NDArray[np.uint8]]
"""The views of one image, each (S, S, 3)."""

_BATCHES_AHEAD = 2


class HasSamples(Protocol):
    """A shard that was read."""

    @property
    def samples(self) -> Sequence[RawSample]:
        """In the shard's order."""
        ...


S = TypeVar("S", bound=HasSamples)


@dataclass(frozen=True)
class DecodedBatch(Generic[S]):
    """Samples that lie side by side in a shard, decoded.

    Attributes:
        shard: whose.
        number: which batch of its shard.
        is_last: of its shard.
        samples: B of them.
        views: of each sample, or why it cannot be decoded.
    """

    shard: S
    number: int
    is_last: bool
    samples: Sequence[RawSample]
    views: list[Views | BadImage]


def decode_threads(device: torch.device) -> int:
    """Return in how many threads to decode beside the forward pass; 0: in turn with it.

    As many as torch has for itself. A CPU process with one thread has one core, on which threads
    would only get in each other's way. Beside a GPU they are all that torch's threads are for.
    """
    threads = torch.get_num_threads()
    return 0 if device.type == "cpu" and threads == 1 else threads


def decoded_batches(
    shards: Iterable[S],
    views_of: Callable[[S, RawSample, NDArray[np.uint8]], Views],
    *,
    batch_size: int,
    threads: int,
    is_beside_gpu: bool = False,
) -> Generator[DecodedBatch[S]]:
    """Yield the batches of all shards in order; an empty shard has one empty batch.

    Batches are cut by position in the shard and never cross shards. Two of them, of this shard or
    the next, are decoded ahead.

    Args:
        shards: taken one by one, when the first batch of it is to be decoded.
        views_of: the views of a shard's sample, from its (H, W, 3) pixels.
        batch_size: samples of a batch.
        threads: that decode; 0: the calling one does, nothing is decoded ahead.
        is_beside_gpu: the CPU only decodes, so that each of these threads takes one core, and not
            as many as torch has for itself.
    """

    def decode(shard: S, sample: RawSample) -> Views | BadImage:
        return decoded_views(sample, partial(views_of, shard, sample))

    if threads == 0:
        for batch in cut_into_batches(shards, batch_size):
            batch.views.extend(decode(batch.shard, sample) for sample in batch.samples)
            yield batch
        return
    torch_threads = torch.get_num_threads()
    with ThreadPoolExecutor(
        threads,
        thread_name_prefix="decode",
        initializer=partial(torch.set_num_threads, 1) if is_beside_gpu else None,
    ) as pool:
        ahead: deque[tuple[DecodedBatch[S], list[Future[Views | BadImage]]]] = deque()
        try:
            for batch in cut_into_batches(shards, batch_size):
                decode_one = partial(decode, batch.shard)
                ahead.append((batch, [pool.submit(decode_one, s) for s in batch.samples]))
                if len(ahead) > _BATCHES_AHEAD:
                    yield _finished(*ahead.popleft())
            while ahead:
                yield _finished(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if is_beside_gpu:  # the number holds for threads that start later, too
                torch.set_num_threads(torch_threads)


def decoded_views(
    sample: RawSample, views_of: Callable[[NDArray[np.uint8]], Views]
) -> Views | BadImage:
    """Decode one sample to its views, or say why that cannot be done."""
    try:
        pixels = decode_pixels(sample.image, where=sample.key)
    except BadImage as error:
        return error
    # What is cut out of larger arrays is copied here, so that they can go.
    return [np.ascontiguousarray(view) for view in views_of(pixels)]


def _finished(batch: DecodedBatch[S], futures: list[Future[Views | BadImage]]) -> DecodedBatch[S]:
    batch.views.extend(future.result() for future in futures)
    return batch


def cut_into_batches(shards: Iterable[S], batch_size: int) -> Iterator[DecodedBatch[S]]:
    """Yield the batches of all shards in order, none of them decoded."""
    for shard in shards:
        starts = range(0, max(len(shard.samples), 1), batch_size)
        for number, start in enumerate(starts):
            samples = shard.samples[start : start + batch_size]
            yield DecodedBatch(shard, number, number == len(starts) - 1, samples, [])
