"""Checks of the store, of who we are there, and of the data."""

import os
import time
import uuid
from collections.abc import Iterator

from botocore.session import Session

from flows.checks import Check
from flows.config import SelfTrainingConfig
from flows.data_config import DigitsData, ShardsData
from flows.first_shards import is_images
from storage import objects
from storage.indexing import read_index
from storage.listings import time_of
from storage.patterns import below_root, expand_shards
from storage.runs import list_runs
from storage.store import conditional_create_works, open_store

_MAX_SKEW_SECONDS = 60.0
_MAX_SIGNED_SKEW_SECONDS = 900.0
"""S3 refuses requests that were signed further from its own time."""


def check_store(url: str | None) -> Iterator[Check]:
    """Write, read, list and delete in the store, and look at its clock."""
    if url is None:
        yield Check(
            "store", "warn", "none is named", "Give --store, SELFTRAIN_STORE or `store` in a config"
        )
        return
    store = open_store(url, check_writable=True)
    path = f"probes/{uuid.uuid4().hex}"
    store.put(path, b"probe")
    is_listed = path in store.list("probes")
    store.delete(path)
    if not is_listed or store.exists(path):
        what = "does not list what was written" if not is_listed else "keeps what was deleted"
        yield Check("store", "fail", f"{store.url} {what}", "Use a store with strong consistency")
        return
    runs = len(list_runs(store))
    yield Check("store", "ok", f"{store.url}: can be written, read and listed; {runs} runs")
    if conditional_create_works(store):
        yield Check("conditional writes", "ok", "the store refuses to create what is there")
    else:
        yield Check(
            "conditional writes",
            "warn",
            "the store creates over what is there",
            "Nothing relies on them; but let no two runs compute one stage at the same time",
        )
    skew = time_of(store) - time.time()
    found = f"{skew:+.1f} s against this machine's"
    remedy = "Set this machine's clock (NTP)"
    limit = _MAX_SIGNED_SKEW_SECONDS if objects.local_path(url) is None else float("inf")
    if abs(skew) > limit:
        yield Check("store's clock", "fail", found, f"{remedy}: S3 refuses requests so far off")
    elif abs(skew) > _MAX_SKEW_SECONDS:
        yield Check("store's clock", "warn", found, remedy)
    else:
        yield Check("store's clock", "ok", found)


def check_credentials(config: SelfTrainingConfig | None, store: str | None) -> Iterator[Check]:
    """Say where credentials for s3:// come from; what they are is never shown."""
    urls = [store or "", *(pattern for _, pattern in _patterns(config))]
    if not any(url.startswith(("s3://", "s3a://")) for url in urls):
        return
    session = Session()
    found = session.get_credentials()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if found is None:
        yield Check(
            "credentials",
            "fail",
            f"none for s3:// at {endpoint}",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role"
            " gives them",
        )
    else:
        yield Check("credentials", "ok", f"from {found.method}, for s3:// at {endpoint}")


def check_data(config: SelfTrainingConfig) -> Iterator[Check]:
    """Find the first and the last shard of every split."""
    if isinstance(config.data, DigitsData):
        yield Check("data", "ok", "scikit-learn's digits, which the run makes shards of")
    for name, located in _patterns(config):
        yield _check_split(name, located)
    exclude = config.data.exclude if isinstance(config.data, ShardsData) else None
    if exclude is not None and isinstance(config.data, ShardsData):
        url = below_root(exclude, config.data.root)
        if objects.object_exists(url):
            yield Check("data.exclude", "ok", url)
        else:
            yield Check("data.exclude", "fail", f"nothing at {url}", "Correct data.exclude")


def _check_split(name: str, located: str) -> Check:
    remedy = f"Correct {name} or data.root, or put the shards there"
    try:
        if located.endswith(".json"):
            index = read_index(located)
            if index is None:
                return Check(
                    name, "fail", f"no index at {located}", "selftrain data index makes it"
                )
            urls = [entry.url for entry in index.entries]
        else:
            urls = expand_shards(located)
    except (ValueError, OSError) as error:
        if is_images(located):
            return Check(
                name, "fail", f"{located} holds images, not shards", f"selftrain init {located}"
            )
        return Check(name, "fail", str(error).split("\n")[0], remedy)
    missing = [url for url in {urls[0], urls[-1]} if not objects.object_exists(url)]
    if missing:
        return Check(name, "fail", f"nothing at {missing[0]}", remedy)
    return Check(name, "ok", f"{len(urls):,} shards, {urls[0]} and the last are there")


def _patterns(config: SelfTrainingConfig | None) -> list[tuple[str, str]]:
    if config is None or not isinstance(config.data, ShardsData):
        return []
    data = config.data
    named = {
        "labeled": data.labeled,
        "dev": data.dev,
        "test": data.test,
        "unlabeled": data.unlabeled if config.rounds else None,
    }
    return [
        (f"data.{split}", below_root(pattern, data.root))
        for split, pattern in named.items()
        if pattern is not None
    ]
