"""When runs of a config start by themselves, and what happens when they crash or stand still.

Read by `selftrain deploy` and `selftrain serve` alone: no stage depends on it, and no run is pinned
to it.
"""

from typing import Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class ScheduleConfig(BaseModel):
    """When runs start; without `cron`, `interval_seconds` and `rrule` somebody starts them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str | None = Field(
        default=None, description='Five fields, such as "0 2 * * *": every night at two.'
    )
    interval_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Time from one start to the next, such as 86400, counted from the"
        " midnight that began 2020, so that deploying again moves nothing.",
    )
    rrule: str | None = Field(
        default=None,
        description='An iCalendar rule, such as "FREQ=WEEKLY;BYDAY=MO,TH;BYHOUR=2;BYMINUTE=0".',
    )
    timezone: str = Field(
        default="UTC",
        description="Whose clock the schedule goes by, in summer as in winter: Europe/Berlin.",
    )
    active: bool = Field(
        default=True, description="false: deployed switched off; the UI switches it on."
    )
    overlap: Literal["wait", "cancel"] = Field(
        default="wait",
        description="What a run of this config does that would start while another one is going"
        " on: wait for its end, or be cancelled.",
    )

    @property
    def is_set(self) -> bool:
        """Whether runs start by themselves."""
        return (self.cron, self.interval_seconds, self.rrule) != (None, None, None)

    @field_validator("timezone")
    @classmethod
    def _is_a_time_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):  # unknown, no name at all, a folder of the database
            raise ValueError("no IANA time zone; one is Europe/Berlin, or UTC") from None
        return value

    @model_validator(mode="after")
    def _one_rule(self) -> "ScheduleConfig":
        rules = {name: getattr(self, name) for name in ("cron", "interval_seconds", "rrule")}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set: a schedule has one rule")
        return self


class RestartConfig(BaseModel):
    """How a deployed run is started again after a crash, a pre-emption or a lost machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_restarts: int = Field(
        default=3,
        ge=0,
        le=100,
        description="Restarts in a row that may bring no progress in the store before the run is"
        " given up; 0: no restarts.",
    )
    delay_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Wait before a restart; doubled for each in a row without progress.",
    )
    max_delay_seconds: float = Field(default=3600.0, ge=0, description="Longest such wait.")
    lost_after_seconds: float = Field(
        default=600.0,
        ge=90,
        description="Silence after which a run counts as crashed. It gives a sign of life four"
        " times as often, every 30 s at most.",
    )

    @property
    def heartbeat_seconds(self) -> int:
        """Time between two signs of life: three may be lost. Prefect sends none below 30 s."""
        return max(30, int(self.lost_after_seconds / 4))


class AlertConfig(BaseModel):
    """What `selftrain deploy` has the Prefect server alert people of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stalled_after_seconds: float = Field(
        default=3600.0,
        ge=600,
        description="Time without any progress of a run that lives, after which it counts as"
        " stalled. Runs tell of their progress every 5 minutes.",
    )
    notify: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="Prefect block that alerts are sent through, as `<type>/<name>`:"
        " slack-webhook/ops, sendgrid-email/ops, webhook/pager; null: alerts are shown in the UI"
        " alone.",
    )
