"""From how many passes over a selection on do compact shards pay, by the share that is selected?

Images are random bytes of 110 kB, 200 a shard, on the local disk, and nothing is decoded: what
differs is reading, checking and copying.
"""

import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from benchmarks.figures import benchmark_parser, figure, print_figures
from storage.corpus import Corpus, Locations, read_samples
from storage.indexing import corpus_from_index, index_shards
from storage.manifest import put_object, read_stored
from storage.patterns import expand_shards
from storage.samples import iterate_samples
from storage.store import Store, open_store
from tasks.materializing import FEWEST_EPOCHS, LARGEST_SHARE, compact_shard

_IMAGE_BYTES, _IMAGES = 110_000, 200
_SHARES = (0.05, LARGEST_SHARE, 0.5)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="4 shards in the place of 16")
    options = parser.parse_args()
    num_shards = 4 if options.quick else 16
    figures = []
    with tempfile.TemporaryDirectory(prefix="selftrain-materializing-") as name:
        folder = Path(name)
        _write_shards(folder / "shards", num_shards)
        corpus, locations = corpus_from_index(index_shards(expand_shards(str(folder / "shards"))))
        for share in _SHARES:
            store = open_store(str(folder / f"store-{share}"))
            whole, write, compact = _seconds(store, corpus, locations, share)
            figures.append(
                figure(
                    f"materialize_pays_from_pass_{share:g}",
                    (whole + write) / (whole - compact),
                    "passes",
                    goal=FEWEST_EPOCHS if share <= LARGEST_SHARE else 100.0,
                    direction="at_most",
                    against=f"a shard read whole in {1e3 * whole / num_shards:.1f} ms, its compact "
                    f"one in {1e3 * compact / num_shards:.1f}, written in "
                    f"{1e3 * write / num_shards:.1f}",
                    quick=options.quick,
                    seeds=[0],
                )
            )
    print_figures(figures, as_json=options.json)


def _seconds(
    store: Store, corpus: Corpus, locations: Locations, share: float
) -> tuple[float, float, float]:
    """Return the time to read all shards whole, to write compact ones, and to read these."""
    kept = max(1, int(share * _IMAGES))
    stems = [shard.stem for shard in corpus.shards]

    def read_whole() -> None:
        for stem in stems:
            samples = read_samples(corpus, locations, stem)[:: _IMAGES // kept][:kept]
            assert len([bytes(sample.image) for sample in samples]) == kept

    tars = {
        stem: compact_shard(read_samples(corpus, locations, stem)[:kept], stem) for stem in stems
    }

    def write() -> list[tuple[str, object]]:
        return [(stem, put_object(store, "compact", stem, tars[stem], "tar")) for stem in stems]

    stored = {stem: put_object(store, "compact", stem, tars[stem], "tar") for stem in stems}

    def read_compact() -> None:
        for stem in stems:
            iterate_samples(read_stored(store, stored[stem]), stem=stem, num_samples=kept)

    return _fastest(read_whole), _fastest(write), _fastest(read_compact)


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _write_shards(folder: Path, num_shards: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(num_shards):
        with tarfile.open(folder / f"s-{number:03d}.tar", "w") as tar:
            for i in range(_IMAGES):
                info = tarfile.TarInfo(f"{i:06d}.jpg")
                info.size = _IMAGE_BYTES
                tar.addfile(info, BytesIO(random.bytes(_IMAGE_BYTES)))


if __name__ == "__main__":
    main()
