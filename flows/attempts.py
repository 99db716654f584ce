"""One attempt at a run: what is refused before it, and how its beginning and end are recorded."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.exceptions import TerminationSignal

from flows.approvals import WaitingForApproval
from flows.driving import RunDriver
from flows.input_checks import trainings_of
from flows.opening import OpenRun, refuse_without_room
from flows.run_events import DONE, FAILED, STARTED, STOPPED
from flows.tracking import Trackers, refuse_trackers_without_effect
from flows.watching import Watcher
from storage.runs import append_event
from storage.store import conditional_create_works
from tasks.devices import emulates_bf16
from tasks.progress import listening
from tasks.training import TrainingStopped


@contextmanager
def driving(run: OpenRun) -> Iterator[RunDriver]:
    """Yield the driver of a run and record in the store how this attempt began and ended.

    Raises: CacheTooSmall, before anything is computed, if this machine's trainings have no room;
        TrackerMissing and ConfigError for trackers that nothing could be written to.
    """
    refuse_without_room(run.store, run.config, run.pins)  # a resume may be on another machine
    refuse_trackers_without_effect(run)
    trackers = Trackers(run)
    _warn_of_slow_bf16(run)
    append_event(
        run.store,
        run.name,
        "run_started",
        conditional_writes=conditional_create_works(run.store),
    )
    watcher = Watcher(run)
    watcher.tell(STARTED)
    try:
        with listening(watcher.on_progress):
            yield RunDriver(run, watcher, trackers)
        watcher.tell(DONE)
    except WaitingForApproval as error:
        watcher.tell(STOPPED, error=type(error).__name__)
        raise  # recorded with its question
    except (KeyboardInterrupt, SystemExit, TerminationSignal, TrainingStopped) as error:
        append_event(run.store, run.name, "run_stopped", error=type(error).__name__)
        watcher.tell(STOPPED, error=type(error).__name__)
        trackers.publish()
        raise
    except Exception as error:
        message = str(error).split("\n")[0][:1000]
        append_event(run.store, run.name, "run_failed", error=type(error).__name__, message=message)
        watcher.tell(FAILED, error=type(error).__name__, message=message)
        trackers.publish()
        raise


def _warn_of_slow_bf16(run: OpenRun) -> None:
    config = run.config
    trained = (training.precision for _, training in trainings_of(config))
    precisions = {config.labeling.precision, *trained}
    if "bf16" in precisions and emulates_bf16(config.device):
        get_run_logger().warning(
            "precision: bf16 on a CPU without instructions for it is many times slower than fp32;"
            " set precision: fp32, or run on another machine"
        )
