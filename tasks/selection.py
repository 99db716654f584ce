"""Select pseudo-labels: calibrate, threshold, balance, write; one Parquet per shard.

The order is fixed (calibrate -> threshold -> balance): a threshold is a statement about
probabilities, and what is dropped must not count in a quota. Three passes over the shards, each
map, merge, finish, so that order and grouping of shards change nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.balancing import (
    BalanceConfig,
    BalancePlan,
    Candidates,
    FinishedPlan,
    NsBinnedConfig,
    assign_copies,
    boundary_candidates,
    confidence_histogram,
)
from models.calibration import apply_temperature, fit_temperature, platt_smoothing
from models.evaluation.calibration_error import expected_calibration_error
from models.randomness import Block, derive_seed, uniforms
from models.thresholds import FixedThresholdConfig, ThresholdConfig, reaches_threshold
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
from storage.predictions import Predictions, read_predictions
from storage.predictions import read_record as read_prediction_record
from storage.samples import sample_key
from storage.selections import Reason, Selection, to_parquet
from storage.store import Store
from tasks import provenance
from tasks.evaluation import read_evaluation_predictions
from tasks.selection_summary import ShardCounts, check_selection_is_sound, summarize
from tasks.specifications import Specification

VERSION = 1
RECORD_SCHEMA = 1


class SelectionConfig(BaseModel):
    """What makes a prediction a pseudo-label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Literal["temperature", "none"] = Field(
        default="temperature",
        description="temperature: one number fitted on the dev split, applied to confidences"
        " before the threshold; soft targets stay the teacher's own.",
    )
    threshold: ThresholdConfig = FixedThresholdConfig()
    balance: BalanceConfig = NsBinnedConfig()
    target: Literal["soft", "hard"] = Field(
        default="soft", description="What the student learns: the teacher's distribution or class."
    )
    max_class_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Largest share of the selected items that one class may hold; null: 0.5, or"
        " 1.5 / classes where that is more.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    allow_collapse: bool = Field(
        default=False,
        description="Go on although one class holds more than max_class_share or more than half"
        " of the classes get nothing.",
        json_schema_extra={"fingerprint": "excluded"},
    )


@dataclass(frozen=True)
class SelectionInputs:
    """What every pass over the shards needs to know.

    Attributes:
        corpus: digest of the labelled corpus.
        labeler: address of its predictions.
        num_classes: C.
        temperature: 1 where confidences are not calibrated.
        stream: of the draws that round copies.
    """

    corpus: str
    labeler: str
    num_classes: int
    temperature: float
    stream: int


def specify(
    config: SelectionConfig, *, labeling: str, validation: str, seed: int, round_index: int
) -> Specification:
    """Return the specification of a selection; dev predictions enter where they are calibrated."""
    inputs = {"labeling": labeling}
    if config.calibration == "temperature":
        inputs["validation"] = validation
    settings = {"selection": settings_of(config), "seed": seed, "round_index": round_index}
    return Specification("select", VERSION, settings, inputs)


def calibrate(
    store: Store, specification: Specification, labeling: Manifest, validation: Manifest | None
) -> tuple[SelectionInputs, dict[str, float]]:
    """Fit the temperature on the dev predictions; return it with ECE before and after."""
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
    labeler = labeling.inputs["labeler"].fingerprint
    first = _prediction_record(store, labeler, corpus.shards[0].digest)
    temperature, facts = 1.0, {}
    if validation is not None:
        dev = read_evaluation_predictions(store, validation)
        log_probs, truth = dev.log_probs.astype(np.float64), dev.true_label.astype(np.int64)
        temperature = fit_temperature(log_probs, truth, smoothing=platt_smoothing(len(truth)))
        facts = {
            "temperature": temperature,
            "ece_before": _calibration_error(log_probs, truth),
            "ece_after": _calibration_error(apply_temperature(log_probs, temperature), truth),
        }
    settings = specification.settings
    stream = derive_seed(settings["seed"], settings["round_index"], "select")
    inputs = SelectionInputs(
        corpus.digest, labeler, first["num_classes"], temperature=temperature, stream=stream
    )
    return inputs, facts


def count_confidences(
    store: Store, inputs: SelectionInputs, stems: Sequence[str], config: SelectionConfig
) -> NDArray[np.int64]:
    """Pass 1, map: samples that reach the threshold, by class and confidence bin."""
    corpus = load_corpus(store, inputs.corpus)
    total: NDArray[np.int64] | None = None
    for stem in stems:
        rows = _Rows.read(store, inputs, corpus, stem, config)
        counts = confidence_histogram(
            config.balance, *rows.passing(), num_classes=inputs.num_classes
        )
        total = counts if total is None else total + counts
    assert total is not None, "a group holds at least one shard"
    return total


def collect_candidates(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: BalancePlan,
) -> list[Candidates]:
    """Pass 2, map: the rows that a quota's boundary runs through, shard by shard."""
    corpus = load_corpus(store, inputs.corpus)
    found: list[Candidates] = []
    for stem in stems:
        rows = _Rows.read(store, inputs, corpus, stem, config)
        found.append(boundary_candidates(plan, *rows.passing(), rows.keys[rows.passes]))
    return found


def write_selections(
    store: Store,
    specification: Specification,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: FinishedPlan,
) -> int:
    """Pass 3: write and record each shard's selection, save those already recorded.

    Returns: the number of shards written now.
    """
    corpus = load_corpus(store, inputs.corpus)
    num_written = 0
    for stem in stems:
        digest = corpus.shard(stem).digest
        if read_record(store, _record_path(specification, digest)) is not None:
            continue
        rows = _Rows.read(store, inputs, corpus, stem, config)
        selection = _select(rows, plan, inputs, config)
        data = to_parquet(selection)
        stored = put_object(
            store, specification.folder, digest, data, "parquet", crash_kind="select"
        )
        crash_points.reach("select.between_data_and_record")
        counts = ShardCounts.of(selection, rows.predictions, rows.confidences, inputs.num_classes)
        body = {
            "schema": RECORD_SCHEMA,
            "stem": stem,
            "object": asdict(stored),
            "counts": counts.to_json(),
        }
        create_record(store, _record_path(specification, digest), body)
        num_written += 1
    return num_written


def finish(
    store: Store,
    specification: Specification,
    labeling: Manifest,
    validation: Manifest | None,
    config: SelectionConfig,
    *,
    facts: dict[str, Any],
    class_names: Sequence[str],
    seconds: float,
) -> Manifest:
    """Merge the shards' counts, refuse an empty or collapsed selection, commit.

    Raises: EmptySelection, CollapsedSelection (with the class table).
    """
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)
    records: list[dict[str, Any]] = []
    for shard in corpus.shards:
        record = read_record(store, _record_path(specification, shard.digest))
        if record is None:
            raise ValueError(f"selection: shard {shard.stem} has no record; run it again")
        records.append(record)
    counts = [ShardCounts.from_json(record["counts"]) for record in records]
    summary = summarize(counts, class_names=class_names, facts=facts)
    check_selection_is_sound(
        summary,
        max_class_share=config.max_class_share or max(0.5, 1.5 / len(class_names)),
        allow_collapse=config.allow_collapse,
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
        },
    )
    provenance.record(store, specification.folder, seconds=seconds, device=None)
    return commit_manifest(store, specification.folder, manifest)


def read_summary(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return the summary of a finished selection."""
    return json.loads(read_stored(store, manifest.object("summary")))


@dataclass(frozen=True)
class _Rows:
    """The predictions of one shard with what selection adds to them."""

    predictions: Predictions
    keys: NDArray[np.str_]
    confidences: NDArray[np.float32]
    passes: NDArray[np.bool_]

    @classmethod
    def read(
        cls,
        store: Store,
        inputs: SelectionInputs,
        corpus: Corpus,
        stem: str,
        config: SelectionConfig,
    ) -> "_Rows":
        record = _prediction_record(store, inputs.labeler, corpus.shard(stem).digest)
        predictions = read_predictions(store, record)
        confidences = predictions.confidence
        if config.calibration == "temperature":
            calibrated = apply_temperature(predictions.log_probs, inputs.temperature)
            rows = np.arange(predictions.num_samples)
            confidences = np.exp(calibrated[rows, predictions.label]).astype(np.float32)
        return cls(
            predictions,
            np.array([sample_key(stem, key) for key in predictions.keys], dtype=np.str_),
            confidences,
            reaches_threshold(confidences, config.threshold),
        )

    def passing(self) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Labels and confidences of the rows that reach the threshold."""
        return self.predictions.label[self.passes], self.confidences[self.passes]


def _select(
    rows: _Rows, plan: FinishedPlan, inputs: SelectionInputs, config: SelectionConfig
) -> Selection:
    num_rows = rows.predictions.num_samples
    keys = rows.keys[rows.passes]
    draws = uniforms(inputs.stream, keys.tolist(), block=Block.BALANCE)
    copies = np.zeros(num_rows, dtype=np.uint16)
    copies[rows.passes] = assign_copies(plan, *rows.passing(), keys, draws)
    reason = np.where(
        copies > 0, Reason.KEPT, np.where(rows.passes, Reason.OVER_QUOTA, Reason.BELOW_THRESHOLD)
    )
    return Selection.of(
        rows.predictions.keys,
        reason=reason,
        copies=copies,
        weight=np.ones(num_rows, dtype=np.float32),
        label=rows.predictions.label,
        log_probs=rows.predictions.log_probs if config.target == "soft" else None,
    )


def _calibration_error(log_probs: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    probs = np.exp(log_probs)
    error = expected_calibration_error(probs.max(axis=1), probs.argmax(axis=1) == truth)
    assert error is not None, "a validated dev split is not empty"
    return error


def _prediction_record(store: Store, labeler: str, shard_digest: str) -> dict[str, Any]:
    record = read_prediction_record(store, labeler, shard_digest)
    if record is None:
        raise ValueError(
            f"selection: no prediction of labeler {labeler[:12]} for shard {shard_digest[:12]};"
            " the labelling is not finished or was deleted: run the labelling again"
        )
    return record


def _record_path(specification: Specification, shard_digest: str) -> str:
    return f"{specification.folder}/shards/{shard_digest}.json"
