"""Retries and concurrency of the Prefect tasks, with the reasons, in one place."""

from typing import Any

from tasks.training import TrainingDiverged, TrainingStopped

# Storage has retried for minutes already when an error gets here (storage/retries.py), so a task's
# own retry is for lost workers and machines that recover: twice, a little apart.
RETRIES = 2
RETRY_DELAY_SECONDS = [5, 30]

# What the user's input or the computation itself causes comes back on every try.
_NEVER = (ValueError, TypeError, KeyError, FileNotFoundError, PermissionError)


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether a failed task may succeed when run again; for `retry_condition_fn`."""
    try:
        state.result()
    except (*_NEVER, TrainingDiverged, TrainingStopped):
        return False
    except Exception as error:
        # The worker's error is text: its last line names the exception's type.
        return not any(name.__name__ in str(error).split("\n")[0] for name in _NEVER)
    return True
