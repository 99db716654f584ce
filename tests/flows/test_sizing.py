"""The warning of a plan before a run would ask more of a Prefect server than it records."""

from typing import Any

import pytest

from flows.loading import load_config
from flows.plan_totals import plan_to_json
from flows.planning import PlannedStage
from flows.sizing import warnings_of


def label(shards: int, shards_done: int = 0, **facts: Any) -> PlannedStage:
    values: dict[str, Any] = {"kind": "label", "state": "to_do", "assumed": False, "samples": 1}
    values |= {"round_index": 2, "fingerprint": "f" * 64, "shards": shards} | facts
    return PlannedStage(shards_done=shards_done, **values)


@pytest.mark.parametrize(
    ("shards", "done", "size", "is_warned"),
    [
        (1000, 0, 1, False),
        (1001, 0, 1, True),
        (1001, 1, 1, False),  # the recorded ones are no task runs any more
        (4000, 0, 4, False),
        (4001, 0, 4, True),  # the last group is not full
        (10**6, 0, "auto", False),
    ],
)
def test_more_task_runs_than_a_server_records_are_warned_of(
    shards: int, done: int, size: int | str, is_warned: bool
) -> None:
    config = load_config("demo", overrides=[f"labeling.shards_per_task={size}"])

    assert bool(warnings_of([label(shards, done)], config)) is is_warned


def test_the_warning_names_the_stage_the_number_and_a_size_that_fits() -> None:
    config = load_config("demo", overrides=["labeling.shards_per_task=2"])

    (warning,) = warnings_of([label(30_001), label(30_001, kind="guard")], config)

    # 30,001 shards by 2; in 1,000 groups they are 31 each.
    assert warning.startswith("round 2, label: 15,001 task runs of 2 shards")
    assert "auto, or to 31 or more" in warning
    assert plan_to_json([], [warning])["warnings"] == [warning]
