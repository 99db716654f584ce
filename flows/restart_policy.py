"""Whether a run that crashed is started again: by what the store shows that it has achieved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.operating_config import RestartConfig
from storage.addresses import prediction_folder
from storage.checkpoints import newest_checkpoint
from storage.runs import read_events
from storage.store import Store
from tasks.specifications import folder_of, read_result

Marks = dict[str, list[int]]
"""What a run has achieved, by stage: [1, 0] where it is committed, else [0, n] with the steps of
its newest checkpoint or the shards that it has recorded."""

_MARK_LENGTH = 16  # digits of a fingerprint, enough to tell the stages of one run apart


@dataclass(frozen=True)
class Restart:
    """The run is started again.

    Attributes:
        number: 1 for the first restart after progress, 2 for the next without any, ...
        delay_seconds: to wait before.
    """

    number: int
    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """The run is not started again.

    Attributes:
        restarts: in a row that brought no progress.
    """

    restarts: int


def decide(
    events: Sequence[Mapping[str, Any]], marks: Marks, policy: RestartConfig
) -> Restart | GiveUp:
    """Return what to do with a run that has just crashed.

    A run that was given up and has crashed again was started by somebody since: it is counted anew.

    Args:
        events: of the run, in order.
        marks: what it has achieved by now.
        policy: how often, and how far apart.
    """
    ours = [e for e in events if e["type"] in ("run_restarted", "run_given_up")]
    last = ours[-1] if ours else None
    number = 1
    if (
        last is not None
        and last["type"] == "run_restarted"
        and not has_progressed(last["progress"], marks)
    ):
        number = last["number"] + 1
    if number > policy.max_restarts:
        return GiveUp(number - 1)
    delay = policy.delay_seconds * 2.0 ** (number - 1)
    return Restart(number, min(delay, policy.max_delay_seconds))


def has_progressed(before: Mapping[str, Sequence[int]], now: Marks) -> bool:
    """Return whether any stage has more to show than it had."""
    return any(list(mark) > list(before.get(stage, (0, 0))) for stage, mark in now.items())


def progress_marks(store: Store, name: str) -> Marks:
    """Return what a run has achieved, by the stages that its events name; empty before its first.

    What other runs did for the same stages counts as well: it need not be done again.
    """
    stages: dict[str, dict[str, Any]] = {}
    for event in read_events(store, name):
        if event["type"] in ("stage_referenced", "stage_done"):
            stages.setdefault(event["fingerprint"], {}).update(event)
    return {
        fingerprint[:_MARK_LENGTH]: _mark(store, stage) for fingerprint, stage in stages.items()
    }


def _mark(store: Store, stage: Mapping[str, Any]) -> list[int]:
    kind, fingerprint = stage["kind"], stage["fingerprint"]
    if read_result(store, kind, fingerprint) is not None:
        return [1, 0]
    if kind == "train":
        checkpoint = newest_checkpoint(store, fingerprint, verify=False)
        return [0, 0 if checkpoint is None else checkpoint.step]
    folder = f"{folder_of(kind, fingerprint)}/shards"
    if kind == "label" and "labeler" in stage:  # events of earlier versions do not name it
        folder = prediction_folder(stage["labeler"])
    return [0, sum(path.endswith(".json") for path in store.list(folder))]
