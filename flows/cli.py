"""The command line: `selftrain --help`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli_approval import approve
from flows.cli_comparison import compare
from flows.cli_data import data_app
from flows.cli_deploy import deploy, serve
from flows.cli_doctor import doctor
from flows.cli_errors import reporting_errors
from flows.cli_gc import gc
from flows.cli_init import init
from flows.cli_options import Config, Json, Name, Run, Sets, Store, print_json, store_url
from flows.cli_pseudo_labels import explain, label, select

# Heavy modules (torch, Prefect) are imported inside the commands: `--help` answers at once.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Self-training (Noisy Student) for image classifiers, end to end.

**Examples**

`selftrain run demo --store ./selftrain-store` — handwritten digits, minutes on two cores

`selftrain init photos/` — look at your images and write a config that explains itself

`selftrain data shard photos/ shards/ --labels-per-class 100 --dev 500` — make shards of a folder

`selftrain run my.yaml --store s3://bucket/selftrain --set student.noise.randaugment.magnitude=9`

`selftrain resume my-run` — go on after a crash, a kill or Ctrl-C

`selftrain label ./my-model shards/ labels/` — pseudo-labels alone, without a run

Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 stopped on request and resumable.""",
)
app.command()(init)
app.add_typer(data_app, name="data")
app.command()(label)
app.command()(select)
app.command()(explain)
app.command()(approve)
app.command()(deploy)
app.command()(serve)
app.command()(gc)
app.command()(doctor)
app.command()(compare)

MachineSets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Where and how to compute, for this attempt: launch, engine, cache, device,"
        " loader_threads, materialize or trackers; may be repeated.",
    ),
]


@app.command()
@reporting_errors
def run(
    config: Config, store: Store = None, name: Name = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Run a config from the first stage that the store does not hold to the last.

    A run of this name and config goes on where it was; with another config it is refused. `launch`,
    `engine`, `cache`, `device`, `loader_threads`, `materialize` and `trackers` may differ: they are
    in no fingerprint.

    Example: `selftrain run cifar10 --store ./store --name first-try --set rounds=2`
    """
    from flows.loading import load_config
    from flows.running import run_and_show

    loaded = load_config(config, overrides=sets or [], name=name)
    run_and_show(loaded.model_copy(update={"store": store_url(store, loaded.store)}), as_json)


@app.command()
@reporting_errors
def resume(run: Run, store: Store = None, sets: MachineSets = None, as_json: Json = False) -> None:
    """Go on with a run: finished stages are found in the store, begun ones continue.

    Example: `selftrain resume demo --store ./selftrain-store`

    On another machine: `selftrain resume my-run --set launch.processes=2 --set cache=null`
    """
    from flows.opening import reopened_config
    from flows.running import run_and_show
    from storage.store import open_store

    opened = open_store(store_url(store))
    config = reopened_config(opened, run, sets or [])
    run_and_show(config.model_copy(update={"store": opened.url}), as_json)


@app.command()
@reporting_errors
def plan(
    config: Config, store: Store = None, name: Name = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Show what a run would compute and what it would find in the store; nothing is trained.

    The corpora are indexed for it, and the demo makes its own.

    Example: `selftrain plan demo --name longer --store ./selftrain-store --set rounds=5`
    """
    from flows.loading import load_config
    from flows.plan_totals import plan_to_json
    from flows.planning import plan_run
    from flows.sizing import warnings_of
    from flows.terminal import print_plan, print_warnings, showing_progress
    from storage.store import open_store

    loaded = load_config(config, overrides=sets or [], name=name)
    opened = open_store(store_url(store, loaded.store))
    with showing_progress():
        stages = plan_run(opened, loaded)
    warnings = warnings_of(stages, loaded)
    if as_json:
        print_json(plan_to_json(stages, warnings))
    else:
        print_plan(stages, loaded.rounds)
        print_warnings(warnings)


@app.command()
@reporting_errors
def status(run: Run, store: Store = None, as_json: Json = False) -> None:
    """Show how far a run is, its accuracies, and where report and model lie.

    Example: `selftrain status demo --store ./selftrain-store --json`
    """
    from flows.run_status import read_status
    from flows.terminal import print_status
    from storage.store import open_store

    found = read_status(open_store(store_url(store)), run)
    if as_json:
        print_json(found.to_json())
    else:
        print_status(found)


@app.command("list")
@reporting_errors
def list_command(store: Store = None, as_json: Json = False) -> None:
    """List the runs of a store with their state and the accuracy of the last promoted model.

    Example: `selftrain list --store s3://bucket/selftrain`
    """
    from flows.run_status import read_status
    from flows.terminal import print_runs
    from storage.runs import list_runs
    from storage.store import open_store

    opened = open_store(store_url(store))
    found = [read_status(opened, name) for name in list_runs(opened)]
    if as_json:
        print_json({"schema": 1, "store": opened.url, "runs": [one.to_json() for one in found]})
    else:
        print_runs(opened.url, found)


@app.command()
@reporting_errors
def report(run: Run, store: Store = None) -> None:
    """Rebuild a run's HTML report and print where it lies.

    Example: `selftrain report demo --store ./selftrain-store`
    """
    from flows.opening import reopen_run
    from flows.views import write_views
    from storage.store import open_store

    typer.echo(write_views(reopen_run(open_store(store_url(store)), run)).report_url)


@app.command()
@reporting_errors
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of them.")],
    store: Store = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    as_json: Json = False,
) -> None:
    """Classify images with a run's model, the last one that was promoted.

    Example: `selftrain predict demo digit.png more-digits/ --store ./selftrain-store`
    """
    from flows.run_status import read_status
    from flows.terminal import print_predictions
    from storage.store import open_store
    from tasks.prediction import predict_files

    opened = open_store(store_url(store))
    fingerprint = read_status(opened, run).model_fingerprint()
    found = predict_files(opened, fingerprint, images, device=device)
    if as_json:
        print_json({"schema": 1, "run": run, "model": fingerprint, "predictions": found})
    else:
        print_predictions(found)


@app.command()
@reporting_errors
def export(
    run: Run, out: Annotated[Path, typer.Argument(help="A new folder.")], store: Store = None
) -> None:
    """Write a run's model to a folder: model.safetensors and model.json.

    Example: `selftrain export demo ./digits-model --store ./selftrain-store`
    """
    from flows.run_status import read_status
    from storage.store import open_store
    from tasks.prediction import export_model

    opened = open_store(store_url(store))
    export_model(opened, read_status(opened, run).model_fingerprint(), out)
    typer.echo(str(out))


@app.command("import")
@reporting_errors
def import_command(
    weights: Annotated[
        str, typer.Argument(help="A .safetensors file, or a state dict that torch saved.")
    ],
    architecture: Annotated[
        str, typer.Option(help='The network, in YAML: "{kind: resnet, name: resnet50}".')
    ],
    classes: Annotated[
        Path, typer.Option(help="Text file: one class name a line, in the order of the outputs.")
    ],
    image_size: Annotated[int, typer.Option(help="Side of the input, pixels.")],
    crop_padding: Annotated[int, typer.Option(help="32 is ImageNet's habit; 0: none.")] = 0,
    interpolation: Annotated[str, typer.Option(help="bilinear or bicubic.")] = "bilinear",
    mean: Annotated[str, typer.Option(help="RGB means in [0, 1].")] = "0.485,0.456,0.406",
    std: Annotated[str, typer.Option(help="RGB standard deviations.")] = "0.229,0.224,0.225",
    store: Store = None,
) -> None:
    """Put a model of yours into a store, to be the first teacher: teacher.kind = given.

    Example: `selftrain import r50.safetensors --architecture "{kind: resnet, name: resnet50}"
    --classes classes.txt --image-size 224 --crop-padding 32 --store ./store`
    """
    from storage.store import open_store
    from tasks.importing import import_model

    opened = open_store(store_url(store), check_writable=True)
    url = import_model(
        opened,
        weights,
        architecture=architecture,
        class_names=classes.read_text(encoding="utf-8").split("\n"),
        image_size=image_size,
        crop_padding=crop_padding,
        interpolation=interpolation,
        mean=mean,
        std=std,
    )
    typer.echo(url)


@app.command()
@reporting_errors
def ui(
    port: Annotated[int, typer.Option(help="Where the UI listens, on this machine only.")] = 4200,
    run_id: Annotated[str | None, typer.Option(help="A flow run to link to.")] = None,
) -> None:
    """Open the Prefect UI on the runs that this machine has made, until Ctrl-C.

    Example: `selftrain ui`
    """
    from flows.serving import serve_ui

    serve_ui(port=port, run_id=run_id)


@app.command()
@reporting_errors
def recipes() -> None:
    """List the recipes that ship with selftrain; `selftrain config NAME` prints one.

    Example: `selftrain recipes`
    """
    from flows.loading import RECIPES_FOLDER, recipe_names

    for name in recipe_names():
        first_line = (RECIPES_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\n")[0]
        typer.echo(f"{name:<24} {first_line.removeprefix('# ')}")


@app.command()
@reporting_errors
def config(config: Config, sets: Sets = None) -> None:
    """Check a config and print all of it, defaults filled in.

    Example: `selftrain config demo --set rounds=5 > my.yaml`
    """
    import yaml

    from flows.loading import load_config

    loaded = load_config(config, overrides=sets or [])
    dumped = loaded.model_dump(mode="json", by_alias=True)
    typer.echo(yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True), nl=False)


def main() -> None:
    """Entry point of the `selftrain` command."""
    # Read when torch is loaded. See tasks/launching.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
