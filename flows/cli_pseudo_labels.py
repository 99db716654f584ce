"""Pseudo-labels on the command line: `selftrain explain`, `label` and `select`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Json, Run, Store, print_json, store_url

Exclude = Annotated[
    str | None, typer.Option(help="Text file of sample keys that are not read, one a line.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]


@reporting_errors
def explain(
    run: Run,
    key: Annotated[
        str, typer.Argument(help="Of an unlabelled image: `SHARD_STEM/WEBDATASET_KEY`.")
    ],
    store: Store = None,
    image: Annotated[
        str | None, typer.Option(help="Also write a picture here (PNG), captioned by round.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Follow one unlabelled image through a run: what it was taken for, kept or rejected, and why.

    Example: `selftrain explain demo unlabeled-000003/00000363 --store ./selftrain-store
    --image why.png`
    """
    from flows.explaining import explain_sample, read_explained_image
    from flows.terminal_samples import captions, print_explanation
    from storage.objects import write_object
    from storage.store import open_store

    opened = open_store(store_url(store))
    found = explain_sample(opened, run, key)
    if image is not None:
        from tasks.report_sample import sample_picture

        data = read_explained_image(opened, found)
        picture = sample_picture(data, title=key, captions=captions(found), where=key)
        write_object(image, picture, "replace")
    if as_json:
        print_json(found.to_json())
    else:
        print_explanation(found)


@reporting_errors
def label(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder or URL that `selftrain export` wrote; or, in the store, a run (its last"
            " promoted model) or a model's fingerprint. Several, joined by commas: an ensemble."
        ),
    ],
    corpus: Annotated[
        str,
        typer.Argument(
            help="Shards: a folder, a brace pattern (s3://b/train-{00000..00099}.tar), a glob, a"
            " list file (.txt) or an index (.json)."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder or URL for the predictions.")],
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL where the work is kept; else the environment's SELFTRAIN_STORE,"
            " else beside the predictions: OUT-store."
        ),
    ] = None,
    exclude: Exclude = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Of the forward pass; default fp32.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a forward pass; default: chosen once.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="How to label, in YAML: the keys of `labeling` in a run's config, such as `view`;"
            " in the place of the two options above."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Where to label: local (a process for each GPU or core), dask or ray, or the keys"
            " of `engine` in a run's config, such as '{kind: dask, address: tcp://host:8786}'."
        ),
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Labelled shards that calibrate: with more than 256 classes, the 10 most probable"
            " are stored; without, all of them."
        ),
    ] = None,
    max_bad_samples: Annotated[
        int, typer.Option(min=0, help="Undecodable images a shard may hold; they are listed.")
    ] = 0,
    log_probs: Annotated[
        bool,
        typer.Option(
            "--log-probs/--no-log-probs",
            help="Write the probabilities of all classes; without them a row is some 40 bytes.",
        ),
    ] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Label shards with a model: no run, no config. OUT gets one Parquet file a shard.

    What is labelled already is not labelled again: after Ctrl-C, or when the corpus has grown, the
    same command goes on.

    Example: `selftrain label ./digits-model "s3://bucket/new-{000..099}.tar" ./labels`
    """
    from flows.config_sections import (
        engine_from_option,
        labeling_from_file,
        labeling_from_options,
    )
    from flows.loading import ConfigError
    from flows.standalone import label_alone, store_beside
    from flows.terminal_pseudo_labels import print_predictions_written
    from storage.store import open_store

    has_dev = dev is not None
    if config is None:
        how = labeling_from_options(precision=precision, batch_size=batch_size, has_dev=has_dev)
    elif precision is None and batch_size is None:
        how = labeling_from_file(config, has_dev=has_dev)
    else:
        raise ConfigError(f"--config {config} says how to label: write the other options there")
    url = store or os.environ.get("SELFTRAIN_STORE") or store_beside(out)
    written = label_alone(
        open_store(url, check_writable=True),
        model,
        corpus,
        out,
        config=how,
        engine=engine_from_option(engine),
        dev=dev,
        exclude=exclude,
        device=device,
        max_bad_samples=max_bad_samples,
        has_log_probs=log_probs,
    )
    if as_json:
        print_json(written.to_json(out))
    else:
        print_predictions_written(out, written)


@reporting_errors
def select(
    predictions: Annotated[str, typer.Argument(help="Folder or URL that `selftrain label` wrote.")],
    out: Annotated[str, typer.Argument(help="Folder or URL for the pseudo-labels.")],
    confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Lowest that is kept; default 0.3.")
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Pseudo-labels of each class, copies counted.")
    ] = None,
    balance: Annotated[
        Literal["none", "top_k", "ns_binned", "cap_min"] | None,
        typer.Option(help="Default: top_k with --per-class, else none."),
    ] = None,
    max_copies: Annotated[
        int | None, typer.Option(min=1, help="Of an image of a class with too few; default 10.")
    ] = None,
    debias: Annotated[
        Literal["none", "logit_adjust", "distribution_alignment"] | None,
        typer.Option(
            help="Take a class bias out; distribution_alignment aligns to --labeled, else to"
            " uniform."
        ),
    ] = None,
    target: Annotated[
        Literal["soft", "hard"] | None, typer.Option(help="What to learn; default soft.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="All rules, in YAML: the keys of `selection` in a run's config; in the place of"
            " the options above."
        ),
    ] = None,
    allow_collapse: Annotated[
        bool, typer.Option("--allow-collapse", help="Go on although one class dominates.")
    ] = False,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Labelled shards on which confidences are calibrated; default: those of"
            " `selftrain label --dev`. Without either they are not calibrated."
        ),
    ] = None,
    labeled: Annotated[
        str | None, typer.Option(help="Labelled shards whose class shares some rules read.")
    ] = None,
    exclude: Exclude = None,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Write rejected images, too, with the reason.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws that round copies.")] = 0,
    store: Annotated[
        str | None,
        typer.Option(help="Where `selftrain label` kept its work; default: what it wrote down."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Select pseudo-labels from what `selftrain label` wrote. OUT gets one Parquet file a shard.

    Example: `selftrain select ./labels ./pseudo-labels --confidence 0.8 --per-class 1000
    --dev shards/dev`
    """
    from flows.config_sections import rules_from_file, rules_from_options
    from flows.loading import ConfigError
    from flows.standalone import read_labels, select_alone
    from flows.terminal_pseudo_labels import print_selection_written
    from storage.store import open_store

    has_dev = dev is not None or read_labels(predictions)["dev"] is not None
    options = (confidence, per_class, balance, max_copies, debias, target)
    if config is not None:
        if allow_collapse or any(option is not None for option in options):
            raise ConfigError(f"--config {config} holds all rules: write the other options there")
        rules = rules_from_file(config, has_dev=has_dev)
    else:
        rules = rules_from_options(
            confidence=confidence,
            per_class=per_class,
            max_copies=max_copies,
            balance=balance,
            debias=debias,
            target=target,
            allow_collapse=allow_collapse,
            has_dev=has_dev,
            has_labeled=labeled is not None,
        )
    written = select_alone(
        predictions,
        out,
        store=None if store is None else open_store(store),
        config=rules,
        dev=dev,
        labeled=labeled,
        exclude=exclude,
        seed=seed,
        device=device,
        has_rejected=rejected,
    )
    if as_json:
        print_json(written.to_json(out))
    else:
        print_selection_written(out, written)
