"""Samples decoded by processes of their own, which feed a GPU.

Threads of one process stand in each other's way (Python's lock): sixteen of them decode half of
what sixteen processes do.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from storage.samples import RawSample, in_shard_key
from tasks.decode_server import CONTEXT, start_decode_server
from tasks.decoding import DecodedBatch, cut_into_batches, decoded_views
from tasks.images import BadImage
from tasks.teacher_views import TeacherViews
from tasks.view_batches import OpenShard, ViewBatch, sorted_out

_CHUNK = 32
"""Samples that a process is sent at a time; batches are put together of them."""
_CHUNKS_AHEAD = 2


class DecodersLost(RuntimeError):
    """A process that decodes was killed, or what it sent could not be received."""


@dataclass(frozen=True)
class _Chunk:
    """Some samples of a batch, with bytes of their own, as they are sent.

    Attributes:
        shard: digest of their shard.
        stem: of their shard.
        start: place of the first one in the batch.
        samples: at most _CHUNK.
        is_last: of the batch.
    """

    shard: str
    stem: str
    start: int
    samples: Sequence[RawSample]
    is_last: bool


class _Decoded(NamedTuple):
    """What comes back: reasons by place in the batch, and T * V tensors of the other samples."""

    bad: dict[int, str]
    views: tuple[Tensor, ...]
    is_last: bool


class _Decoder(Dataset[_Decoded]):
    """Decodes the chunks that a DataLoader's process is sent in the place of indices."""

    def __init__(self, views: TeacherViews) -> None:
        self._views = views

    def __getitem__(self, chunk: _Chunk) -> _Decoded:
        bad, views = sorted_out(
            [
                decoded_views(
                    sample,
                    partial(
                        self._views.of_image,
                        shard=chunk.shard,
                        key=in_shard_key(sample.key, chunk.stem),
                    ),
                )
                for sample in chunk.samples
            ]
        )
        reasons = {chunk.start + i: str(error) for i, error in bad.items()}
        return _Decoded(reasons, views, chunk.is_last)


def view_batches_from_processes(
    shards: Iterable[OpenShard],
    views: TeacherViews,
    *,
    batch_size: int,
    processes: int,
    is_pinned: bool,
) -> Generator[ViewBatch]:
    """Decode shards, in order, to the batches that `view_batches` gives.

    Args:
        shards: read here, one by one, as their samples are sent.
        views: that are cut out of every image.
        batch_size: samples of a batch.
        processes: that decode.
        is_pinned: whether batches come in page-locked memory, which a GPU reads fastest.
    Raises: DecodersLost; what reading a shard raises.
    """
    sent: deque[DecodedBatch[OpenShard]] = deque()

    def chunks() -> Iterator[_Chunk]:
        for batch in cut_into_batches(shards, batch_size):
            sent.append(batch)
            starts = range(0, max(len(batch.samples), 1), _CHUNK)
            for start in starts:
                yield _Chunk(
                    batch.shard.digest,
                    batch.shard.budget.stem,
                    start,
                    [_with_own_bytes(one) for one in batch.samples[start : start + _CHUNK]],
                    is_last=start == starts[-1],
                )

    parts: list[_Decoded] = []
    pool = _pool(views, processes)
    is_done = False
    try:
        for part in _received(pool, chunks()):
            parts.append(part)
            if part.is_last:
                bad = {i: BadImage(why) for one in parts for i, why in one.bad.items()}
                slots = zip(*(one.views for one in parts if one.views), strict=True)
                joined = [_joined(slot, is_pinned=is_pinned) for slot in slots]
                yield ViewBatch.of(sent.popleft(), bad, joined)
                parts = []
        is_done = True
    finally:
        if not is_done:  # what its processes still work on is nobody's
            _pool.cache_clear()


def _received(pool: "_Pool", chunks: Iterator[_Chunk]) -> Iterator[_Decoded]:
    """Yield what comes back; an error in making chunks passes as it is, and others are a loss."""
    own: list[Exception] = []

    def noted() -> Iterator[_Chunk]:
        try:
            yield from chunks
        except Exception as error:
            own.append(error)
            raise

    try:
        yield from pool.decode(noted())
    except (RuntimeError, OSError, EOFError) as error:
        if own:
            raise
        raise DecodersLost(
            f"a process that decodes died or failed: {type(error).__name__}: {error}. If shared"
            " memory is short (df /dev/shm; containers get 64 MiB unless told otherwise), give more"
            " of it; engine.threads sets how many processes there are"
        ) from error


class _Pool:
    """Processes that decode, and live on from one group of shards to the next."""

    def __init__(self, views: TeacherViews, processes: int) -> None:
        start_decode_server()
        self._chunks = _Chunks()
        self._loader: Any = DataLoader(
            _Decoder(views),
            batch_size=None,
            sampler=self._chunks,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType] (a chunk is no list)
            num_workers=processes,
            prefetch_factor=_CHUNKS_AHEAD,
            multiprocessing_context=CONTEXT,
            persistent_workers=True,
        )

    def decode(self, chunks: Iterator[_Chunk]) -> Iterator[_Decoded]:
        """Yield what becomes of the chunks, in order."""
        self._chunks.source = chunks
        return iter(self._loader)


class _Chunks:
    """What a DataLoader takes for the sampler of its indices: other chunks each time."""

    source: Iterator[_Chunk] = iter(())

    def __iter__(self) -> Iterator[_Chunk]:
        return self.source


# One: the next round's teachers may be shown other views.
_pool = lru_cache(maxsize=1)(_Pool)


def _with_own_bytes(sample: RawSample) -> RawSample:
    """Return a sample that can be sent, without the shard that its image is a view into."""
    return replace(sample, image=bytes(sample.image))  # pyright: ignore[reportArgumentType]


def _joined(parts: Sequence[Tensor], *, is_pinned: bool) -> Tensor:
    """Put (b, S, S, 3) tensors behind each other."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(list(parts), out=torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned))


def _as_it_is(decoded: _Decoded) -> _Decoded:
    return decoded
