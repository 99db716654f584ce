"""Training checkpoints: tensors first, sealed record last; the newest whole one is resumed from."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from storage import crash_points
from storage.addresses import model_folder
from storage.manifest import (
    CorruptRecord,
    StoredObject,
    check_schema,
    create_record,
    put_object,
    read_record,
    read_stored,
)
from storage.store import CorruptObject, Store

CHECKPOINT_SCHEMA = 1
_log = logging.getLogger(__name__)
_RECORD = "checkpoint.json"
_ATTEMPT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PLACE = re.compile(r"(?P<attempt>[^/]+)/(?P<step>\d{12})/(?P<file>[^/]+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: number of finished optimiser steps.
        attempt: id of the process that wrote it.
        scalars: positions, schedule and the like, JSON only.
        state: reference of the tensors.
        num_damaged: newer ones that were skipped because they are damaged.
    """

    step: int
    attempt: str
    scalars: dict[str, Any]
    state: StoredObject
    num_damaged: int
    _store: Store = field(repr=False)
    _tensors: bytes | None = field(repr=False, default=None)

    def read(self) -> bytes:
        """Return the verified safetensors bytes; CorruptObject if they are damaged."""
        return self._tensors if self._tensors is not None else read_stored(self._store, self.state)


def save_checkpoint(
    store: Store,
    fp: str,
    attempt: str,
    step: int,
    tensors_bytes: bytes | bytearray | memoryview,
    scalars: Mapping[str, Any],
) -> None:
    """Write a checkpoint; until its record is there, it does not exist.

    Args:
        store: where to.
        fp: fingerprint of the training stage.
        attempt: id of this process, never used by another one.
        step: number of finished optimiser steps.
        tensors_bytes: safetensors.
        scalars: what else a resume needs, JSON only.
    """
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"attempt {attempt!r}: only letters, digits, _ and -, at most 64")
    if not 0 <= step < 10**12:
        raise ValueError(f"checkpoint step {step}: must lie in [0, 10**12)")
    folder = f"{_attempts(fp)}/{attempt}/{step:012d}"
    state = put_object(
        store, folder, "state", tensors_bytes, "safetensors", crash_kind="checkpoint"
    )
    crash_points.reach("checkpoint.between_data_and_record")
    body = {
        "schema": CHECKPOINT_SCHEMA,
        "fingerprint": fp,
        "attempt": attempt,
        "step": step,
        "scalars": dict(scalars),
        "state": asdict(state),
    }
    create_record(store, f"{folder}/{_RECORD}", body)


def newest_checkpoint(store: Store, fp: str, *, verify: bool = True) -> Checkpoint | None:
    """Return the complete checkpoint with the most steps of any attempt, None if there is none.

    Damaged ones are skipped with a warning and counted.

    Args:
        store: where to look.
        fp: fingerprint of the training stage.
        verify: read the tensors now, so that a damaged file is skipped and not found on resume;
            False only asks whether there is one and how far it got.
    """
    num_damaged = 0
    for _, _, folder in sorted(_complete(store, fp), reverse=True):
        try:
            found = _load(store, fp, folder, num_damaged, verify)
        except (CorruptRecord, CorruptObject, FileNotFoundError) as error:
            num_damaged += 1
            _log.warning("%s: checkpoint skipped: %s", store.url_of(folder), error)
            continue
        if found is not None:
            return found
    return None


def prune_checkpoints(store: Store, fp: str, keep: int = 2, *, step: int | None = None) -> None:
    """Delete all but the newest complete checkpoints of all attempts, and what lies before them.

    A training that is killed a hundred times leaves as few as one that never was. An attempt that
    still lives and is behind loses nothing it needs: it would go on from those that stay.

    Args:
        store: where they lie.
        fp: fingerprint of the training stage.
        keep: how many stay, at least 1.
        step: of the checkpoint just written; those with more steps stay and count for nothing,
            since a damaged one among them is why a training is behind it. None: of the newest.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint must stay")
    found = [one for one, _, _ in _complete(store, fp)]
    steps = sorted((one for one in found if step is None or one <= step), reverse=True)
    if len(steps) <= keep:
        return
    oldest_kept = steps[keep - 1]
    base = _attempts(fp)
    names = store.list(base)
    places = [(name, _PLACE.fullmatch(name.removeprefix(f"{base}/"))) for name in names]
    _delete(store, [n for n, place in places if place and int(place["step"]) < oldest_kept])


def delete_checkpoints(store: Store, fp: str) -> None:
    """Delete every attempt's checkpoints, once the stage's manifest makes them useless."""
    _delete(store, store.list(_attempts(fp)))


def _attempts(fp: str) -> str:
    return f"{model_folder(fp)}/attempts"


def _complete(store: Store, fp: str) -> list[tuple[int, str, str]]:
    """Return (step, attempt, folder) of every checkpoint whose record is listed."""
    base = _attempts(fp)
    found: list[tuple[int, str, str]] = []
    for name in store.list(base):
        place = _PLACE.fullmatch(name.removeprefix(f"{base}/"))
        if place and place["file"] == _RECORD:
            found.append((int(place["step"]), place["attempt"], name.rpartition("/")[0]))
    return found


def _load(store: Store, fp: str, folder: str, num_damaged: int, verify: bool) -> Checkpoint | None:
    path = f"{folder}/{_RECORD}"
    where = store.url_of(path)
    body = read_record(store, path)
    if body is None:  # pruned since it was listed
        return None
    check_schema(body, CHECKPOINT_SCHEMA, where=where)
    attempt, step = folder.split("/")[-2:]
    wanted = {"fingerprint": fp, "attempt": attempt, "step": int(step)}
    for key, value in wanted.items():
        if body.get(key) != value:
            raise CorruptRecord(f"{where}: {key} is {body.get(key)!r}, but it lies under {value!r}")
    try:
        state = StoredObject(**body["state"])
        scalars: dict[str, Any] = body["scalars"]
    except (KeyError, TypeError) as error:
        raise CorruptRecord(f"{where}: not a checkpoint: {error!r}") from error
    if verify:
        tensors = read_stored(store, state)
    else:
        tensors = None
        size = store.stat(state.path).size
        if size != state.size:
            raise CorruptObject(f"{store.url_of(state.path)}: {size} bytes, not {state.size}")
    return Checkpoint(int(step), attempt, scalars, state, num_damaged, store, tensors)


def _delete(store: Store, paths: list[str]) -> None:
    # Records first: a checkpoint that is half deleted must not look complete.
    for path in sorted(paths, key=lambda path: (not path.endswith(f"/{_RECORD}"), path)):
        store.delete(path)
