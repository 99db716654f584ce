"""`selftrain gc`: what no run refers to, listed and then deleted."""

import re
from typing import Annotated

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Json, Store, print_json, store_url

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORT_GRACE = _UNITS["h"]


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r}: a number and s, m, h or d, such as 7d or 12h")
    return float(found[1]) * _UNITS[found[2]]


@reporting_errors
def gc(
    store: Store = None,
    older_than: Annotated[
        str, typer.Option(help="Keep whatever is younger: a number and s, m, h or d.")
    ] = "7d",
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is listed; without it nothing changes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List what no run of the store refers to, and delete it with --delete.

    Kept are results of all runs in the store, what runs under way will need, imported models, and
    whatever is younger than --older-than, with all that it refers to. To give up a run, delete its
    folder runs/NAME first. Before each deletion the runs are read again.

    Example: `selftrain gc --store ./store`, and then `selftrain gc --store ./store --delete`
    """
    from flows.collecting import collect
    from flows.terminal import showing_progress
    from flows.terminal_store import print_garbage
    from storage.store import open_store
    from tasks.progress import Progress, report

    seconds = _seconds(older_than)
    if delete and seconds < _SHORT_GRACE:
        typer.echo(
            f"warning: --older-than {older_than} leaves no time to a run that is being opened, or"
            " to `selftrain label` and `select`: make sure that nothing uses the store",
            err=True,
        )
    with showing_progress():
        found = collect(
            open_store(store_url(store)),
            older_than_seconds=seconds,
            delete=delete,
            progress=lambda done, total: report(Progress("delete", done, total, "units")),
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_garbage(found)
