"""Validate, promote and test: what a model is worth, on splits that nothing was trained on."""

import json
import time
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from models.evaluation.accuracy import accuracy, per_class_accuracy
from models.evaluation.calibration_error import expected_calibration_error, reliability_bins
from models.evaluation.promotion import decide_promotion
from storage.corpus import Corpus, load_corpus, load_locations, read_samples
from storage.manifest import (
    InputReference,
    Manifest,
    StoredObject,
    commit_manifest,
    put_object,
    read_stored,
)
from storage.predictions import Predictions, from_parquet, to_parquet
from storage.samples import sample_key
from storage.store import Store
from tasks import provenance
from tasks.classifiers import StoredClassifier, class_order, model_manifest
from tasks.ensembles import Ensemble
from tasks.images import CONVERSION
from tasks.predicting import Predicted, predict_samples
from tasks.shard_items import BadSampleBudget
from tasks.specifications import Specification

VERSION = 1
PROMOTE_VERSION = 1
REPORT_SCHEMA = 1

# Evaluation is small next to labelling; one batch size everywhere keeps its bits comparable.
_BATCH_SIZE = 128


def specify(
    kind: Literal["validate", "test"],
    *,
    model: str,
    corpus: str,
    view: dict[str, Any],
    class_names: tuple[str, ...],
) -> Specification:
    """Return the specification of evaluating a model on a labelled split.

    Args:
        kind: "validate" reads the dev split and steers the loop; "test" is read by nothing.
        model: fingerprint.
        corpus: digest of the split.
        view: image_size, crop_padding and interpolation.
        class_names: the run's label space.
    """
    settings = {
        "view": view,
        "class_names": list(class_names),
        "conversion": CONVERSION,
        "precision": "fp32",
    }
    return Specification(kind, VERSION, settings, {"model": model, "corpus": corpus})


def evaluate(
    store: Store,
    specification: Specification,
    classifier: StoredClassifier,
    *,
    max_bad_samples: int,
) -> Manifest:
    """Predict a labelled split, commit the report and the predictions behind it."""
    started = time.monotonic()
    corpus = load_corpus(store, specification.inputs["corpus"])
    predictions, bad = _predict_split(store, corpus, classifier, max_bad_samples=max_bad_samples)
    report = _report(predictions, classifier.class_names)
    folder = specification.folder
    objects = (
        put_object(
            store,
            folder,
            "predictions",
            to_parquet(predictions),
            "parquet",
            crash_kind=specification.kind,
        ),
        _put_report(store, folder, report),
    )
    model = model_manifest(store, classifier.fingerprint)
    manifest = Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs={
            "model": InputReference(model.fingerprint, model.sha256),
            "corpus": InputReference(corpus.digest, corpus.digest),
        },
        objects=objects,
        counts={
            "samples": predictions.num_samples,
            "bad_samples": bad,
            "classes": predictions.num_classes,
            "accuracy": report["accuracy"],
            "interval": report["interval"],
        },
    )
    seconds = time.monotonic() - started
    provenance.record(store, folder, seconds=seconds, device=classifier.device)
    return commit_manifest(store, folder, manifest)


def specify_promotion(*, teacher: str, student: str) -> Specification:
    """Return the specification of comparing two validations."""
    return Specification("promote", PROMOTE_VERSION, {}, {"teacher": teacher, "student": student})


def promote(
    store: Store, specification: Specification, teacher: Manifest, student: Manifest
) -> Manifest:
    """Decide from two validations whether the student is the next teacher, and commit it."""
    started = time.monotonic()
    judged = [_correct_by_key(store, validation) for validation in (student, teacher)]
    keys = sorted(judged[0])
    if keys != sorted(judged[1]):
        raise ValueError("promotion: student and teacher were validated on different dev samples")
    decision = decide_promotion(
        *(np.array([correct[key] for key in keys], dtype=np.bool_) for correct in judged)
    )
    report = {
        "schema": REPORT_SCHEMA,
        "is_promoted": decision.is_promoted,
        "difference": decision.difference,
        "interval": [decision.low, decision.high],
        "only_student": decision.only_student,
        "only_teacher": decision.only_teacher,
    }
    folder = specification.folder
    manifest = Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs={
            "teacher": InputReference(teacher.fingerprint, teacher.sha256),
            "student": InputReference(student.fingerprint, student.sha256),
        },
        objects=(_put_report(store, folder, report, crash_kind="promote"),),
        counts={"is_promoted": decision.is_promoted, "difference": decision.difference},
    )
    provenance.record(store, folder, seconds=time.monotonic() - started, device=None)
    return commit_manifest(store, folder, manifest)


def read_report(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return the report of a finished evaluation or promotion."""
    return json.loads(read_stored(store, manifest.object("report")))


def read_evaluation_predictions(store: Store, manifest: Manifest) -> Predictions:
    """Return the predictions behind a validation or a test; keys are whole sample keys."""
    stored = manifest.object("predictions")
    return from_parquet(
        read_stored(store, stored),
        num_samples=manifest.counts["samples"],
        num_classes=manifest.counts["classes"],
        where=store.url_of(stored.path),
    )


def _predict_split(
    store: Store, corpus: Corpus, classifier: StoredClassifier, *, max_bad_samples: int
) -> tuple[Predictions, dict[str, str]]:
    """Predict all shards of a split into one table, keyed by whole sample keys.

    Returns: the table, and key -> reason of what could not be decoded.
    """
    locations = load_locations(store, corpus.digest)
    assert corpus.class_names is not None, "splits are checked when the run is opened"
    # Label i of the split's .cls members is class to_run[i] of the run.
    to_run = class_order(classifier.class_names, corpus.class_names, model="the run")
    ensemble = Ensemble((classifier,))
    parts: list[tuple[str, Predicted]] = []
    bad: dict[str, str] = {}
    for shard in corpus.shards:
        budget = BadSampleBudget(shard.stem, max_bad_samples)
        predicted = predict_samples(
            read_samples(corpus, locations, shard.stem),
            ensemble,
            shard=shard.digest,
            batch_size=_BATCH_SIZE,
            budget=budget,
        )
        parts.append((shard.stem, predicted))
        bad |= budget.reasons
    whole = Predicted(
        keys=tuple(sample_key(stem, key) for stem, part in parts for key in part.keys),
        labels=tuple(label for _, part in parts for label in part.labels),
        log_probs=np.concatenate([part.log_probs for _, part in parts]),
        logsumexp=np.concatenate([part.logsumexp for _, part in parts]),
    )
    truth: list[int] = []
    for key, label in zip(whole.keys, whole.labels, strict=True):
        if label is None:
            raise ValueError(f"{key}: no .cls member, but dev and test splits must be labelled")
        truth.append(to_run[label])
    predictions, _ = whole.to_predictions(truth)
    return predictions, bad


def _report(predictions: Predictions, class_names: tuple[str, ...]) -> dict[str, Any]:
    truth = predictions.true_label.astype(np.int64)
    predicted = predictions.label.astype(np.int64)
    overall = accuracy(truth, predicted)
    is_correct = truth == predicted
    confidence = np.minimum(predictions.confidence, 1)
    log_probs = predictions.log_probs.astype(np.float64)
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    per_class = per_class_accuracy(truth, predicted, num_classes=len(class_names))
    return {
        "schema": REPORT_SCHEMA,
        "samples": overall.total,
        "correct": overall.correct,
        "accuracy": overall.value,
        "interval": list(overall.wilson_interval()),
        "ece": expected_calibration_error(confidence, is_correct),
        "negative_log_likelihood": float(-log_probs[np.arange(len(truth)), truth].mean()),
        "per_class": [
            {
                "name": name,
                "correct": one.correct,
                "total": one.total,
                "accuracy": one.value,
                "interval": list(one.wilson_interval()),
            }
            for name, one in zip(class_names, per_class, strict=True)
        ],
        "confusion": confusion.tolist(),
        "reliability": [asdict(b) for b in reliability_bins(confidence, is_correct)],
    }


def _put_report(
    store: Store, folder: str, report: dict[str, Any], *, crash_kind: str | None = None
) -> StoredObject:
    data = (json.dumps(report, indent=1, sort_keys=True) + "\n").encode()
    return put_object(store, folder, "report", data, "json", crash_kind=crash_kind)


def _correct_by_key(store: Store, validation: Manifest) -> dict[str, bool]:
    predictions = read_evaluation_predictions(store, validation)
    is_correct = predictions.label.astype(np.int64) == predictions.true_label
    return dict(zip(predictions.keys, is_correct.tolist(), strict=True))
