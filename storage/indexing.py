"""The index of a shard set: reads each shard once, and later only what changed."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, cast

from storage import objects
from storage.addresses import sha256_hex
from storage.corpus import Corpus, EmptyCorpus, Locations, MissingShard, Shard
from storage.manifest import check_schema, sealed, unsealed
from storage.samples import CorruptShard, iterate_samples

SCHEMA = 1
CLASSES_FILE = "classes.json"
SAVE_EVERY_SECONDS = 2.0
SAVE_EVERY_SHARDS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """One shard and the state of its object when it was read (`version`: etag or mtime)."""

    url: str
    size: int
    version: str
    shard: Shard


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What is known of a set of shards, in the order of their URLs."""

    entries: tuple[IndexedShard, ...]
    class_names: tuple[str, ...] | None = None

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards by content."""
        return tuple(entry.shard for entry in self.entries)


def index_shards(
    urls: Sequence[str],
    *,
    previous: ShardIndex | None = None,
    verify: bool = False,
    workers: int = 8,
    progress: Callable[[int, int], None] | None = None,
    save: Callable[[ShardIndex], None] | None = None,
) -> ShardIndex:
    """Read what is new or changed among the shards and return the index of all of them.

    A shard whose URL, size and version are those of `previous` is not read again. Each worker
    holds one whole shard in memory.

    Args:
        urls: from `expand_shards`.
        previous: an earlier index, or the last one given to `save` by an interrupted call.
        verify: read every shard; one that differs although size and version do not is an error.
        workers: shards read at a time.
        progress: called with (shards done, shards in all).
        save: called with what is known so far every 2 seconds or 64 shards, and at the end of an
            interrupted or failed call, so that the next one goes on from there.
    Raises: EmptyCorpus without a URL; MissingShard; CorruptShard (all bad shards are named);
        ValueError, naming both URLs, for two shards of one stem or of equal content.
    """
    if not urls:
        raise EmptyCorpus("no shard to index: the list of URLs is empty")
    _refuse_pairs("stem", [(url, stem_of(url)) for url in urls], "Rename one of them")
    known = {entry.url: entry for entry in previous.entries} if previous else {}
    pending = _Pending(urls, known, previous.class_names if previous else None, save)
    problems: list[Exception] = []

    def work(url: str) -> IndexedShard:
        return _index_one(url, known.get(url), verify=verify)

    pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="index")
    try:
        for future in as_completed([pool.submit(work, url) for url in urls]):
            try:
                pending.add(future.result())
            except (CorruptShard, MissingShard) as error:
                problems.append(error)
            if progress is not None:
                progress(len(pending.done) + len(problems), len(urls))
            pending.save_if_due()
        _raise_all(problems, len(urls))
    except BaseException:
        pending.save_now()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    entries = tuple(pending.done[url] for url in urls)
    _refuse_pairs("content", [(e.url, e.shard.digest) for e in entries], "Leave one of them out")
    index = ShardIndex(entries, _read_class_names(urls))
    if (warning := sorted_by_class(index.shards)) is not None:
        _log.warning("%s", warning)
    return index


class _Pending:
    """The shards done so far, saved now and then."""

    def __init__(
        self,
        urls: Sequence[str],
        known: Mapping[str, IndexedShard],
        class_names: tuple[str, ...] | None,
        save: Callable[[ShardIndex], None] | None,
    ) -> None:
        self.done: dict[str, IndexedShard] = {}
        self._urls, self._known, self._class_names, self._save = urls, known, class_names, save
        self._saved_count, self._saved_at = 0, time.monotonic()

    def add(self, entry: IndexedShard) -> None:
        self.done[entry.url] = entry

    def save_if_due(self) -> None:
        new = len(self.done) - self._saved_count
        waited = time.monotonic() - self._saved_at
        if new >= SAVE_EVERY_SHARDS or (new and waited >= SAVE_EVERY_SECONDS):
            self.save_now()

    def save_now(self) -> None:
        if self._save is None:
            return
        # What is not yet looked at keeps its old entry: the version decides later if it holds.
        so_far = {**self._known, **self.done}
        self._save(
            ShardIndex(tuple(so_far[u] for u in self._urls if u in so_far), self._class_names)
        )
        self._saved_count, self._saved_at = len(self.done), time.monotonic()


def stem_of(url: str) -> str:
    """Return the file's name without folder and `.tar`."""
    return url.rstrip("/").rpartition("/")[2].removesuffix(".tar")


def _index_one(url: str, known: IndexedShard | None, *, verify: bool) -> IndexedShard:
    stem = stem_of(url)
    try:
        state = objects.stat_object(url)
        same = known is not None and (known.size, known.version) == (state.size, state.version)
        if known is not None and same and not verify:
            return known
        data = objects.read_object(url)
    except FileNotFoundError as error:
        raise MissingShard(
            f"shard {stem}: nothing at {url}. Correct the pattern, or put the shard there"
        ) from error
    digest = sha256_hex(data)
    if known is not None and same and digest != known.shard.digest:
        raise CorruptShard(
            f"shard {stem} at {url}: sha256 {digest}, indexed as {known.shard.digest}, although "
            "size and version are the same: damaged at rest. Restore it, or index it anew"
        )
    try:
        samples = iterate_samples(data, stem=stem)
    except CorruptShard as error:
        raise CorruptShard(f"{error} (at {url})") from error
    counts = Counter(s.label for s in samples if s.label is not None)
    shard = Shard(stem, digest, len(samples), len(data), dict(sorted(counts.items())) or None)
    return IndexedShard(url, state.size, state.version, shard)


def _raise_all(problems: Sequence[Exception], num_shards: int) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        shown = "; ".join(sorted(str(p) for p in problems)[:10])
        raise CorruptShard(f"{len(problems)} of {num_shards} shards cannot be used: {shown}")


def _refuse_pairs(what: str, facts: Sequence[tuple[str, str]], remedy: str) -> None:
    first: dict[str, str] = {}
    for url, fact in facts:
        if fact in first:
            raise ValueError(
                f"two shards have the same {what} {fact!r}: {first[fact]} and {url}. {remedy}"
            )
        first[fact] = url


def _read_class_names(urls: Sequence[str]) -> tuple[str, ...] | None:
    """Read `classes.json` in each folder that holds shards; where several exist they must agree."""
    found: dict[str, tuple[str, ...]] = {}
    for folder in sorted({url.rpartition("/")[0] for url in urls}):
        url = objects.join_url(folder, CLASSES_FILE)
        try:
            content: Any = json.loads(objects.read_object(url))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{url} is not JSON: {error}") from error
        found[url] = _class_names_of(content, url)
    for url, names in found.items():
        first = next(iter(found))
        if names != found[first]:
            raise ValueError(
                f"{first} and {url} name different classes; index the folders as two corpora"
            )
    return next(iter(found.values()), None)


def _class_names_of(content: object, url: str) -> tuple[str, ...]:
    names: object = None
    if isinstance(content, dict):
        mapping = cast("dict[str, object]", content)
        names = mapping.get("class_names") if mapping.get("schema") == 1 else None
    if isinstance(names, list) and all(isinstance(n, str) for n in cast("list[object]", names)):
        return tuple(cast("list[str]", names))
    raise ValueError(f'{url} must be {{"schema": 1, "class_names": ["name", ...]}}')


def sorted_by_class(shards: Sequence[Shard]) -> str | None:
    """Return a warning if most labelled shards hold one class each, else None.

    Such shards give batches of one class unless many are open at a time.
    """
    labeled = [s.label_counts for s in shards if s.label_counts]
    classes = {label for counts in labeled for label in counts}
    single = sum(len(counts) == 1 for counts in labeled)
    if len(classes) < 2 or single * 2 <= len(labeled):
        return None
    return (
        f"{single} of {len(labeled)} labelled shards hold one class only: the shards look sorted "
        "by class. Shuffle the samples before writing shards, or training sees one class at a time"
    )


def corpus_from_index(index: ShardIndex) -> tuple[Corpus, Locations]:
    """Return the corpus of an index and where its shards lie.

    Raises: EmptyCorpus without a sample.
    """
    return (
        Corpus.of(index.shards, index.class_names),
        {entry.shard.stem: entry.url for entry in index.entries},
    )


def write_index(url: str, index: ShardIndex) -> None:
    """Write an index to a URL, replacing an older one."""
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "class_names": None if index.class_names is None else list(index.class_names),
        "shards": [
            {"url": e.url, "size": e.size, "version": e.version, **e.shard.to_json()}
            for e in index.entries
        ],
    }
    objects.write_object(url, sealed(body), mode="replace")


def read_index(url: str) -> ShardIndex | None:
    """Read an index; None if there is none.

    Raises: CorruptRecord; UnknownSchema if it was written by a newer version.
    """
    try:
        body = unsealed(objects.read_object(url), where=url)
    except FileNotFoundError:
        return None
    check_schema(body, SCHEMA, where=url)
    names = cast("list[str] | None", body["class_names"])
    return ShardIndex(
        tuple(
            IndexedShard(s["url"], s["size"], s["version"], Shard.from_json(s))
            for s in cast("list[dict[str, Any]]", body["shards"])
        ),
        None if names is None else tuple(names),
    )
