"""Long-running commands: a schedule on one machine, and the UI of past runs."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

from prefect.settings import get_current_settings

from flows import running  # noqa: F401  (sets Prefect's environment before it is used)
from flows.config import SelfTrainingConfig
from flows.loading import ConfigError
from flows.schedules import in_words, prefect_schedule
from flows.server import prefect_server, start_server_process, wait_until_healthy
from flows.terminal import err
from tasks.children import die_with_parent, stop_process_group

# A run that is being stopped writes its checkpoint within this time.
_STOP_GRACE_SECONDS = 60


class SchedulerEnded(RuntimeError):
    """The process that starts runs has ended by itself."""


def serve_on_schedule(config: SelfTrainingConfig) -> None:
    """Start a run at every tick of its schedule, in processes of this machine, until Ctrl-C.

    Prefect's runner has a process of its own (flows/serving_process.py): interrupted while a run is
    going on, it waits for ever (3.8.8). Here it and its runs get SIGTERM, upon which a run writes
    its checkpoint, and what is left after a minute is killed.

    Raises: ConfigError for a schedule that cannot be read, or starts nothing; SchedulerEnded, if
        that process ends by itself.
    """
    if prefect_schedule(config.schedule) is None or not config.schedule.active:
        raise ConfigError(
            f"run {config.name!r} has no schedule that is active: give --cron, or set one of"
            " schedule.cron, schedule.interval_seconds, schedule.rrule"
        )
    with prefect_server() as server:
        err.print(f"Prefect UI: {server.ui_url}", highlight=False)
        err.print(f"{config.name}: {in_words(config.schedule)}; Ctrl-C ends it", highlight=False)
        signal.signal(signal.SIGTERM, _raise_interrupt)
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serving_process"],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(config.model_dump_json(by_alias=True).encode())
            code = process.wait()
        except KeyboardInterrupt:
            return
        finally:
            # Its runs are in its group and may outlive it.
            stop_process_group(process, grace_seconds=_STOP_GRACE_SECONDS, until_empty=True)
        raise SchedulerEnded(f"the process that starts runs ended with exit code {code}")


def _raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def serve_ui(*, port: int, run_id: str | None) -> None:
    """Serve the Prefect UI on the database of this machine's runs until Ctrl-C."""
    process = start_server_process(port, sys.stderr)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/api", process, log_path=None)
        path = "" if run_id is None else f"/runs/flow-run/{run_id}"
        err.print(
            f"Prefect UI: http://127.0.0.1:{port}{path}   (Ctrl-C ends it)",
            highlight=False,
            soft_wrap=True,
        )
        with suppress(KeyboardInterrupt):
            process.wait()
    finally:
        stop_process_group(process, grace_seconds=10)
