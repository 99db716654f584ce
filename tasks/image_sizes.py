"""How large images are, by a look at some of them: their heads are read, nothing is decoded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

from storage.corpus import Corpus, read_samples
from tasks.images import BadImage, decode_any_image, image_kind, upright_size

MAX_LOOKED_AT = 96
"""Images of a sample; the median of so many lies within ten percentiles of the whole's."""
_MAX_SHARDS = 3

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """What a look at some images showed.

    Attributes:
        looked_at: how many.
        unreadable: how many of these have a head that cannot be read.
        mean_bytes: of a file.
        smallest: of the shorter sides, pixels; 0 if no image could be read.
        median: likewise.
        largest: likewise.
    """

    looked_at: int
    unreadable: int
    mean_bytes: int
    smallest: int
    median: int
    largest: int

    def to_json(self) -> dict[str, Any]:
        """Return the documented form."""
        return asdict(self)


def look_at(files: Iterable[bytes | memoryview]) -> ImageSizes:
    """Read the heads of image files.

    Raises: ValueError if there is no file.
    """
    sides: list[int] = []
    num_bytes = looked_at = 0
    for file in files:
        looked_at += 1
        num_bytes += len(file)
        try:
            sides.append(min(_size(file)))
        except BadImage:
            continue
    if looked_at == 0:
        raise ValueError("no image to look at")
    known = sides or [0]
    return ImageSizes(
        looked_at=looked_at,
        unreadable=looked_at - len(sides),
        mean_bytes=num_bytes // looked_at,
        smallest=min(known),
        median=round(median(known)),
        largest=max(known),
    )


def spread(items: Sequence[_Item], size: int = MAX_LOOKED_AT) -> list[_Item]:
    """Return at most `size` items at even distances, the first and the last among them."""
    if len(items) <= size:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(size - 1, 1))] for i in range(size)]


def files_of(
    corpus: Corpus, locations: Mapping[str, str], *, size: int = MAX_LOOKED_AT
) -> Iterator[memoryview]:
    """Yield about `size` image files of a corpus: of its first shard, its middle one and its last.

    One shard is held in memory at a time.
    """
    filled = [shard for shard in corpus.shards if shard.num_samples]
    chosen = spread(filled, min(_MAX_SHARDS, size))
    for shard in chosen:
        samples = read_samples(corpus, locations, shard.stem)
        for sample in spread(samples, size // len(chosen)):
            yield sample.image


def _size(file: bytes | memoryview) -> tuple[int, int]:
    if image_kind(file) is not None:
        return upright_size(file, where="image")
    return decode_any_image(file, where="image").size  # a format that `data shard` converts
