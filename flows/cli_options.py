"""What the commands share: options, the choice of the store, JSON on stdout."""

import json
import os
import sys
from typing import Annotated, Any

import typer

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Folder or URL of the store; else the config's, else the"
        " environment's SELFTRAIN_STORE.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Run = Annotated[str, typer.Argument(help="Name of the run.")]
Config = Annotated[str, typer.Argument(help="A YAML file, or a recipe: see `selftrain recipes`.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run in the store.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; may be repeated."),
]


def store_url(option: str | None, configured: str | None = None) -> str:
    """Return the store of --store, the config or the environment, in this order.

    Raises: ValueError, before it becomes a parameter that Prefect stores, for a URL that no store
        has, such as one with credentials.
    """
    from storage.file_systems import split_url

    url = option or configured or os.environ.get("SELFTRAIN_STORE")
    if not url:
        raise typer.BadParameter(
            "no store: give --store, set SELFTRAIN_STORE, or `store` in the config"
        )
    split_url(url)
    return url


def print_json(value: dict[str, Any]) -> None:
    """Print a machine-readable answer, the only thing on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
