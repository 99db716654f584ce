"""Two runs on the command line: `selftrain compare`."""

from typing import Annotated

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Json, Store, print_json, store_url


@reporting_errors
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run.")],
    second: Annotated[
        str, typer.Argument(metavar="OTHER", help="Name of another; differences are OTHER - RUN.")
    ],
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Show two runs side by side: what differs in their configs, accuracies, costs, shared stages.

    Differences of accuracy are paired where both were judged on the same images.

    Example: `selftrain compare demo longer --store ./selftrain-store`
    """
    from flows.comparing import compare_runs
    from flows.terminal_comparison import print_comparison
    from storage.store import open_store

    found = compare_runs(open_store(store_url(store)), first, second)
    if as_json:
        print_json(found.to_json())
    else:
        print_comparison(found)
