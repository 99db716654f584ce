"""Progress of a running stage, shown in the terminal at once and in the Prefect UI now and then."""

import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.progress import Progress, report

_SECONDS_BETWEEN_ARTIFACTS = 5.0


class LiveProgress:
    """Reports to the listeners of this process and to one progress artifact of the task or flow."""

    def __init__(self, stage: str, unit: str, *, key: str) -> None:
        """Name the stage, its unit, and the artifact (lower case, digits and dashes)."""
        self._stage = stage
        self._unit = unit
        self._key = key
        self._artifact: UUID | None = None
        self._updated_at = 0.0

    def update(self, done: int, total: int, **facts: float) -> None:
        """Say how far the stage is; cheap enough to call several times a second."""
        report(Progress(self._stage, done, total, self._unit, facts))
        now = time.monotonic()
        if now - self._updated_at < _SECONDS_BETWEEN_ARTIFACTS and done < total:
            return
        self._updated_at = now
        percent = 100 * done / max(total, 1)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
        description = f"{self._stage}: {done} of {total} {self._unit}" + (
            f" ({shown})" if shown else ""
        )
        if self._artifact is None:
            made = create_progress_artifact(percent, key=self._key, description=description)
            assert isinstance(made, UUID), "called from synchronous code"
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, percent, description=description)
