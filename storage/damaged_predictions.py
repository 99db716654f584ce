"""Recorded predictions whose object is lost or damaged: found, and their records withdrawn."""

import logging
from typing import Any, Literal

from storage.manifest import CorruptRecord, StoredObject, read_stored
from storage.predictions import read_record, record_path
from storage.store import CorruptObject, Store

Verification = Literal["size", "full"]
"""size: the object is there and as long as recorded; full: it has the recorded checksum."""

_log = logging.getLogger(__name__)


def read_whole_record(
    store: Store, labeler: str, shard_digest: str, *, verify: Verification
) -> dict[str, Any] | None:
    """Return the record of a shard's predictions if what it names is whole, else None.

    A record that is damaged, or names an object that is lost or damaged, is deleted: it is the
    record of nothing. Labelling then writes both anew. Where that gives the same bytes, as it does
    on the same type of device, it is the same record again, and whatever refers to it holds.

    Raises: as `read_record`, save CorruptRecord.
    """
    path = record_path(labeler, shard_digest)
    try:
        record = read_record(store, labeler, shard_digest)
    except CorruptRecord as error:
        return _withdraw(store, path, error)
    if record is None:
        return None
    stored = StoredObject(**record["object"])
    try:
        if verify == "full":
            read_stored(store, stored)
        elif (size := store.stat(stored.path).size) != stored.size:
            return _withdraw(store, path, f"{size} bytes instead of {stored.size}")
    except (FileNotFoundError, CorruptObject) as error:
        return _withdraw(store, path, error)
    return record


def _withdraw(store: Store, path: str, reason: object) -> None:
    _log.warning("%s is withdrawn, to be labelled again: %s", store.url_of(path), reason)
    store.delete(path)
