"""Commands that have runs start by themselves: `selftrain deploy` and `selftrain serve`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Config, Json, Name, Sets, Store, print_json, store_url

if TYPE_CHECKING:
    from flows.config import SelfTrainingConfig


@reporting_errors
def deploy(
    config: Config,
    pool: Annotated[
        str, typer.Option(help="Work pool of runs, labelling, training and evaluation.")
    ] = "selftrain",
    cpu_pool: Annotated[
        str | None,
        typer.Option(help="Work pool of what needs no accelerator; default: that of --pool."),
    ] = None,
    pool_type: Annotated[
        str,
        typer.Option(
            help="Type of the pools. A process pool that is not there is made; for any other type"
            " the command is named."
        ),
    ] = "process",
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of all workers together: makes the concurrency limit `gpu`, by which runs"
            " that share machines take turns when they label; default: it stays as it is.",
        ),
    ] = None,
    with_automations: Annotated[
        bool,
        typer.Option(
            "--with-automations/--no-automations",
            help="Have the server notice lost machines, start crashed runs again, alert people.",
        ),
    ] = True,
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK",
            help="Prefect block for alerts, as `<type>/<name>`: slack-webhook/ops; default: the"
            " config's `alert.notify`, else alerts are shown in the UI alone.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL of the store; else the config's, else what SELFTRAIN_STORE is on"
            " each worker."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the deployments and of their runs.")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Deploy a config to Prefect work pools: the whole run on its schedule, and each stage alone.

    Done again, it brings the deployments up to date. The Prefect server is that of PREFECT_API_URL.

    Example: `selftrain deploy nightly.yaml --pool gpu --cpu-pool cpu`
    """
    from flows import running  # noqa: F401  (sets Prefect's environment before it is used)
    from flows.deploying import Pools
    from flows.deploying import deploy as deploy_to
    from flows.loading import load_config
    from flows.terminal_deploy import print_deployed

    sets = [*(sets or []), *([] if notify is None else [f"alert.notify={notify}"])]
    loaded = load_config(config, overrides=sets, name=name)
    if store is not None:
        loaded = loaded.model_copy(update={"store": store_url(store)})
    pools = Pools(pool, cpu_pool or pool, pool_type, gpus)
    deployed = deploy_to(loaded, pools, with_automations=with_automations)
    if as_json:
        print_json(deployed.to_json())
    else:
        print_deployed(deployed)


@reporting_errors
def serve(
    config: Config,
    cron: Annotated[
        str | None,
        typer.Option(help='When to run, e.g. "0 2 * * *"; default: the config\'s `schedule`.'),
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="Of the schedule.")] = None,
    store: Store = None,
    name: Name = None,
    sets: Sets = None,
) -> None:
    """Run a config on a schedule on this machine, until Ctrl-C. Each run has a name of its own.

    Example: `selftrain serve nightly.yaml --cron "0 2 * * *" --timezone Europe/Berlin`
    """
    from flows.serving import serve_on_schedule

    loaded = _scheduled(config, sets or [], name, cron, timezone)
    url = store_url(store, loaded.store)
    serve_on_schedule(loaded.model_copy(update={"store": url}))


def _scheduled(
    config: str, sets: list[str], name: str | None, cron: str | None, timezone: str | None
) -> "SelfTrainingConfig":
    """Return the config under the schedule that the options give in the place of its own."""
    from flows.loading import load_config

    if cron is not None:
        # A rule of the config's gives way; its other settings stay.
        rules = {"interval_seconds": "null", "rrule": "null", "cron": json.dumps(cron)}
        sets = [*sets, *(f"schedule.{key}={value}" for key, value in rules.items())]
    if timezone is not None:
        sets = [*sets, f"schedule.timezone={timezone}"]
    return load_config(config, overrides=sets, name=name)
