"""What a Prefect server takes, and a warning before a run would ask for more."""

from collections.abc import Sequence

from flows.config import SelfTrainingConfig
from flows.planning import PlannedStage

MAX_TASK_RUNS = 1_000
"""Task runs of one stage that a server takes with room to spare, however fast they come, on SQLite
and on Postgres: its queues hold the events of 3,000, and of bursts of 5,000 a tenth to a fifth was
dropped (benchmarks/task_runs.py)."""


def warnings_of(stages: Sequence[PlannedStage], config: SelfTrainingConfig) -> list[str]:
    """Return what should be said before a run is started, in words; empty where all is well."""
    size = config.labeling.shards_per_task
    if size == "auto":
        return []  # at most a hundred groups, or one a worker
    warnings: list[str] = []
    for stage in stages:
        if stage.kind != "label" or stage.shards is None:
            continue
        task_runs = -(-(stage.shards - (stage.shards_done or 0)) // size)
        if task_runs > MAX_TASK_RUNS:
            least = -(-(stage.shards - (stage.shards_done or 0)) // MAX_TASK_RUNS)
            warnings.append(
                f"round {stage.round_index}, label: {task_runs:,} task runs of {size} shards; above"
                f" {MAX_TASK_RUNS:,} a Prefect server may drop some, so that its UI shows less than"
                " was done (the store does not): set labeling.shards_per_task to auto, or to"
                f" {least} or more"
            )
    return warnings
