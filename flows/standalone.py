"""Pseudo-labels without a run or a config: what `selftrain label` and `selftrain select` do.

Both keep their work in a store, as runs do, and call the flows of runs: a stop loses at most the
shard in hand, and a corpus that grew costs its new shards.
"""

import re

# First, because it sets Prefect's defaults before Prefect is imported.
import flows.running
from flows.corpora import index_corpus, without_keys
from flows.labeling import label_corpus
from flows.loading import ConfigError
from flows.opening import check_labels
from flows.pseudo_labels import pseudo_labels
from flows.run_status import read_status
from flows.terminal import showing_progress
from models.description import DESCRIPTION_FILE
from storage.corpus import load_corpus, load_locations, save_corpus
from storage.objects import join_url, object_exists
from storage.runs import UnknownRun
from storage.store import Store, open_store
from tasks.classifiers import UnknownModel, model_manifest, read_description
from tasks.devices import DeviceChoice
from tasks.importing import import_exported
from tasks.labeling import LabelingConfig
from tasks.publishing import (
    Publication,
    publish_predictions,
    publish_selection,
    read_publication,
)
from tasks.selection_config import SelectionConfig
from tasks.specifications import read_result

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SAME_COMMAND = "the same command"


def store_beside(out: str) -> str:
    """Return where the store is that nobody named: beside the folder that is written."""
    return f"{out.rstrip('/')}-store"


def model_named(store: Store, model: str) -> str:
    """Return the fingerprint of the model that a user names, in the store.

    Args:
        store: an exported model is copied into it.
        model: folder or URL that `selftrain export` wrote; a run of the store, for the last model
            that it promoted; or a model of the store: its fingerprint or URL.
    Raises: UnknownModel, saying what was looked for.
    """
    named = model.rstrip("/")
    if object_exists(join_url(named, DESCRIPTION_FILE)):
        return import_exported(store, named)
    name = named.rpartition("/")[2]
    if named in (name, f"models/{name}", f"{store.url}/models/{name}"):
        if _FINGERPRINT.fullmatch(name):
            return model_manifest(store, name).fingerprint
        if named == name:
            try:
                return read_status(store, name).model_fingerprint()
            except UnknownRun as error:
                raise UnknownModel(
                    f"MODEL = {model!r} is neither a folder that `selftrain export` wrote (with"
                    f" {DESCRIPTION_FILE}) nor a run: {error}"
                ) from None
    raise UnknownModel(
        f"MODEL = {model!r} holds no {DESCRIPTION_FILE}: name a folder written by `selftrain"
        f" export`, or a run or a model's fingerprint in {store.url}"
    )


def label_alone(
    store: Store,
    model: str,
    pattern: str,
    out: str,
    *,
    config: LabelingConfig,
    exclude: str | None,
    device: DeviceChoice,
    max_bad_samples: int,
    has_log_probs: bool,
) -> Publication:
    """Label a corpus with a model and write the predictions to a folder.

    Raises: StoppedOnRequest; UnknownModel; OutputMismatch; and what labelling raises.
    """
    read_publication(out, "predictions")  # a folder of something else is told at once
    with showing_progress():
        fingerprint = model_named(store, _one_model(model))
        corpus = index_corpus(
            store, pattern, named="CORPUS", exclude=exclude, exclude_named="--exclude"
        )
    found, _ = flows.running.run_flow(
        lambda: label_corpus(
            store=store.url,
            model=fingerprint,
            corpus=corpus.digest,
            config=config,
            device=device,
            max_bad_samples=max_bad_samples,
            return_state=True,
        ),
        go_on=_SAME_COMMAND,
    )
    labeling = read_result(store, "label", found["fingerprint"])
    assert labeling is not None, "the flow ended well"
    with showing_progress():
        return publish_predictions(
            store,
            labeling,
            corpus,
            out,
            class_names=read_description(store, fingerprint).class_names,
            facts={
                "models": [fingerprint],
                "labeling_config": config.model_dump(mode="json"),
                "max_bad_samples": max_bad_samples,
            },
            has_log_probs=has_log_probs,
        )


def select_alone(
    predictions: str,
    out: str,
    *,
    store: Store | None,
    config: SelectionConfig,
    dev: str | None,
    labeled: str | None,
    exclude: str | None,
    seed: int,
    device: DeviceChoice,
    has_rejected: bool,
) -> Publication:
    """Select pseudo-labels from what `label_alone` wrote, and write them to a folder.

    Args:
        predictions: folder or URL.
        out: folder or URL.
        store: where the predictions are stored; None: where the folder's index says.
        config: the rules.
        dev: labelled split that calibrates; None exactly where calibration is none.
        labeled: labelled corpus whose class shares some rules read.
        exclude: text file of sample keys that are left out.
        seed: of the draws that round copies.
        device: where dev, and shards with excluded samples, are labelled.
        has_rejected: keep rejected rows in the files.
    Raises: StoppedOnRequest; OutputMismatch; and what a selection raises.
    """
    index = read_publication(predictions, "predictions")
    if index is None:
        raise FileNotFoundError(
            f"{predictions} holds no predictions: make them with `selftrain label MODEL CORPUS"
            f" {predictions}`"
        )
    read_publication(out, "selection")
    store = store or open_store(index["store"])
    corpus = load_corpus(store, index["corpus"])
    class_names: list[str] = index["class_names"]
    with showing_progress():
        if exclude is not None:
            locations = load_locations(store, corpus.digest)
            shown = f"--exclude = {exclude!r}"
            corpus = without_keys(corpus, locations, exclude, named=predictions, shown=shown)
            save_corpus(store, corpus, locations)
        splits = {
            name: None if pattern is None else _labeled_split(store, pattern, f"--{name}")
            for name, pattern in (("dev", dev), ("labeled", labeled))
        }
    found, _ = flows.running.run_flow(
        lambda: pseudo_labels(
            store=store.url,
            model=index["models"][0],
            corpus=corpus.digest,
            class_names=class_names,
            labeling=LabelingConfig.model_validate(index["labeling_config"]),
            selection=config,
            dev=splits["dev"],
            labeled=splits["labeled"],
            seed=seed,
            device=device,
            max_bad_samples=index["max_bad_samples"],
            return_state=True,
        ),
        go_on=_SAME_COMMAND,
    )
    labeling, selection = (read_result(store, kind, found[kind]) for kind in ("label", "select"))
    assert labeling is not None, "the flow ended well"
    assert selection is not None, "the flow ended well"
    with showing_progress():
        return publish_selection(
            store,
            labeling,
            selection,
            corpus,
            out,
            class_names=class_names,
            facts={"models": index["models"], "calibration": config.calibration},
            has_rejected=has_rejected,
        )


def _labeled_split(store: Store, pattern: str, named: str) -> str:
    """Return the digest of a corpus in which every image has a label and every label a name."""
    split = index_corpus(store, pattern, named=named)
    check_labels(split, named, every_class=False)
    if split.class_names is None:
        raise ValueError(
            f"{named} = {pattern!r}: no classes.json beside the shards, so class numbers have no"
            ' names. Write {"schema": 1, "class_names": [...]} there'
        )
    return split.digest


def _one_model(model: str) -> str:
    models = [name for name in model.split(",") if name]
    if len(models) != 1:
        raise ConfigError(f"MODEL = {model!r}: {len(models)} models; one is needed")
    return models[0]
