"""Prefect's runner in a process of its own: `python -m flows.serving_process`, config on stdin."""

import json
import sys
import warnings

from prefect.types.entrypoint import EntrypointType

from flows import running  # noqa: F401  (sets Prefect's environment before it is used)
from flows.deploying import run_parameters
from flows.loading import parse_config
from flows.schedules import one_at_a_time, prefect_schedule
from flows.self_training import self_training


def main() -> None:
    """Serve the flow until SIGTERM.

    The flow is named by its module, so that its processes import what this one imported.
    """
    # What Prefect's own SIGTERM handler does in this loop (3.8.8); the caller stops the runs.
    warnings.filterwarnings("ignore", "coroutine 'Runner.astop' was never awaited")
    config = parse_config(json.load(sys.stdin), where="the order of `selftrain serve`")
    self_training.serve(
        name=config.name,
        schedule=prefect_schedule(config.schedule),
        global_limit=one_at_a_time(config.schedule),
        parameters=run_parameters(config),
        entrypoint_type=EntrypointType.MODULE_PATH,
        print_starting_message=False,
    )


if __name__ == "__main__":
    main()
