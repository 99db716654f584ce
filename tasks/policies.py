"""Retries and concurrency of the Prefect tasks, with the reasons, in one place."""

from typing import Any

from storage.predictions import DamagedPredictions
from tasks.guarding import GuardStopped
from tasks.label_processes import LabelWorkerLost
from tasks.label_worker import REFUSALS
from tasks.labeling import LabelingStopped
from tasks.launching import TrainingNotSeen
from tasks.selection_processes import SelectionStopped, SelectionWorkerLost
from tasks.training import TrainingStopped

# Storage has retried for minutes already when an error gets here (storage/retries.py), so a task's
# own retry is for lost workers and machines that recover: twice, a little apart.
RETRIES = 2
RETRY_DELAY_SECONDS: list[float] = [5, 30]

# The concurrency limit of Prefect that a labelling on a GPU takes a slot of, where there is one
# (`prefect gcl create gpu --limit N`): runs that share a machine then take turns at its GPUs.
GPU_LIMIT = "gpu"
# The slot of a run that was killed is free after so long; a living one renews it.
GPU_LEASE_SECONDS = 60

_STOPPED = (TrainingStopped, LabelingStopped, GuardStopped, SelectionStopped)
_LOST = (LabelWorkerLost, SelectionWorkerLost)


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether a failed task may succeed when run again; for `retry_condition_fn`."""
    try:
        state.result()
    except (*REFUSALS, *_STOPPED, TrainingNotSeen, *_LOST, DamagedPredictions):
        return False
    except Exception:
        pass  # whatever else it was, it may have been the machine
    return True
