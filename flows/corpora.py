"""Corpora that users name by pattern or index: indexed, freed of excluded samples, stored."""

import logging
from collections.abc import Mapping

from storage.addresses import sha256_hex
from storage.corpus import Corpus, EmptyCorpus, save_corpus
from storage.exclusion import exclude as take_out
from storage.exclusion import read_keys
from storage.indexing import ShardIndex, corpus_from_index, index_shards, read_index, write_index
from storage.patterns import below_root, expand_shards
from storage.store import Store
from tasks.progress import Progress, report

_log = logging.getLogger(__name__)


def index_corpus(
    store: Store,
    pattern: str,
    *,
    named: str,
    root: str = "",
    exclude: str | None = None,
    exclude_named: str = "data.exclude",
) -> Corpus:
    """Index a corpus and make it known to the store.

    What is unchanged since the last index of this pattern is not read.

    Args:
        store: keeps the corpus, and the index for the next time.
        pattern: a folder, a brace pattern, a glob, a list file (.txt) or an index (.json).
        named: what the user calls it, such as `data.dev`; for messages.
        root: folder or URL before relative ones.
        exclude: text file of sample keys that are left out.
        exclude_named: what the user calls that file; for messages.
    Raises: ValueError, FileNotFoundError, MissingShard, CorruptShard, EmptyCorpus.
    """
    located = below_root(pattern, root)
    if located.endswith(".json"):
        index = read_index(located)
        if index is None:
            raise FileNotFoundError(
                f"{named} = {pattern!r}: no index at {located}; make it with `selftrain data index`"
            )
    else:
        index = _fresh_index(store, named, located)
    try:
        corpus, locations = corpus_from_index(index)
    except EmptyCorpus as error:
        raise EmptyCorpus(f"{named} = {pattern!r}: {error}") from None
    if exclude is not None:
        keys_url = below_root(exclude, root)
        shown = f"{exclude_named} = {exclude!r}"
        corpus = without_keys(corpus, locations, keys_url, named=named, shown=shown)
    save_corpus(store, corpus, locations)
    return corpus


def without_keys(
    corpus: Corpus, locations: Mapping[str, str], keys_url: str, *, named: str, shown: str
) -> Corpus:
    """Return a corpus without the samples whose keys a text file lists.

    Args:
        corpus: to take them from.
        locations: of its shards; those with such samples are read.
        keys_url: the file.
        named: what the user calls the corpus; for messages.
        shown: what the user wrote to name the file; for messages.
    """
    try:
        exclusion = take_out(corpus, locations, read_keys(keys_url))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{shown}: {error}") from error
    except EmptyCorpus as error:
        raise EmptyCorpus(f"{shown} leaves nothing of {named.removeprefix('data.')}") from error
    _log.info("%s: %d samples of %s are left out", shown, len(exclusion.found), named)
    return exclusion.corpus


def _fresh_index(store: Store, named: str, located: str) -> ShardIndex:
    try:
        urls = expand_shards(located)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{named}: {error}") from error
    index_url = store.url_of(f"corpora/index-{sha256_hex(located.encode())[:16]}.json")
    stage = f"index {named.removeprefix('data.')}"
    index = index_shards(
        urls,
        previous=read_index(index_url),
        progress=lambda done, total: report(Progress(stage, done, total, "shards")),
        save=lambda partial: write_index(index_url, partial),
    )
    write_index(index_url, index)
    return index
