"""From the schedule of a config to what Prefect takes."""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.schedules import Schedule

from flows.loading import ConfigError
from flows.operating_config import ScheduleConfig


def prefect_schedule(config: ScheduleConfig) -> Schedule | None:
    """Return the schedule, None where runs do not start by themselves.

    Raises: ConfigError for a cron expression or recurrence rule that cannot be read.
    """
    if not config.is_set:
        return None
    seconds = config.interval_seconds
    try:
        return Schedule(
            cron=config.cron,
            interval=None if seconds is None else timedelta(seconds=seconds),
            rrule=config.rrule,
            timezone=config.timezone,
            anchor_date=datetime(2020, 1, 1, tzinfo=ZoneInfo(config.timezone)),
            active=config.active,
        )
    except ValueError as error:
        key = "cron" if config.cron is not None else "rrule"
        value = getattr(config, key)
        raise ConfigError(f"schedule.{key} = {value!r} cannot be read: {error}") from None


def one_at_a_time(config: ScheduleConfig) -> ConcurrencyLimitConfig:
    """Return the limit on runs of one deployment: a second one waits, or is cancelled."""
    strategies = {
        "wait": ConcurrencyLimitStrategy.ENQUEUE,
        "cancel": ConcurrencyLimitStrategy.CANCEL_NEW,
    }
    return ConcurrencyLimitConfig(limit=1, collision_strategy=strategies[config.overlap])


def in_words(config: ScheduleConfig) -> str:
    """Return the schedule as a person reads it: `cron 0 2 * * * (Europe/Berlin)`."""
    if not config.is_set:
        return "none"
    if config.cron is not None:
        rule = f"cron {config.cron}"
    elif config.rrule is not None:
        rule = f"rrule {config.rrule}"
    else:
        rule = f"every {config.interval_seconds:g} s"
    return f"{rule} ({config.timezone})" + ("" if config.active else ", switched off")
