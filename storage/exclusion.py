"""Samples that nothing may read any more, such as those of a takedown request.

A shard of which samples are excluded is another shard, with a digest of its own, made of the same
tar. So the fingerprints of all that is computed from it differ, and no prediction or model that an
excluded sample went into is used again; the other shards' results stay good.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from storage import objects
from storage.addresses import canonical_json, sha256_hex
from storage.corpus import Corpus, Shard, read_samples
from storage.samples import in_shard_key


@dataclass(frozen=True)
class Exclusion:
    """A corpus without some of its samples.

    Attributes:
        corpus: what is left.
        found: the keys that it had and has no more, sorted.
    """

    corpus: Corpus
    found: tuple[str, ...]


def read_keys(url: str) -> frozenset[str]:
    """Read a list of sample keys, one a line; empty lines are passed over.

    Raises: ValueError, naming the line, for one that is no `<shard stem>/<key in the shard>`.
    """
    keys: set[str] = set()
    # Some editors put a byte order mark first, which would hide the first key for good.
    text = objects.read_object(url).decode("utf-8-sig")
    for number, line in enumerate(text.split("\n"), start=1):
        key = line.strip()
        if not key:
            continue
        stem, slash, rest = key.partition("/")
        if not (stem and slash and rest):
            raise ValueError(
                f"{url}, line {number}: {key!r} is no sample key; write <shard stem>/<key in the"
                " shard>, as reports and predictions show it"
            )
        keys.add(key)
    return frozenset(keys)


def exclude(corpus: Corpus, locations: Mapping[str, str], keys: Collection[str]) -> Exclusion:
    """Return a corpus without the samples of these keys; only shards with such are read.

    Keys that the corpus does not have are passed over: one list serves all corpora.

    Raises: EmptyCorpus if nothing is left; as `read_shard`.
    """
    by_stem: defaultdict[str, set[str]] = defaultdict(set)
    for key in keys:
        by_stem[key.partition("/")[0]].add(key)
    shards: list[Shard] = []
    found: list[str] = []
    for shard in corpus.shards:
        if shard.stem not in by_stem:
            shards.append(shard)
            continue
        samples = read_samples(corpus, locations, shard.stem)
        gone = sorted(sample.key for sample in samples if sample.key in by_stem[shard.stem])
        if not gone:
            shards.append(shard)
            continue
        found.extend(gone)
        labels = [s.label for s in samples if s.key not in by_stem[shard.stem]]
        counts = Counter(label for label in labels if label is not None)
        shards.append(_without(shard, gone, counts))
    return Exclusion(Corpus.of(shards, corpus.class_names), tuple(sorted(found)))


def _without(shard: Shard, gone: list[str], counts: Counter[int]) -> Shard:
    excluded = tuple(sorted({*shard.excluded, *(in_shard_key(key, shard.stem) for key in gone)}))
    body = {"kind": "shard", "tar": shard.tar_digest, "excluded": list(excluded)}
    return replace(
        shard,
        digest=sha256_hex(canonical_json(body)),
        num_samples=shard.num_samples - len(gone),
        label_counts=dict(counts) or None,
        excluded=excluded,
        tar=shard.tar_digest,
    )
