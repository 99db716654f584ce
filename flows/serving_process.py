"""Prefect's runner in a process of its own: `python -m flows.serving_process`, order on stdin."""

import json
import sys
import warnings

from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows import running  # noqa: F401  (sets Prefect's environment before it is used)
from flows.self_training import self_training


def main() -> None:
    """Serve the flow until SIGTERM.

    The flow is named by its module, so that its processes import what this one imported.
    """
    # What Prefect's own SIGTERM handler does in this loop (3.8.8); the caller stops the runs.
    warnings.filterwarnings("ignore", "coroutine 'Runner.astop' was never awaited")
    order = json.load(sys.stdin)
    self_training.serve(
        name=order["config"]["name"],
        schedule=Cron(order["cron"], timezone=order["timezone"]),
        parameters={"config": order["config"]},
        entrypoint_type=EntrypointType.MODULE_PATH,
        print_starting_message=False,
    )


if __name__ == "__main__":
    main()
