"""Runs: a config pinned once, events only appended, decisions made once, views rebuilt at will."""

import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, cast

from storage.addresses import canonical_json, run_folder
from storage.manifest import CorruptRecord, create_record, read_record
from storage.store import Store

EVENT_SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VIEW = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CONFIG = "config.json"
_QUESTION = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_EVENT_NAME = re.compile(r"\d{8}-[0-9a-f]{12}\.json")
_RESERVED = ("schema", "type", "time", "counter", "id", "sha256")
_MAX_NAMED_KEYS = 8


class RunExists(Exception):
    """A run of this name exists with another config."""


class UnknownRun(Exception):
    """There is no run of this name."""


def validate_run_name(name: str) -> str:
    """Return the name if it can name a run; ValueError says what is allowed."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"run name {name!r}: must start with a letter or digit and hold only letters, digits, "
            "'.', '_' and '-' (at most 100)"
        )
    return name


def create_run(store: Store, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Pin a run's config and return it; a run with this very config is simply returned.

    Raises: RunExists if the run has another config; the keys that differ are named.
    """
    validate_run_name(name)
    there = create_record(store, f"{run_folder(name)}/{_CONFIG}", body)
    if canonical_json(there) != canonical_json(body):
        different = list(_differences(there, body, ""))
        shown = "; ".join(different[:_MAX_NAMED_KEYS])
        more = len(different) - _MAX_NAMED_KEYS
        raise RunExists(
            f"run {name!r} in {store.url} has another config: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + f". Choose another --name, or go on with the old config: selftrain resume {name}"
        )
    return there


def read_run_config(store: Store, name: str) -> dict[str, Any]:
    """Return a run's pinned config.

    Raises: UnknownRun, listing the known ones.
    """
    validate_run_name(name)
    body = read_record(store, f"{run_folder(name)}/{_CONFIG}")
    if body is None:
        known = ", ".join(list_runs(store)) or "none"
        raise UnknownRun(f"there is no run {name!r} in {store.url}; known runs: {known}")
    return body


def list_runs(store: Store) -> list[str]:
    """Return the sorted names of all runs that have a config."""
    names = [name for name in store.folders("runs") if _NAME.fullmatch(name)]
    return [name for name in names if store.exists(f"{run_folder(name)}/{_CONFIG}")]


def append_event(store: Store, name: str, type: str, **facts: Any) -> dict[str, Any]:
    """Append an event to a run and return it, with the UTC time as ISO 8601.

    The counter orders the events of one driver; two drivers may take the same one, and the id
    keeps both.
    """
    reserved = [key for key in facts if key in _RESERVED]
    if reserved or not type:
        raise ValueError(f"event {type!r}: needs a type and no facts named {reserved or _RESERVED}")
    folder = f"{run_folder(validate_run_name(name))}/events"
    counters = [int(path.rpartition("/")[2].partition("-")[0]) for path in _events(store, name)]
    counter = max(counters, default=-1) + 1
    identifier = uuid.uuid4().hex[:12]
    event = {
        "schema": EVENT_SCHEMA,
        "type": type,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "counter": counter,
        "id": identifier,
        **facts,
    }
    return create_record(store, f"{folder}/{counter:08d}-{identifier}.json", event)


def read_events(store: Store, name: str) -> list[dict[str, Any]]:
    """Return a run's events in order (counter, then id).

    Raises: CorruptRecord if one is damaged: events hold the references that garbage collection
        must see.
    """
    paths = _events(store, validate_run_name(name))

    def read(path: str) -> dict[str, Any]:
        event = read_record(store, path)
        if event is None:
            raise CorruptRecord(f"{store.url_of(path)}: the event was listed and is gone")
        return event

    if len(paths) < 2:
        return [read(path) for path in paths]
    with ThreadPoolExecutor(max_workers=min(16, len(paths))) as pool:
        return list(pool.map(read, paths))


def record_decision(
    store: Store, name: str, question: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    """Record what was decided on a question, once, and return the decision that is there now.

    Of several that decide at a time the first one's stands; the others are told by what they get.
    """
    return create_record(store, _decision_path(name, question), body)


def read_decision(store: Store, name: str, question: str) -> dict[str, Any] | None:
    """Return what was decided on a question of a run, None while nothing was."""
    return read_record(store, _decision_path(name, question))


def write_view(store: Store, name: str, filename: str, data: bytes) -> str:
    """Write (or replace) a view of a run, such as ``run.json``, and return its URL."""
    if not _VIEW.fullmatch(filename) or filename == _CONFIG:
        raise ValueError(f"view {filename!r}: must be a plain file name other than {_CONFIG}")
    path = f"{run_folder(validate_run_name(name))}/{filename}"
    store.replace(path, data)
    return store.url_of(path)


def _decision_path(name: str, question: str) -> str:
    if not _QUESTION.fullmatch(question):
        raise ValueError(f"question {question!r}: must be lower case, digits and dashes")
    return f"{run_folder(validate_run_name(name))}/decisions/{question}.json"


def _events(store: Store, name: str) -> list[str]:
    paths = store.list(f"{run_folder(name)}/events")
    return sorted(path for path in paths if _EVENT_NAME.fullmatch(path.rpartition("/")[2]))


def _differences(there: object, wanted: object, where: str) -> Iterator[str]:
    """Yield "dotted.key is <there> there, <wanted> asked for" for every leaf that differs."""
    old, new = _mapping(there), _mapping(wanted)
    if old is None or new is None:
        if canonical_json(there) != canonical_json(wanted):
            yield f"{where} is {_short(there)} there, {_short(wanted)} asked for"
        return
    for key in sorted({*old, *new}):
        below = f"{where}.{key}" if where else key
        if key not in old:
            yield f"{below} is absent there, {_short(new[key])} asked for"
        elif key not in new:
            yield f"{below} is {_short(old[key])} there, absent in what is asked for"
        else:
            yield from _differences(old[key], new[key], below)


def _mapping(value: object) -> Mapping[str, object] | None:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else None


def _short(value: object) -> str:
    text = canonical_json(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
