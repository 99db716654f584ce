"""A corpus: the shards, by content, that a stage reads, and where they lie today."""

import functools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from storage import objects
from storage.addresses import canonical_json, corpus_path, sha256_hex
from storage.manifest import check_schema, create_record, read_record, sealed
from storage.objects import CorruptObject
from storage.samples import CorruptShard, RawSample, iterate_samples, sample_key
from storage.shard_cache import ShardCache
from storage.store import Store

SCHEMA = 1

Locations = dict[str, str]
"""Shard stem -> URL; changes when shards move, and is in no digest."""

_STEM_RULE = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")
_DIGEST_RULE = re.compile(r"[0-9a-f]{64}")


class MissingShard(FileNotFoundError):
    """A shard of the corpus that is not where its location says."""


class EmptyCorpus(ValueError):
    """A corpus without a shard or without a sample."""


class CorpusMismatch(ValueError):
    """A stored corpus of the same digest that says something else."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard by content.

    Attributes:
        stem: the file's name without folder and `.tar`; first part of each sample key.
        digest: sha256 of the whole tar; where samples are excluded, of the tar's and their keys.
        num_samples: at least 0; excluded ones do not count.
        num_bytes: size of the tar.
        label_counts: class number -> samples with that `.cls`; None if no sample has one.
        excluded: keys in the shard of the samples that are never read, sorted.
        tar: sha256 of the tar where samples are excluded; else None.
    """

    stem: str
    digest: str
    num_samples: int
    num_bytes: int
    label_counts: Mapping[int, int] | None = field(default=None, hash=False)
    excluded: tuple[str, ...] = ()
    tar: str | None = None

    def __post_init__(self) -> None:
        if not _STEM_RULE.fullmatch(self.stem) or not _DIGEST_RULE.fullmatch(self.digest):
            raise ValueError(
                f"shard {self.stem!r} with digest {self.digest!r}: a stem has 1 to 200 characters, "
                "no slash and no control character; a digest is 64 hexadecimal digits"
            )
        if min(self.num_samples, self.num_bytes, 0) < 0:
            raise ValueError(f"shard {self.stem}: samples and bytes must be at least 0")

    @property
    def tar_digest(self) -> str:
        """sha256 of the whole tar."""
        return self.digest if self.tar is None else self.tar

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        counts = self.label_counts
        exclusion: dict[str, Any] = {}
        if self.excluded:
            exclusion = {"excluded": list(self.excluded), "tar": self.tar}
        return exclusion | {
            "stem": self.stem,
            "digest": self.digest,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "label_counts": None if counts is None else {str(k): counts[k] for k in sorted(counts)},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Shard":
        """Read the stored form."""
        counts = cast("dict[str, int] | None", stored["label_counts"])
        return cls(
            stem=stored["stem"],
            digest=stored["digest"],
            num_samples=stored["num_samples"],
            num_bytes=stored["num_bytes"],
            label_counts=None if counts is None else {int(k): n for k, n in counts.items()},
            excluded=tuple(cast("list[str]", stored.get("excluded", []))),
            tar=stored.get("tar"),
        )


def corpus_digest(shards: Sequence[Shard]) -> str:
    """Return the identity of a corpus: sha256 over sorted (stem, digest, samples), no URL."""
    facts = sorted([s.stem, s.digest, s.num_samples] for s in shards)
    return sha256_hex(canonical_json({"kind": "corpus", "schema": SCHEMA, "shards": facts}))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Shards sorted by stem, with the names of the classes where they are known.

    Make one with `Corpus.of`, which sorts and checks.
    """

    digest: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, shards: Sequence[Shard], class_names: Sequence[str] | None = None) -> "Corpus":
        """Make a corpus of shards in any order.

        Raises: EmptyCorpus without a sample; ValueError for two shards of one stem or digest, for
            repeated class names and for a label that has no name.
        """
        ordered = tuple(sorted(shards, key=lambda s: s.stem))
        if sum(s.num_samples for s in ordered) == 0:
            raise EmptyCorpus(
                f"the corpus has {len(ordered)} shards and no sample; check the shard pattern"
            )
        for what, values in (
            ("stem", [s.stem for s in ordered]),
            ("digest", [s.digest for s in ordered]),
        ):
            value, times = Counter(values).most_common(1)[0]
            if times > 1:
                raise ValueError(f"{times} shards have the {what} {value!r}; each needs its own")
        names = None if class_names is None else tuple(class_names)
        corpus = cls(corpus_digest(ordered), ordered, names)
        if names is not None:
            _check_names(names, corpus.label_counts())
        return corpus

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(s.num_samples for s in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(s.num_bytes for s in self.shards)

    @property
    def is_labeled(self) -> bool:
        """Every sample has a `.cls`."""
        return sum(self.label_counts().values()) == self.num_samples

    def label_counts(self) -> dict[int, int]:
        """Class number -> samples, over all shards, sorted; empty without any label."""
        total: Counter[int] = Counter()
        for shard in self.shards:
            total.update(shard.label_counts or {})
        return dict(sorted(total.items()))

    def shard(self, stem: str) -> Shard:
        """Return the shard of that stem.

        Raises: ValueError if there is none.
        """
        place = bisect_left(self.shards, stem, key=lambda s: s.stem)
        found = self.shards[place] if place < len(self.shards) else None
        if found is None or found.stem != stem:
            raise ValueError(
                f"corpus {self.digest[:12]} has no shard {stem!r}; it has {len(self.shards)}, from "
                f"{self.shards[0].stem!r} to {self.shards[-1].stem!r}"
            )
        return found


def _check_names(names: tuple[str, ...], counts: Mapping[int, int]) -> None:
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"class names must be unique and not empty, not {list(names)}")
    largest = max(counts, default=-1)
    if largest >= len(names):
        raise ValueError(
            f"class number {largest} has no name: there are {len(names)} class names. Correct "
            "classes.json beside the shards"
        )


def save_corpus(store: Store, corpus: Corpus, locations: Mapping[str, str]) -> None:
    """Store the corpus once and, at will again, where its shards lie today.

    Raises: CorpusMismatch if the store holds these shards with other class names; ValueError if
        the locations are not those of the corpus's shards.
    """
    stems = {s.stem for s in corpus.shards}
    if stems != set(locations):
        raise ValueError(
            f"locations must name each shard once; missing {sorted(stems - set(locations))[:3]}, "
            f"unknown {sorted(set(locations) - stems)[:3]}"
        )
    path = corpus_path(corpus.digest)
    body = {
        "schema": SCHEMA,
        "digest": corpus.digest,
        "shards": [s.to_json() for s in corpus.shards],
        "class_names": None if corpus.class_names is None else list(corpus.class_names),
    }
    where = store.url_of(path)
    there = _corpus_of(create_record(store, path, body), corpus.digest, where)
    if there.class_names != corpus.class_names:
        raise CorpusMismatch(
            f"{where} already describes these shards with class names "
            f"{_shown(there.class_names)}, not {_shown(corpus.class_names)}. Give the names that "
            "are stored (classes.json beside the shards), or use another store"
        )
    body = {"schema": SCHEMA, "digest": corpus.digest, "locations": dict(locations)}
    store.replace(_locations_path(corpus.digest), sealed(body))


def _shown(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "unknown"
    return str(list(names) if len(names) <= 12 else [*names[:12], f"... ({len(names)} in all)"])


def load_corpus(store: Store, digest: str) -> Corpus:
    """Read a stored corpus and check it against its digest.

    Raises: FileNotFoundError, with remedy, if the store does not know it.
    """
    path = corpus_path(digest)
    return _corpus_of(_known(store, path, digest), digest, store.url_of(path))


@functools.lru_cache(maxsize=1)
def cached_corpus(store: Store, digest: str) -> Corpus:
    """Return what `load_corpus` does, read once a process.

    For what is done to every group of shards: there are as many groups as the corpus is long, and
    so is reading it.
    """
    return load_corpus(store, digest)


def load_locations(store: Store, digest: str) -> Locations:
    """Read where the shards of a stored corpus lie today (as last saved).

    Raises: FileNotFoundError, with remedy, if the store does not know it.
    """
    path = _locations_path(digest)
    body = _checked_body(_known(store, path, digest), digest, store.url_of(path))
    return dict(cast("dict[str, str]", body["locations"]))


def _known(store: Store, path: str, digest: str) -> dict[str, Any]:
    body = read_record(store, path)
    if body is None:
        raise FileNotFoundError(
            f"corpus {digest} is not in the store ({store.url_of(path)}): "
            "run `selftrain data index`"
        )
    return body


def _locations_path(digest: str) -> str:
    return corpus_path(digest).removesuffix(".json") + ".locations.json"


def _checked_body(body: dict[str, Any], digest: str, where: str) -> dict[str, Any]:
    check_schema(body, SCHEMA, where=where)
    if body.get("digest") != digest:
        raise CorpusMismatch(f"{where} holds digest {body.get('digest')!r}, not {digest!r}")
    return body


def _corpus_of(body: dict[str, Any], digest: str, where: str) -> Corpus:
    body = _checked_body(body, digest, where)
    corpus = Corpus.of([Shard.from_json(s) for s in body["shards"]], body["class_names"])
    if corpus.digest != digest:
        raise CorpusMismatch(f"{where}: its shards have the digest {corpus.digest}, not {digest}")
    return corpus


def read_shard(corpus: Corpus, locations: Mapping[str, str], stem: str) -> bytes:
    """Read a whole shard and check it against the corpus.

    Raises: MissingShard if it is not at its location; CorruptShard if its bytes are others than
        those that were indexed.
    """
    shard = corpus.shard(stem)
    url = locations.get(stem)
    remedy = "Put the shard back, or index the corpus again where it lies now"
    if url is None:
        raise MissingShard(f"shard {stem}: no location is known. {remedy}")
    try:
        return objects.read_object(url, sha256=shard.tar_digest)
    except FileNotFoundError as error:
        raise MissingShard(f"shard {stem}: nothing at {url}. {remedy}") from error
    except CorruptObject as error:
        raise CorruptShard(
            f"shard {stem} at {url} is not what was indexed (digest {shard.tar_digest}): {error}. "
            f"{remedy}"
        ) from error


def read_samples(
    corpus: Corpus, locations: Mapping[str, str], stem: str, *, cache: ShardCache | None = None
) -> list[RawSample]:
    """Read a shard, checked, and list its samples, whose number must be the corpus's.

    Excluded samples are not among them.

    Out of a cache their images are views of a mapped file, which was checked when it was written.

    Raises: as `read_shard`; CacheTooSmall where the cache has no room for it.
    """
    shard = corpus.shard(stem)
    if cache is None:
        data = memoryview(read_shard(corpus, locations, stem))
    else:

        def fetch() -> bytes:
            return read_shard(corpus, locations, stem)

        data = cache.read(shard.tar_digest, shard.num_bytes, fetch)
    num_samples = shard.num_samples + len(shard.excluded)
    samples = iterate_samples(data, stem=stem, num_samples=num_samples)
    if not shard.excluded:
        return samples
    excluded = {sample_key(stem, key) for key in shard.excluded}
    return [sample for sample in samples if sample.key not in excluded]
