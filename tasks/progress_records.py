"""How far a training is, as a small record beside its result: for whoever waits for it elsewhere.

`models/<fingerprint>/progress.json` is a view: replaced in place, and no result depends on it.
"""

import logging
import threading
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from storage.addresses import model_folder
from storage.manifest import CorruptRecord, read_record, sealed
from storage.store import Store

RecordState = Literal["training", "committed", "stopped", "refused"]

_SCHEMA = 1
_SECONDS_BETWEEN_WRITES = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProgressRecord:
    """What one attempt at a training last said of itself.

    Attributes:
        attempt: id of the attempt; another launch has another one.
        sequence: number of the record within the attempt, so that each differs from the one before.
        state: "training" until the attempt has ended, then how.
        message: why it ended, empty while it trains.
        progress: step, total_steps, loss and learning_rate of the last report; empty before it.
    """

    attempt: str
    sequence: int
    state: RecordState
    message: str
    progress: dict[str, Any]


def read_progress(store: Store, fingerprint: str) -> ProgressRecord | None:
    """Return the newest record of a training, or None where there is none that can be read."""
    path = _path(fingerprint)
    try:
        body = read_record(store, path)
    except CorruptRecord as error:
        # It is written every few seconds; the next one will do.
        _log.warning("progress record skipped: %s", error)
        return None
    if body is None or body.pop("schema", None) != _SCHEMA:
        return None
    return ProgressRecord(**body)


class ProgressRecords:
    """Writes the records of one attempt from a thread of its own, so that no step waits.

    A record that cannot be written is logged and costs the training nothing: it is only watched
    less closely.
    """

    def __init__(
        self, store: Store, fingerprint: str, *, seconds: float = _SECONDS_BETWEEN_WRITES
    ) -> None:
        """Name the training; nothing is written yet."""
        self._store = store
        self._path = _path(fingerprint)
        self._seconds = seconds
        self._attempt = uuid.uuid4().hex[:12]
        self._sequence = 0
        self._progress: dict[str, Any] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, progress: dict[str, Any]) -> None:
        """Remember the newest figures; they are written within seconds."""
        self._progress = progress
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def close(self, state: RecordState, message: str = "") -> None:
        """Say how the attempt ended; returns once that is written, or could not be."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._put(state, message)

    def _run(self) -> None:
        written: dict[str, Any] | None = None
        while True:
            if self._progress is not written:
                written = self._progress
                self._put("training", "")
            if self._closing.wait(self._seconds):
                return

    def _put(self, state: RecordState, message: str) -> None:
        self._sequence += 1
        body = {
            "schema": _SCHEMA,
            "attempt": self._attempt,
            "sequence": self._sequence,
            "state": state,
            "message": message,
            "progress": self._progress,
        }
        try:
            self._store.replace(self._path, sealed(body))
        except OSError as error:
            _log.warning("progress record of %s not written: %s", self._path, error)


def _path(fingerprint: str) -> str:
    return f"{model_folder(fingerprint)}/progress.json"
