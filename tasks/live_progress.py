"""Progress of a running stage, shown in the terminal at once and in the Prefect UI now and then."""

import logging
import threading
import time
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError

from tasks.progress import Progress, report
from tasks.report_formats import brief, duration

_SECONDS_BETWEEN_ARTIFACTS = 5.0
# How long a finished stage waits for the last word on it to be written.
_SECONDS_AT_THE_END = 15.0


class LiveProgress:
    """Reports to the listeners of this process and to one progress artifact of the task or flow.

    The artifact is written by a thread, one write at a time, so that no step waits for a server.
    One that cannot be written is logged and costs the stage nothing.
    """

    def __init__(
        self, stage: str, unit: str, *, key: str, images_per_unit: float = 1.0, note: str = ""
    ) -> None:
        """Name the stage.

        Args:
            stage: what runs, such as "round 1 · label".
            unit: what `update` counts.
            key: of the artifact: lower case, digits and dashes.
            images_per_unit: for the images a second.
            note: shown behind the figures, such as the last dev accuracy.
        """
        self._stage = stage
        self._unit = unit
        self._key = key
        self._images_per_unit = images_per_unit
        self._note = note
        self._artifact: UUID | None = None
        self._updated_at = 0.0
        self._began: tuple[float, int] | None = None
        self._writing: threading.Thread | None = None
        # Of the flow or task that the artifact belongs to, whichever thread reports.
        self._context = copy_context()

    def update(self, done: int, total: int, **facts: float) -> None:
        """Say how far the stage is; cheap enough to call several times a second."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, done
        rate = self._rate(now, done)
        speed = {} if rate is None else {"images_per_second": rate * self._images_per_unit}
        report(Progress(self._stage, done, total, self._unit, {**facts, **speed}))
        is_finished = done >= total
        if not is_finished and (
            now - self._updated_at < _SECONDS_BETWEEN_ARTIFACTS or self._is_writing()
        ):
            return
        self._updated_at = now
        shown = [f"{name} {brief(value)}" for name, value in facts.items()]
        if rate is not None:
            shown.append(f"{brief(rate * self._images_per_unit)} img/s")
            if not is_finished:
                shown.append(f"{duration((total - done) / rate)} left")
        shown += [self._note] if self._note else []
        description = ", ".join([f"{self._stage}: {done} of {total} {self._unit}", *shown])
        self._write(100 * done / max(total, 1), description, wait=is_finished)

    def _rate(self, now: float, done: int) -> float | None:
        """Return units a second since the first update, None before there was a second one."""
        assert self._began is not None
        since, done_then = self._began
        return (done - done_then) / (now - since) if done > done_then and now > since else None

    def _is_writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def _write(self, percent: float, description: str, *, wait: bool) -> None:
        if self._writing is not None:
            self._writing.join(_SECONDS_AT_THE_END)
        context = self._context.copy()  # which a write that hangs may still be in
        self._writing = threading.Thread(
            target=lambda: context.run(self._put, percent, description), daemon=True
        )
        self._writing.start()
        if wait:
            self._writing.join(_SECONDS_AT_THE_END)

    def _put(self, percent: float, description: str) -> None:
        try:
            if self._artifact is None:
                made: Any = create_progress_artifact(
                    percent, key=self._key, description=description
                )
                self._artifact = made
            else:
                update_progress_artifact(self._artifact, percent, description=description)
        except Exception as error:  # whatever is wrong with a view, the stage goes on
            _logger().warning("progress artifact %s was not written: %s", self._key, error)


def _logger() -> Any:
    try:
        return get_run_logger()
    except MissingContextError:  # a stage's body that was called without Prefect
        return logging.getLogger(__name__)
