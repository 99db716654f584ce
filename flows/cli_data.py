"""`selftrain data ...`: from images to shards, and from shards to an index."""

from typing import Annotated, Any

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Json, print_json

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make WebDataset shards of images, and index shards that exist.",
)

Out = Annotated[str, typer.Argument(help="Folder or URL below which shards are written.")]
ShardSize = Annotated[int, typer.Option(help="Images in a shard.")]
Seed = Annotated[int, typer.Option(help="Of the draw; the same seed gives the same bytes.")]


@data_app.command()
@reporting_errors
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help="An ImageFolder tree (CLASS/image.jpg), a .csv or .parquet table of path,label,"
            " or a tar archive of a tree."
        ),
    ],
    out: Out,
    labels_per_class: Annotated[
        int | None, typer.Option(help="Labelled images of each class.")
    ] = None,
    labels: Annotated[int | None, typer.Option(help="Labelled images in all.")] = None,
    dev: Annotated[int, typer.Option(help="Images of the dev split.")] = 500,
    test: Annotated[int, typer.Option(help="Images of the test split.")] = 0,
    shard_size: ShardSize = 1000,
    seed: Seed = 0,
    balanced: Annotated[
        bool, typer.Option("--balanced/--as-found", help="Draw evenly over classes, or at random.")
    ] = True,
    split: Annotated[
        str | None, typer.Option(help="Use this split of the source (train/CLASS/...).")
    ] = None,
    test_split: Annotated[
        str | None, typer.Option(help="Take the test images from this split of the source.")
    ] = None,
    keep_truth: Annotated[
        bool,
        typer.Option(help="Keep known labels in unlabelled shards, for diagnosis only."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Shard images into labeled/, dev/, test/ and unlabeled/.

    Example: `selftrain data shard photos/ shards/ --labels-per-class 100 --dev 500 --test 2000`
    """
    from tasks.sharding import shard_dataset
    from tasks.sources import read_source

    summary = shard_dataset(
        read_source(source, split=split),
        out,
        labels_per_class=labels_per_class,
        labels=labels,
        dev=dev,
        test=None if test_split is not None and test == 0 else test,
        test_images=None if test_split is None else read_source(source, split=test_split),
        shard_size=shard_size,
        seed=seed,
        balanced=balanced,
        keep_truth=keep_truth,
        progress=_progress("shard", "images"),
    )
    _print_summary(summary, out, as_json)


@data_app.command()
@reporting_errors
def cifar10(
    source: Annotated[
        str,
        typer.Argument(
            help="An archive with train/CLASS/image.jpg and test/CLASS/image.jpg, or"
            " cifar10[:FOLDER] to let torchvision download it."
        ),
    ],
    out: Out,
    labels_per_class: Annotated[int, typer.Option(help="Labelled images of each class.")] = 350,
    dev: Annotated[int, typer.Option(help="Images of the dev split.")] = 500,
    shard_size: ShardSize = 1000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Shard CIFAR-10 for the recipe `cifar10`: by default 3,500 labels + 500 dev = 4,000.

    Example: `selftrain data cifar10 cifar10-jpeg.tar.gz selftrain-data/cifar10`
    """
    from tasks.sharding import shard_dataset
    from tasks.sources import read_source

    summary = shard_dataset(
        read_source(source, split="train"),
        out,
        labels_per_class=labels_per_class,
        dev=dev,
        test_images=read_source(source, split="test"),
        shard_size=shard_size,
        seed=seed,
        progress=_progress("shard", "images"),
    )
    _print_summary(summary, out, as_json)


@data_app.command()
@reporting_errors
def index(
    shards: Annotated[
        str,
        typer.Argument(
            help="A folder, a brace pattern (s3://b/train-{00000..00099}.tar), a glob, or a list"
            " file (.txt)."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Where to write the index; default: index.json beside the first shard."),
    ] = None,
    store: Annotated[str | None, typer.Option(help="Also record the corpus in this store.")] = None,
    verify: Annotated[bool, typer.Option(help="Read every shard again.")] = False,
    workers: Annotated[int, typer.Option(help="Shards read at a time.")] = 8,
    as_json: Json = False,
) -> None:
    """Index shards: count and checksum each one. Unchanged shards are not read again.

    Example: `selftrain data index "s3://bucket/train-{00000..00099}.tar" --out train.json`
    """
    from storage.corpus import save_corpus
    from storage.indexing import (
        corpus_from_index,
        index_shards,
        read_index,
        sorted_by_class,
        write_index,
    )
    from storage.patterns import expand_shards
    from storage.store import open_store

    urls = expand_shards(shards)
    target = out or f"{urls[0].rpartition('/')[0]}/index.json"
    found = index_shards(
        urls,
        previous=read_index(target),
        verify=verify,
        workers=workers,
        progress=_progress("index", "shards"),
        save=lambda partial: write_index(target, partial),
    )
    write_index(target, found)
    corpus, locations = corpus_from_index(found)
    if store is not None:
        save_corpus(open_store(store, check_writable=True), corpus, locations)
    warning = sorted_by_class(found.shards)
    facts: dict[str, Any] = {
        "schema": 1,
        "index": target,
        "corpus": corpus.digest,
        "shards": len(corpus.shards),
        "samples": corpus.num_samples,
        "bytes": corpus.num_bytes,
        "class_names": None if corpus.class_names is None else list(corpus.class_names),
        "label_counts": corpus.label_counts(),
        "warning": warning,
    }
    if as_json:
        print_json(facts)
        return
    typer.echo(f"{facts['shards']} shards, {facts['samples']} samples, {facts['bytes']:,} bytes")
    typer.echo(f"corpus {corpus.digest}")
    typer.echo(f"index  {target}")
    if warning:
        typer.echo(f"warning: {warning}", err=True)


def _progress(stage: str, unit: str) -> Any:
    """Return a callback that shows progress on stderr, at most every other second."""
    import time

    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 2 or done == total:
            last = time.monotonic()
            typer.echo(f"{stage}: {done}/{total} {unit}", err=True)

    return show


def _print_summary(summary: Any, out: str, as_json: bool) -> None:
    splits = {
        name: {
            "samples": split.num_samples,
            "shards": split.num_shards,
            "pattern": split.pattern,
            "classes": split.class_counts,
        }
        for name, split in summary.splits.items()
    }
    if as_json:
        print_json(
            {"schema": 1, "out": out, "class_names": list(summary.class_names), "splits": splits}
        )
        return
    for name, split in splits.items():
        samples, shards = split["samples"], split["shards"]
        typer.echo(f"{name:<10} {samples:>8,} images in {shards:>4} shards  {split['pattern']}")
