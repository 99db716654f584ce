"""`selftrain init`: from data to a config that explains itself."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Json, print_json


@reporting_errors
def init(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|CORPUS",
            help="Images: a folder (CLASS/image.jpg, unlabelled ones directly in it, or train/ and"
            " unlabeled/ above), a table of path,label, an archive. Or shards: a folder, a brace"
            " pattern, a list (.txt) or an index (.json).",
        ),
    ],
    labels: Annotated[
        str | None,
        typer.Option(help="Labelled images or shards; the source is then the corpus to label."),
    ] = None,
    dev: Annotated[str | None, typer.Option(help="Shards of the dev split.")] = None,
    test: Annotated[str | None, typer.Option(help="Shards of the test split.")] = None,
    labels_per_class: Annotated[
        int | None,
        typer.Option(min=1, help="Use so many labels of each class, as if others had none."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The config to write.")] = Path("mine.yaml"),
    shards: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL for shards made of images; default: beside the config,"
            " `<its name>-shards`."
        ),
    ] = None,
    store: Annotated[
        str, typer.Option(help="Folder or URL of the store.", envvar="SELFTRAIN_STORE")
    ] = "./selftrain-store",
    force: Annotated[bool, typer.Option("--force", help="Replace a config that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Look at your data and write a config in which every choice is explained.

    Images are made into shards first, with the labels drawn into labelled, dev and (from 500 labels
    on) test. Shards are read once to count them. Then a few images are looked at, and the network
    that is chosen is timed on this machine. After Ctrl-C the same command goes on.

    Example: `selftrain init photos/` and then `selftrain plan mine.yaml`

    Shards: `selftrain init "s3://bucket/new-{000..099}.tar" --labels labelled-photos/`
    """
    from flows.first_shards import Hints
    from flows.initializing import initialize
    from flows.terminal import print_first_look, showing_progress

    hints = Hints(labels=labels, dev=dev, test=test, labels_per_class=labels_per_class)
    with showing_progress():
        made = initialize(source, hints, out=out, shards=shards, store_url=store, replace=force)
    if as_json:
        print_json(made.to_json())
    else:
        print_first_look(made)
