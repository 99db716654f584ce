"""Long-running commands: a schedule on one machine, and the UI of past runs."""

import sys
from contextlib import suppress
from typing import Any

from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows import running  # noqa: F401  (sets Prefect's environment before it is used)
from flows.config import SelfTrainingConfig
from flows.self_training import self_training
from flows.server import prefect_server, start_server_process, wait_until_healthy
from flows.terminal import err
from tasks.children import stop_process_group


def serve_on_schedule(config: SelfTrainingConfig, *, cron: str, timezone: str) -> None:
    """Start a run at every tick of the schedule, in processes of this machine, until Ctrl-C.

    The flow is named by its module, so that its processes import what this one imported.
    """
    parameters: dict[str, Any] = {"config": config.model_dump(mode="json", by_alias=True)}
    with prefect_server() as server:
        err.print(f"Prefect UI: {server.ui_url}", highlight=False)
        err.print(f"{config.name}: {cron} ({timezone}); Ctrl-C ends it", highlight=False)
        self_training.serve(
            name=config.name,
            schedule=Cron(cron, timezone=timezone),
            parameters=parameters,
            entrypoint_type=EntrypointType.MODULE_PATH,
            print_starting_message=False,
        )


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
