"""When a training writes checkpoints, and which one it goes on from."""

import os
import time
import uuid
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from models.training import TrainingConfig, TrainingState
from storage.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from storage.store import Store
from tasks import provenance

_CHECKPOINTS_KEPT = 2


class VersionsChanged(RuntimeError):
    """A checkpoint was written under other library versions than these."""


class CheckpointKeeper:
    """Decides when to write checkpoints, writes them, and finds the one to go on from."""

    def __init__(self, store: Store, fingerprint: str, config: TrainingConfig) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._config = config
        self._attempt = uuid.uuid4().hex[:12]
        self._saved_step = 0
        self._saved_at = time.monotonic()

    def resume(self, state: TrainingState) -> list[dict[str, Any]]:
        """Restore the newest complete checkpoint, if any, and return the curve up to it."""
        found = newest_checkpoint(self._store, self._fingerprint)
        if found is None:
            return []
        _refuse_other_versions(found)
        state.restore(load_tensors(found.read()), found.scalars["state"])
        self._saved_step = state.step
        return list(found.scalars["curve"])

    def save_if_due(self, state: TrainingState, curve: list[dict[str, Any]]) -> None:
        """Write a checkpoint if enough steps or seconds have passed since the last one."""
        every_steps = self._config.checkpoint_every_steps
        every_seconds = self._config.checkpoint_every_seconds
        is_due = (every_steps is not None and state.step - self._saved_step >= every_steps) or (
            every_seconds is not None and time.monotonic() - self._saved_at >= every_seconds
        )
        if is_due:
            self.save(state, curve)

    def save(self, state: TrainingState, curve: list[dict[str, Any]]) -> None:
        """Write a checkpoint and drop all but the newest two of this attempt."""
        scalars = {
            "state": state.scalars(),
            "curve": curve,
            "versions": provenance.versions(),
        }
        save_checkpoint(
            self._store,
            self._fingerprint,
            self._attempt,
            state.step,
            save_tensors(state.tensors()),
            scalars,
        )
        prune_checkpoints(self._store, self._fingerprint, self._attempt, keep=_CHECKPOINTS_KEPT)
        self._saved_step = state.step
        self._saved_at = time.monotonic()

    def last_good(self) -> str:
        """Say which checkpoint a corrected run could look at."""
        found = newest_checkpoint(self._store, self._fingerprint, verify=False)
        if found is None:
            return "there is no checkpoint yet"
        return f"last good checkpoint: step {found.step}, {self._store.url_of(found.state.path)}"


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
