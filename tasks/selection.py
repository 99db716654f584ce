"""Select pseudo-labels: calibrate, plan over the corpus, write; one Parquet per shard.

The order is fixed (gate -> calibrate -> debias -> threshold -> weight -> balance -> write) and
asserted by `SelectionInputs`: a threshold is a statement about probabilities, and what is dropped
must not count in a mean, a threshold or a quota. The gates are in `tasks/gating.py`, what lies
between calibrating and writing in `tasks/selection_passes.py`, writing in
`tasks/selection_writing.py`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.calibration import apply_temperature, fit_temperature, platt_smoothing
from models.calibration_vector import fit_vector_scaling
from models.evaluation.calibration_error import expected_calibration_error
from models.randomness import derive_seed
from models.thresholds import (
    AgreementThresholdConfig,
    FixedThresholdConfig,
    UncertaintyThresholdConfig,
)
from storage.addresses import settings_of
from storage.corpus import Corpus, load_corpus
from storage.manifest import (
    InputReference,
    Manifest,
    commit_manifest,
    put_object,
    read_stored,
)
from storage.prediction_columns import PredictionReference
from storage.predictions import Form, prediction_record
from storage.store import Store
from tasks import provenance
from tasks.calibrating import read_dev_predictions
from tasks.classifiers import class_order
from tasks.distributions import Calibration
from tasks.labeling import check_records
from tasks.selection_config import SelectionConfig
from tasks.selection_rows import SelectionInputs
from tasks.selection_summary import check_selection_is_sound, summarize
from tasks.selection_writing import written_shards
from tasks.shard_records import read_of_each
from tasks.specifications import Specification

VERSION = 1


def specify(
    config: SelectionConfig,
    *,
    labeling: str,
    validation: str,
    labeled: str | None = None,
    leaks: str | None = None,
    seed: int,
    round_index: int,
) -> Specification:
    """Return the specification of a selection.

    Args:
        config: the rules.
        labeling: fingerprint of the labelling.
        validation: fingerprint of what predicted dev as the labels are predicted; an input where
            confidences are calibrated, or where the dev split says what is in domain.
        labeled: digest of the labelled corpus; an input where a rule reads its class counts.
        leaks: fingerprint of the leak guard; an input where there is one.
        seed: of the run.
        round_index: of the selection.
    """
    inputs = {"labeling": labeling}
    if config.reads_validation:
        inputs["validation"] = validation
    if config.guards:
        if leaks is None:
            raise ValueError(
                f"selection with leak_guard={config.leak_guard.kind} reads what the guard found,"
                " but no guard is given"
            )
        inputs["leaks"] = leaks
    if config.reads_labeled_counts:
        if labeled is None:
            raise ValueError(
                f"selection with debias={config.debias.kind} and balance={config.balance.kind}"
                " reads the class counts of the labelled images, but no labelled corpus is given"
            )
        inputs["labeled"] = labeled
    settings = {"selection": settings_of(config), "seed": seed, "round_index": round_index}
    return Specification("select", VERSION, settings, inputs)


def begin(
    store: Store, specification: Specification, labeling: Manifest, corpus: Corpus
) -> SelectionInputs:
    """Return what every step starts from.

    Args:
        store: where it is.
        specification: of the selection.
        labeling: to be selected from.
        corpus: that it labels.
    Raises: DamagedPredictions where some are gone; ManifestMismatch where they are not those of the
        labelling.
    """
    labeler = labeling.inputs["labeler"].fingerprint
    shards = _prediction_references(store, labeling, corpus)
    settings = specification.settings
    return SelectionInputs(
        corpus.digest,
        labeler,
        shards[corpus.shards[0].stem].num_classes,
        Calibration(),
        stream=derive_seed(settings["seed"], settings["round_index"], "select"),
        round_index=settings["round_index"],
        shards=shards,
    )


def calibrate(
    store: Store,
    specification: Specification,
    inputs: SelectionInputs,
    validation: Manifest | None,
    *,
    class_names: Sequence[str],
) -> tuple[SelectionInputs, dict[str, Any]]:
    """Fit the calibration on the dev predictions; return it with ECE before and after."""
    inputs.assert_next("calibrate")
    reference = next(iter(inputs.shards.values()))
    first = prediction_record(store, inputs.labeler, reference.shard)
    kind = specification.settings["selection"]["calibration"]
    check_calibration(kind, reference.form)
    dev = None if kind == "none" else validation  # which a gate may have read
    calibration, facts = _calibration(store, kind, dev, first["facts"].get("temperature"))
    counts = None
    if "labeled" in specification.inputs:
        counts = _labeled_counts(store, specification.inputs["labeled"], class_names)
        facts["labeled_counts"] = counts.tolist()
    return inputs.after("calibrate", calibration=calibration, labeled_counts=counts), facts


def check_calibration(kind: str, form: Form) -> None:
    """Refuse a calibration that predictions of a form cannot be given.

    Raises: ValueError.
    """
    if form == "top_k" and kind != "temperature":
        raise ValueError(
            f"selection.calibration={kind} with predictions of the top_k form: these were"
            " calibrated by the temperature of the dev split before the less probable classes were"
            " dropped, and nothing else can be done to them; use calibration=temperature, or label"
            " with labeling.form=full"
        )


def _calibration(
    store: Store, kind: str, validation: Manifest | None, labelers: float | None
) -> tuple[Calibration, dict[str, Any]]:
    """Fit the calibration, save where the labeler has its temperature, and measure it on dev."""
    facts: dict[str, Any] = {}
    if labelers is not None:
        facts |= {"temperature": labelers, "is_temperature_of_labeler": True}
    if validation is None:
        is_one = kind == "temperature" and labelers is None
        return Calibration(temperature=1.0 if is_one else None), facts
    log_probs, truth = read_dev_predictions(store, validation)
    facts["ece_before"] = _calibration_error(log_probs, truth)
    if kind == "vector":
        vector = fit_vector_scaling(log_probs, truth)
        calibration, calibrated = Calibration(vector=vector), vector.apply(log_probs)
        facts["vector"] = {"weights": vector.weights.tolist(), "biases": vector.biases.tolist()}
    elif labelers is not None:
        calibration, calibrated = Calibration(), apply_temperature(log_probs, labelers)
    else:
        temperature = fit_temperature(log_probs, truth, smoothing=platt_smoothing(len(truth)))
        calibrated = apply_temperature(log_probs, temperature)
        calibration, facts["temperature"] = Calibration(temperature=temperature), temperature
    facts["ece_after"] = _calibration_error(calibrated, truth)
    return calibration, facts


def _prediction_references(
    store: Store, labeling: Manifest, corpus: Corpus
) -> dict[str, PredictionReference]:
    """Return stem -> where a shard's predictions are, of all shards."""
    labeler = labeling.inputs["labeler"].fingerprint
    records = read_of_each(
        corpus.shards, lambda shard: prediction_record(store, labeler, shard.digest)
    )
    check_records(store, labeling, records)
    return {shard.stem: PredictionReference.of(record) for shard, record in records}


def finish(
    store: Store,
    specification: Specification,
    labeling: Manifest,
    validation: Manifest | None,
    config: SelectionConfig,
    *,
    corpus: Corpus,
    groups: Sequence[Sequence[str]],
    guard: Manifest | None = None,
    facts: dict[str, Any],
    class_names: Sequence[str],
    seconds: float,
) -> Manifest:
    """Merge the groups' counts, refuse an empty or collapsed selection, commit.

    Args:
        store: where it is.
        specification: of the selection.
        labeling: whose predictions were selected from.
        validation: that was read, if any.
        config: the rules.
        corpus: that was selected from.
        groups: of stems, as they were given to `write_selections`.
        guard: that was read, if any.
        facts: for the summary.
        class_names: of the run.
        seconds: that the stage took, for its provenance.
    Raises: EmptySelection, CollapsedSelection (with the class table).
    """
    written, counts = written_shards(store, specification, corpus, groups)
    summary = summarize(counts, class_names=class_names, facts=facts)
    check_selection_is_sound(
        summary,
        max_class_share=config.max_class_share or max(0.5, 1.5 / len(class_names)),
        allow_collapse=config.allow_collapse,
        remedy=_how_to_keep_more(config),
    )
    summary_object = put_object(
        store,
        specification.folder,
        "summary",
        (json.dumps(summary, indent=1, sort_keys=True) + "\n").encode(),
        "json",
    )
    inputs = {"labeling": InputReference(labeling.fingerprint, labeling.sha256)}
    if validation is not None:
        inputs["validation"] = InputReference(validation.fingerprint, validation.sha256)
    if guard is not None:
        inputs["leaks"] = InputReference(guard.fingerprint, guard.sha256)
    if "labeled" in specification.inputs:
        labeled = specification.inputs["labeled"]
        inputs["labeled"] = InputReference(labeled, labeled)
    manifest = Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs=inputs,
        objects=(*(one.stored for one in written), summary_object),
        counts={
            "kept": summary["kept"],
            "unique": summary["unique"],
            "samples": summary["samples"],
            "items": {one.stem: one.items for one in written},
            "listed_targets": {one.stem: one.listed_targets for one in written},
        },
    )
    provenance.record(store, specification.folder, seconds=seconds, device=None)
    return commit_manifest(store, specification.folder, manifest)


def read_summary(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return the summary of a finished selection."""
    return json.loads(read_stored(store, manifest.object("summary")))


def _labeled_counts(store: Store, digest: str, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the labelled images of each class, (C,), in the order of the run's class names."""
    corpus = load_corpus(store, digest)
    by_number = corpus.label_counts()
    if not by_number:
        raise ValueError(f"the labelled corpus {digest[:12]} has no labels to count")
    order = class_order(corpus.class_names or class_names, class_names, model="data.labeled")
    return np.array([by_number.get(number, 0) for number in order], dtype=np.int64)


def _how_to_keep_more(config: SelectionConfig) -> str:
    match config.threshold:
        case FixedThresholdConfig():
            return "lower selection.threshold.confidence"
        case UncertaintyThresholdConfig():
            return "lower selection.threshold.confidence or raise max_std"
        case AgreementThresholdConfig():
            return "lower selection.threshold.min_fraction or confidence"
        case _:
            return f"choose another selection.threshold than {config.threshold.kind}"


def _calibration_error(log_probs: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    probs = np.exp(log_probs)
    error = expected_calibration_error(probs.max(axis=1), probs.argmax(axis=1) == truth)
    assert error is not None, "a validated dev split is not empty"
    return error
