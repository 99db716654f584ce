"""What a plan costs in all: device-hours and bytes of the stages that are still to do."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flows.planning import PLAN_SCHEMA, PlannedStage


@dataclass(frozen=True)
class PlanTotals:
    """Sums over the stages of a plan.

    Attributes:
        stages: all of them.
        to_compute: those that are not reused.
        unmeasured: those to compute of which no finished stage of the run tells a rate; they are
            in no sum of seconds.
        estimated_seconds: one stage after the other.
        estimated_device_seconds: time of all devices together.
        estimated_bytes: to be written and kept.
        read_bytes: of shards, without a cache.
        read_bytes_cached: of shards, with one.
    """

    stages: int
    to_compute: int
    unmeasured: int
    estimated_seconds: float
    estimated_device_seconds: float
    estimated_bytes: int
    read_bytes: int
    read_bytes_cached: int


def totals_of(stages: Sequence[PlannedStage]) -> PlanTotals:
    """Add up a plan."""
    to_compute = [stage for stage in stages if stage.state != "reused"]
    return PlanTotals(
        stages=len(stages),
        to_compute=len(to_compute),
        unmeasured=sum(stage.estimated_seconds is None for stage in to_compute),
        estimated_seconds=sum(stage.estimated_seconds or 0.0 for stage in to_compute),
        estimated_device_seconds=sum(stage.estimated_device_seconds or 0.0 for stage in to_compute),
        estimated_bytes=sum(stage.estimated_bytes or 0 for stage in to_compute),
        read_bytes=sum(stage.read_bytes for stage in to_compute),
        read_bytes_cached=sum(stage.read_bytes_cached for stage in to_compute),
    )


def plan_to_json(stages: Sequence[PlannedStage], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return the documented form, schema 1."""
    return {
        "schema": PLAN_SCHEMA,
        "stages": [asdict(stage) for stage in stages],
        "totals": asdict(totals_of(stages)),
        "warnings": list(warnings),
    }
