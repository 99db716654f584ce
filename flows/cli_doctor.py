"""`selftrain doctor`: what a run needs, looked at before it needs it."""

import os
from typing import Annotated

import typer

from flows.cli_errors import FAILED, reporting_errors
from flows.cli_options import Json, Store, print_json


@reporting_errors
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or a recipe; without: what needs none.")
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Check store, credentials, data, Prefect server, devices, disks and versions.

    Each line is ok, warn or fail and says what to do. Small objects are written to the store and
    deleted again; nothing else is changed. Exit code 1 if a line fails.

    Example: `selftrain doctor mine.yaml --store s3://bucket/selftrain`
    """
    # First, because it sets Prefect's defaults before Prefect is imported.
    import flows.running  # noqa: F401
    from flows.checks import checks_to_json
    from flows.doctoring import examine
    from flows.loading import load_config
    from flows.terminal_checks import print_checks

    loaded = None if config is None else load_config(config)
    configured = None if loaded is None else loaded.store
    found = examine(loaded, store or configured or os.environ.get("SELFTRAIN_STORE") or None)
    answer = checks_to_json(found)
    if as_json:
        print_json(answer)
    else:
        print_checks(found)
    if not answer["ok"]:
        raise typer.Exit(FAILED)
