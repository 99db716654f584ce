"""Select pseudo-labels: calibrate, plan over the corpus, write; one Parquet per shard.

The order is fixed (gate -> calibrate -> debias -> threshold -> weight -> balance -> write) and
asserted by `SelectionInputs`: a threshold is a statement about probabilities, and what is dropped
must not count in a mean, a threshold or a quota. The gates are in `tasks/gating.py`, what lies
between calibrating and writing in `tasks/selection_passes.py`.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.balancing import FinishedPlan, assign_copies, classes_per_image
from models.calibration import apply_temperature, fit_temperature, platt_smoothing
from models.calibration_vector import fit_vector_scaling
from models.evaluation.calibration_error import expected_calibration_error
from models.randomness import Block, derive_seed, uniforms
from models.thresholds import (
    AgreementThresholdConfig,
    FixedThresholdConfig,
    UncertaintyThresholdConfig,
)
from storage import crash_points
from storage.addresses import settings_of
from storage.corpus import Corpus, load_corpus
from storage.manifest import (
    InputReference,
    Manifest,
    StoredObject,
    commit_manifest,
    create_record,
    put_object,
    read_record,
    read_stored,
)
from storage.prediction_columns import PredictionReference
from storage.predictions import Form, prediction_record
from storage.selections import Reason, Selection, to_parquet
from storage.store import Store
from tasks import provenance
from tasks.calibrating import read_dev_predictions
from tasks.classifiers import class_order
from tasks.distributions import Calibration
from tasks.labeling import check_records
from tasks.selection_config import SelectionConfig
from tasks.selection_rows import Rows, SelectionInputs
from tasks.selection_summary import ShardCounts, check_selection_is_sound, summarize
from tasks.shard_records import read_of_each
from tasks.specifications import Specification

VERSION = 1
RECORD_SCHEMA = 1
_WRITERS = 4


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


def begin(store: Store, specification: Specification, labeling: Manifest) -> SelectionInputs:
    """Return what every step starts from.

    Raises: DamagedPredictions where some are gone; ManifestMismatch where they are not those of the
        labelling.
    """
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
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
    corpus = load_corpus(store, inputs.corpus)
    first = prediction_record(store, inputs.labeler, corpus.shards[0].digest)
    kind = specification.settings["selection"]["calibration"]
    check_calibration(kind, PredictionReference.of(first).form)
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


def write_selections(
    store: Store,
    specification: Specification,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: FinishedPlan,
) -> int:
    """Write and record each shard's selection, save those already recorded.

    Returns: the number of shards written now.
    """
    inputs.assert_next("write")

    def write(stem: str) -> bool:
        digest = inputs.shards[stem].shard
        if read_record(store, specification.record_path(digest)) is not None:
            return False
        # The one pass that reads files whole: each is checked before its selection is committed.
        rows = Rows.read(store, inputs, stem, to_write=True)
        assert rows.true_labels is not None, "read to write"
        selection, item_classes = _select(rows, plan, inputs, config)
        data = to_parquet(selection)
        stored = put_object(
            store, specification.folder, digest, data, "parquet", crash_kind="select"
        )
        crash_points.reach("select.between_data_and_record")
        counts = ShardCounts.of(
            selection,
            rows.true_labels,
            rows.confidences,
            inputs.num_classes,
            item_classes=item_classes,
        )
        body = {
            "schema": RECORD_SCHEMA,
            "stem": stem,
            "object": asdict(stored),
            "counts": counts.to_json(),
            "listed_targets": selection.num_listed,
        }
        create_record(store, specification.record_path(digest), body)
        return True

    # Most of a shard's time is waiting until its bytes are safely on the disk or in the bucket.
    with ThreadPoolExecutor(_WRITERS) as pool:
        return sum(pool.map(write, stems))


def finish(
    store: Store,
    specification: Specification,
    labeling: Manifest,
    validation: Manifest | None,
    config: SelectionConfig,
    *,
    guard: Manifest | None = None,
    facts: dict[str, Any],
    class_names: Sequence[str],
    seconds: float,
) -> Manifest:
    """Merge the shards' counts, refuse an empty or collapsed selection, commit.

    Raises: EmptySelection, CollapsedSelection (with the class table).
    """
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
    records: list[dict[str, Any]] = []
    for shard, record in read_of_each(
        corpus.shards, lambda shard: read_record(store, specification.record_path(shard.digest))
    ):
        if record is None:
            raise ValueError(f"selection: shard {shard.stem} has no record; run it again")
        records.append(record)
    counts = [ShardCounts.from_json(record["counts"]) for record in records]
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
        objects=(*(StoredObject(**record["object"]) for record in records), summary_object),
        counts={
            "kept": summary["kept"],
            "unique": summary["unique"],
            "samples": summary["samples"],
            "items": {record["stem"]: c.items for record, c in zip(records, counts, strict=True)},
            # Shards that were written before this was counted have none.
            "listed_targets": {
                record["stem"]: record["listed_targets"]
                for record in records
                if "listed_targets" in record
            },
        },
    )
    provenance.record(store, specification.folder, seconds=seconds, device=None)
    return commit_manifest(store, specification.folder, manifest)


def read_summary(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return the summary of a finished selection."""
    return json.loads(read_stored(store, manifest.object("summary")))


def _select(
    rows: Rows, plan: FinishedPlan, inputs: SelectionInputs, config: SelectionConfig
) -> tuple[Selection, NDArray[np.integer] | None]:
    """Return the selection, and the class of each item where an image may have several."""
    assert inputs.weighting is not None, "weights come before"
    ranked = rows.ranked(inputs, config.balance)

    def keys_of(chosen: NDArray[np.intp]) -> NDArray[np.str_]:
        return rows.sample_keys(ranked.rows[chosen])

    found = assign_copies(
        plan,
        ranked.labels,
        ranked.values,
        keys_of,
        lambda chosen: uniforms(
            inputs.stream, rows.key_hashes(ranked.rows[chosen]), block=Block.BALANCE
        ),
    )
    reason = np.full(rows.num_samples, Reason.BELOW_THRESHOLD, dtype=np.int8)
    reason[ranked.rows] = Reason.OVER_QUOTA
    reason[ranked.rows[found > 0]] = Reason.KEPT
    if rows.turned_down is not None:
        reason = np.where(rows.turned_down == Reason.KEPT, reason, rows.turned_down)
    assert rows.keys is not None, "read to write"
    if classes_per_image(config.balance) > 1:
        taken = found > 0
        selection = Selection.of_several(
            rows.keys,
            reason=reason,
            weight=rows.weights(inputs.weighting),
            label=rows.labels,
            rows=ranked.rows[taken],
            classes=ranked.labels[taken],
        )
        return selection, ranked.labels[taken]
    copies = np.zeros(rows.num_samples, dtype=np.uint16)
    copies[ranked.rows] = found
    log_probs = class_ids = rest_mass = None
    if config.target == "soft":
        log_probs, class_ids, rest_mass = rows.soft_targets()
    selection = Selection.of(
        rows.keys,
        reason=reason,
        copies=copies,
        weight=rows.weights(inputs.weighting),
        label=rows.labels,
        log_probs=log_probs,
        class_ids=class_ids,
        rest_mass=rest_mass,
    )
    return selection, None


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
