"""When a training writes checkpoints, and which one it goes on from.

Checkpoints are written by a thread of their own from copies of the tensors, so the training waits
for the copying alone. There is one writer: a checkpoint that falls due while the one before is
still being written is taken at the first report after that.
"""

import os
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from models.training import TrainingConfig, TrainingState
from storage.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from storage.store import Store
from tasks import provenance


class VersionsChanged(RuntimeError):
    """A checkpoint was written under other library versions than these."""


class CheckpointKeeper:
    """Decides when to write checkpoints, writes them, and finds the one to go on from.

    States are given to it at reports only, where they are known to be finite.
    """

    def __init__(self, store: Store, fingerprint: str, config: TrainingConfig) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._config = config
        self._attempt = uuid.uuid4().hex[:12]
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()

    def resume(self, state: TrainingState) -> list[dict[str, Any]]:
        """Restore the newest complete checkpoint, if any, and return the curve up to it."""
        found = self.find()
        return [] if found is None else self.restore(state, found)

    def find(self) -> Checkpoint | None:
        """Return the newest complete checkpoint of any attempt, verified; None if there is none.

        Raises: VersionsChanged.
        """
        found = newest_checkpoint(self._store, self._fingerprint)
        if found is not None:
            _refuse_other_versions(found)
        return found

    def restore(self, state: TrainingState, found: Checkpoint) -> list[dict[str, Any]]:
        """Put a checkpoint into the state and return the curve up to it."""
        state.restore(load_tensors(found.read()), found.scalars["state"])
        self._saved_step = state.step
        self._saved_at = time.monotonic()
        return list(found.scalars["curve"])

    def save_if_due(self, state: TrainingState, curve: list[dict[str, Any]]) -> None:
        """Begin to write a checkpoint if enough steps or seconds have passed since the last one.

        Raises: whatever failed the write before.
        """
        if self._write is not None and not self._write.done():
            return
        self.wait()
        every_steps = self._config.checkpoint_every_steps
        every_seconds = self._config.checkpoint_every_seconds
        if (every_steps is not None and state.step - self._saved_step >= every_steps) or (
            every_seconds is not None and time.monotonic() - self._saved_at >= every_seconds
        ):
            self._begin(state, curve)

    def save(self, state: TrainingState, curve: list[dict[str, Any]]) -> None:
        """Write a checkpoint of this step, unless there is one, and return when it is whole.

        Raises: whatever failed this write or the one before.
        """
        self.wait()
        if state.step != self._saved_step:
            self._begin(state, curve)
            self.wait()

    def wait(self) -> None:
        """Return when the write in hand is whole; raises what failed it."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def close(self) -> None:
        """Let the write in hand come to its end; whether it failed matters no more."""
        self._writer.shutdown(wait=True)

    def last_good(self) -> str:
        """Say which checkpoint a corrected run could look at."""
        self.close()  # the write in hand may be it
        found = newest_checkpoint(self._store, self._fingerprint, verify=False)
        if found is None:
            return "there is no checkpoint yet"
        return f"last good checkpoint: step {found.step}, {self._store.url_of(found.state.path)}"

    def _begin(self, state: TrainingState, curve: list[dict[str, Any]]) -> None:
        # Copies: the training changes all of these while they are written.
        scalars = {
            "state": state.scalars(),
            "curve": list(curve),
            "versions": provenance.versions(),
        }
        self._write = self._writer.submit(self._put, state.step, state.tensors(), scalars)
        self._saved_step = state.step
        self._saved_at = time.monotonic()

    def _put(self, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        data = save_tensors(tensors)
        tensors.clear()  # half of the memory, before the slow part
        save_checkpoint(self._store, self._fingerprint, self._attempt, step, data, scalars)
        kept = self._config.checkpoints_kept
        prune_checkpoints(self._store, self._fingerprint, keep=kept, step=step)


def curve_so_far(store: Store, fingerprint: str) -> list[dict[str, Any]]:
    """Return the learning curve of a training up to its newest checkpoint; empty without one."""
    found = newest_checkpoint(store, fingerprint, verify=False)
    return [] if found is None else list(found.scalars["curve"])


def _refuse_other_versions(found: Checkpoint) -> None:
    then, now = found.scalars["versions"], provenance.versions()
    changed = [
        f"{name} {then.get(name)} -> {now.get(name)}"
        for name in sorted(then | now)
        if then.get(name) != now.get(name)
    ]
    if changed and os.environ.get("SELFTRAIN_RESUME_ACROSS_VERSIONS") != "1":
        raise VersionsChanged(
            f"the checkpoint of step {found.step} was written under other versions:"
            f" {', '.join(changed)}. Its training can only be exact under the versions it began"
            " with: install those, or set SELFTRAIN_RESUME_ACROSS_VERSIONS=1 to go on without"
            " that promise"
        )
