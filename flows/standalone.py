"""Pseudo-labels without a run or a config: what `selftrain label` and `selftrain select` do.

Both keep their work in a store, as runs do, and call the flows of runs: a stop loses at most the
shard in hand, and a corpus that grew costs its new shards.
"""

import logging
import re
from typing import Any

# First, because it sets Prefect's defaults before Prefect is imported.
import flows.running
from flows.corpora import index_corpus, without_keys
from flows.engine_config import EngineConfig
from flows.input_checks import check_labels
from flows.loading import ConfigError
from flows.mending import reading_predictions
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
from tasks.specifications import finished_result

_log = logging.getLogger(__name__)

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
    models: str,
    pattern: str,
    out: str,
    *,
    config: LabelingConfig,
    engine: EngineConfig,
    dev: str | None,
    exclude: str | None,
    device: DeviceChoice,
    max_bad_samples: int,
    has_log_probs: bool,
) -> Publication:
    """Label a corpus with a model, or an ensemble, and write the predictions to a folder.

    Args:
        store: keeps the work.
        models: as `model_named` takes them, joined by commas.
        pattern: of the corpus's shards.
        out: folder or URL.
        config: how to label.
        engine: where.
        dev: labelled split that calibrates the top_k form.
        exclude: text file of sample keys that are left out.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.
        has_log_probs: write the classes' probabilities, too.
    Raises: StoppedOnRequest; UnknownModel; OutputMismatch; and what labelling raises.
    """
    with showing_progress():
        fingerprints = [model_named(store, one) for one in models.split(",") if one]
        if not fingerprints:
            raise ConfigError(f"MODEL = {models!r} names no model")
        # Told now, and not when all is labelled.
        expected = {"models": fingerprints, "log_probs": has_log_probs}
        read_publication(out, "predictions", expected)
        corpus = index_corpus(
            store, pattern, named="CORPUS", exclude=exclude, exclude_named="--exclude"
        )
        label_dev = None if dev is None else _labeled_split(store, dev, "--dev")
    class_names = list(read_description(store, fingerprints[0]).class_names)

    def label(*, mend: bool = False) -> dict[str, str]:
        found, _ = flows.running.run_flow(
            lambda: pseudo_labels(
                store=store.url,
                models=fingerprints,
                corpus=corpus.digest,
                class_names=class_names,
                labeling=config,
                label_dev=label_dev,
                device=device,
                max_bad_samples=max_bad_samples,
                mend=mend,
                engine=engine,
                return_state=True,
            ),
            go_on=_SAME_COMMAND,
        )
        return found

    def publish() -> Publication:
        with showing_progress():
            return publish_predictions(
                store,
                finished_result(store, "label", found["label"]),
                corpus,
                out,
                class_names=class_names,
                facts={
                    "models": fingerprints,
                    "labeling_config": config.model_dump(mode="json"),
                    "dev": label_dev,
                    "max_bad_samples": max_bad_samples,
                },
                has_log_probs=has_log_probs,
            )

    found = label()
    return reading_predictions(publish, lambda: label(mend=True), log=_log)


def read_labels(predictions: str) -> dict[str, Any]:
    """Return the index of a folder that `label_alone` wrote.

    Raises: FileNotFoundError; OutputMismatch.
    """
    index = read_publication(predictions, "predictions")
    if index is None:
        raise FileNotFoundError(
            f"{predictions} holds no predictions: make them with `selftrain label MODEL CORPUS"
            f" {predictions}`"
        )
    return index


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
        dev: labelled split that calibrates; None: that of the predictions, if they have one.
        labeled: labelled corpus whose class shares some rules read.
        exclude: text file of sample keys that are left out.
        seed: of the draws that round copies.
        device: where dev, and shards with excluded samples, are labelled.
        has_rejected: write rejected rows, too.
    Raises: StoppedOnRequest; OutputMismatch; and what a selection raises.
    """
    index = read_labels(predictions)
    read_publication(out, "selection")
    reads_dev = config.reads_validation or config.guards
    if dev is not None and not reads_dev:
        raise ConfigError(
            f"--dev {dev} has no effect with calibration: none. Leave one of them out"
        )
    store = store or open_store(index["store"])
    corpus = load_corpus(store, index["corpus"])
    class_names: list[str] = index["class_names"]
    select_dev, counted = index["dev"], None
    with showing_progress():
        if exclude is not None:
            locations = load_locations(store, corpus.digest)
            shown = f"--exclude = {exclude!r}"
            corpus = without_keys(corpus, locations, exclude, named=predictions, shown=shown)
            save_corpus(store, corpus, {one.stem: locations[one.stem] for one in corpus.shards})
        if dev is not None:
            select_dev = _labeled_split(store, dev, "--dev")
        if labeled is not None:
            counted = _labeled_split(store, labeled, "--labeled")
    if select_dev is None and (reads_dev and config.calibration == "none"):
        raise ConfigError(
            f"out_of_domain: {config.out_of_domain.kind} and leak_guard:"
            f" {config.leak_guard.kind} read images that are not trained on: give them with --dev"
        )

    def select(*, mend: bool = False) -> dict[str, str]:
        found, _ = flows.running.run_flow(
            lambda: pseudo_labels(
                store=store.url,
                models=index["models"],
                corpus=corpus.digest,
                class_names=class_names,
                labeling=LabelingConfig.model_validate(index["labeling_config"]),
                selection=config,
                label_dev=index["dev"],
                select_dev=select_dev if reads_dev else None,
                labeled=counted,
                seed=seed,
                device=device,
                max_bad_samples=index["max_bad_samples"],
                mend=mend,
                return_state=True,
            ),
            go_on=_SAME_COMMAND,
        )
        return found

    def publish() -> Publication:
        with showing_progress():
            return publish_selection(
                store,
                finished_result(store, "label", found["label"]),
                finished_result(store, "select", found["select"]),
                corpus,
                out,
                class_names=class_names,
                facts={"models": index["models"], "calibration": config.calibration},
                has_rejected=has_rejected,
            )

    found = select()
    return reading_predictions(publish, lambda: select(mend=True), log=_log)


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
