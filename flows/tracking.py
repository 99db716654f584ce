"""Tell the trackers of a config what a run has measured; one that is down costs the run nothing."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from importlib.util import find_spec
from typing import Any, assert_never

from prefect import get_run_logger

from flows.config_leaves import leaves_of
from flows.loading import ConfigError
from flows.opening import MACHINE_SETTINGS, OpenRun
from flows.run_status import RunStatus, read_status
from storage.checkpoints import Checkpoint, newest_checkpoint
from storage.runs import append_event
from tasks.tracked_metrics import Series, tracked_series
from tasks.tracker_config import MlflowTracker, TensorBoardTracker, TrackerConfig
from tasks.tracker_mlflow import MlflowRun
from tasks.tracker_tensorboard import TensorBoardRun

_MAX_MESSAGE = 500
# Between looks for a new checkpoint of the training that goes on.
_SECONDS_BETWEEN_LOOKS = 15.0
_USER_INFO = re.compile(r"//[^/@\s]*@")

_Write = Callable[[list[Series], RunStatus], Any]


class TrackerMissing(ImportError):
    """The package of a tracker is not installed."""


def refuse_trackers_without_effect(run: OpenRun) -> None:
    """Refuse trackers that nothing could be written to, before anything is computed.

    Raises: TrackerMissing, with the command that installs it; ConfigError without an address.
    """
    for tracker in run.config.trackers:
        if find_spec(tracker.kind) is None:
            raise TrackerMissing(
                f"trackers: kind={tracker.kind} needs a package that is not installed: pip install"
                f" 'selftrain[{tracker.kind}]', or leave it out (--set trackers=[])"
            )
        if (
            isinstance(tracker, MlflowTracker)
            and tracker.uri is None
            and not os.environ.get("MLFLOW_TRACKING_URI")
        ):
            raise ConfigError(
                "trackers: kind=mlflow has no uri, and MLFLOW_TRACKING_URI is not set: give one of"
                " them"
            )


class Trackers:
    """The trackers of one attempt at a run."""

    def __init__(self, run: OpenRun) -> None:
        """Reach none of them yet."""
        self._run = run
        self._writers = [(one, _writer(run, one)) for one in run.config.trackers]
        self._lock = threading.Lock()  # writers remember what they have written

    def publish(self) -> None:
        """Bring every tracker up to date with the store.

        One that fails is warned of, and counted by an event of the run; what it lacks is written
        the next time.
        """
        run = self._run
        for tracker, write in self._writers:
            try:
                self._bring_up_to_date(write)
            # Whatever a tracker's library raises: the run does not depend on it.
            except Exception as error:
                message = _warn(tracker, error)
                append_event(
                    run.store,
                    run.name,
                    "tracker_failed",
                    tracker=tracker.kind,
                    error=type(error).__name__,
                    message=message,
                )

    @contextmanager
    def following(self, fingerprint: str) -> Iterator[None]:
        """Bring the trackers up to date with every checkpoint that a training writes in this block.

        A thread does it: neither the training nor the run waits. A tracker that fails is warned of
        and left alone until the next `publish`.
        """
        if not self._writers:
            yield
            return
        has_ended = threading.Event()
        context = copy_context()  # of the flow, for its log
        threading.Thread(
            target=lambda: context.run(self._follow, fingerprint, has_ended),
            name="trackers",
            daemon=True,
        ).start()
        try:
            yield
        finally:
            has_ended.set()

    def _follow(self, fingerprint: str, has_ended: threading.Event) -> None:
        writers, step_told = list(self._writers), 0
        while writers and not has_ended.wait(_SECONDS_BETWEEN_LOOKS):
            found: Checkpoint | None = None
            try:
                found = newest_checkpoint(self._run.store, fingerprint, verify=False)
            except Exception as error:  # the training itself says what is wrong with the store
                get_run_logger().warning("no checkpoint to tell trackers of: %s", error)
            if found is None or found.step <= step_told:
                continue
            step_told = found.step
            for one in tuple(writers):
                tracker, write = one
                try:
                    self._bring_up_to_date(write)
                except Exception as error:  # as above
                    _warn(tracker, error)
                    writers.remove(one)

    def _bring_up_to_date(self, write: _Write) -> None:
        with self._lock:
            status = read_status(self._run.store, self._run.name)
            write(tracked_series(self._run.store, status.to_json()), status)


def _warn(tracker: TrackerConfig, error: Exception) -> str:
    """Log that a tracker could not be told, and return why."""
    message = without_credentials(_first_line(error))[:_MAX_MESSAGE]
    get_run_logger().warning(
        "metrics did not reach %s (%s: %s); the run goes on, and they are written after the next"
        " round",
        *(tracker.kind, type(error).__name__, message),
    )
    return message


def _first_line(error: Exception) -> str:
    """Return it as text that an event can hold: a path may have bytes that are no UTF-8."""
    return str(error).split("\n")[0].encode("utf-8", "replace").decode()


def without_credentials(text: str) -> str:
    """Return the text without user names and passwords in its URLs."""
    return _USER_INFO.sub("//", text)


def _writer(run: OpenRun, tracker: TrackerConfig) -> _Write:
    match tracker:
        case TensorBoardTracker():
            files = TensorBoardRun(tracker.path / run.name)
            return lambda series, status: files.write(series)
        case MlflowTracker():
            there = MlflowRun(tracker, store=run.store.url, run=run.name, params=_params(run))
            return lambda series, status: there.write(
                series, state=status.state, tags=_tags(status)
            )
        case _ as unreachable:
            assert_never(unreachable)


def _params(run: OpenRun) -> dict[str, Any]:
    """Return the config without what another attempt may change."""
    stored = run.config.model_dump(mode="json", by_alias=True)
    left_out = {"schema", "name", "store", *MACHINE_SETTINGS}
    return dict(leaves_of({key: value for key, value in stored.items() if key not in left_out}))


def _tags(status: RunStatus) -> dict[str, str]:
    facts = {
        "selftrain.report": status.report_url,
        "selftrain.model": status.model_url,
        "selftrain.stop_reason": status.stop_reason,
    }
    return {name: value for name, value in facts.items() if value is not None}
