"""How many bytes of shards a run's trainings read, with and without a cache on the node."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.objectives import build_objective
from models.training import TrainingConfig
from storage.corpus import Corpus
from tasks.batches import CACHE_BYTES
from tasks.stream_sources import BYTES_PER_LABEL, stays_decoded


@dataclass(frozen=True)
class StreamReads:
    """What one training reads of one corpus.

    Attributes:
        corpus: whose shards are read whole.
        passes: over the corpus; at most 1 where its images stay in memory.
    """

    corpus: Corpus
    passes: float


@dataclass(frozen=True)
class SelectedItems:
    """What a selection gives an epoch: items, copies counted, and the bytes of their targets."""

    num_items: int
    target_bytes: int


@dataclass(frozen=True)
class ReadBytes:
    """Bytes that a stage fetches from where the shards lie, without and with the cache."""

    uncached: int
    cached: int


def read_once(num_bytes: int) -> ReadBytes:
    """Return the cost of a labelling or an evaluation, which read once and past the cache."""
    return ReadBytes(num_bytes, num_bytes)


@dataclass
class ReadingCosts:
    """Adds up the trainings of a run in their order: what one has cached, the next one finds.

    Attributes:
        max_bytes: of the cache; None: it holds everything.
    """

    max_bytes: int | None
    _there: dict[str, int] = field(default_factory=dict)

    def of_training(self, reads: Sequence[StreamReads]) -> ReadBytes:
        """Return the cost of one training and remember what it leaves in the cache.

        A cache that cannot hold all that a training reads is counted as none: its shards are read
        in turn, and each is gone before its turn comes again.
        """
        uncached = round(sum(read.corpus.num_bytes * read.passes for read in reads))
        sizes = {
            shard.tar_digest: shard.num_bytes for read in reads for shard in read.corpus.shards
        }
        if not self._holds(sizes):
            return ReadBytes(uncached, uncached)
        new = 0.0
        for read in reads:
            missing = [shard for shard in read.corpus.shards if shard.tar_digest not in self._there]
            new += sum(shard.num_bytes for shard in missing) * min(1.0, read.passes)
        both = self._there | sizes
        self._there = both if self._holds(both) else sizes
        return ReadBytes(uncached, round(new))

    def _holds(self, sizes: dict[str, int]) -> bool:
        return self.max_bytes is None or sum(sizes.values()) <= self.max_bytes


def stream_reads(
    config: TrainingConfig,
    *,
    steps: int,
    labeled: Corpus,
    unlabeled: Corpus | None,
    selected: SelectedItems | None,
) -> list[StreamReads]:
    """Return what a training of so many steps reads of each corpus.

    Args:
        config: its objective declares the streams.
        steps: still to do.
        labeled: the labelled corpus.
        unlabeled: the unlabelled one, where it is read.
        selected: pseudo-labelled items of an epoch; None: not known yet, and taken to be every
            image once, with targets of no size.
    """
    found: list[StreamReads] = []
    for stream in build_objective(config.objective).streams(config):
        corpus, num_items = labeled, labeled.num_samples
        target_bytes = BYTES_PER_LABEL * num_items
        if stream.role != "labeled":
            assert unlabeled is not None, "an objective that reads it is given it"
            corpus, num_items, target_bytes = unlabeled, unlabeled.num_samples, 0
            if stream.with_selection and selected is not None:
                num_items, target_bytes = selected.num_items, selected.target_bytes
        passes = steps * stream.samples_per_step / num_items
        if stays_decoded(
            config,
            num_items,
            shard_bytes=corpus.num_bytes,
            target_bytes=target_bytes,
            decoded_bytes=CACHE_BYTES,
        ):
            passes = min(1.0, passes)
        found.append(StreamReads(corpus, passes))
    return found
