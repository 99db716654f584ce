"""What calibrates a labeler: predictions of dev, made as its labels are."""

import numpy as np
from numpy.typing import NDArray

from models.calibration import fit_temperature, platt_smoothing
from storage.corpus import load_corpus
from storage.manifest import Manifest
from storage.predictions import UNKNOWN_LABEL, prediction_record, read_predictions
from storage.store import Store
from tasks.evaluation import read_evaluation_predictions
from tasks.specifications import finished_result, read_result


def finished_calibration(store: Store, fingerprint: str) -> Manifest:
    """Return the finished stage that predicted dev: a validation, or a labelling of dev.

    Raises: ValueError if there is neither.
    """
    labeled = read_result(store, "label", fingerprint)
    return finished_result(store, "validate", fingerprint) if labeled is None else labeled


def read_dev_predictions(
    store: Store, manifest: Manifest
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (N, C) log-probabilities and (N,) true labels of dev.

    Raises: DamagedPredictions; ValueError for a labelling of images without labels, or in the top_k
        form.
    """
    if manifest.kind != "label":
        dev = read_evaluation_predictions(store, manifest)
        return dev.log_probs.astype(np.float64), dev.true_label.astype(np.int64)
    labeler, corpus = (manifest.inputs[name].fingerprint for name in ("labeler", "corpus"))
    log_probs: list[NDArray[np.float64]] = []
    truth: list[NDArray[np.int64]] = []
    for shard in load_corpus(store, corpus).shards:
        part = read_predictions(store, prediction_record(store, labeler, shard.digest))
        if part.form != "full" or (part.true_label == UNKNOWN_LABEL).any():
            raise ValueError(
                f"labelling {manifest.fingerprint[:12]} cannot calibrate: shard {shard.stem} has"
                " images without labels, or the top_k form. Label dev, with form=full"
            )
        log_probs.append(part.log_probs.astype(np.float64))
        truth.append(part.true_label.astype(np.int64))
    return np.concatenate(log_probs), np.concatenate(truth)


def dev_temperature(store: Store, calibration: Manifest) -> float:
    """Fit the temperature to the predictions of dev of a finished stage."""
    log_probs, truth = read_dev_predictions(store, calibration)
    return fit_temperature(log_probs, truth, smoothing=platt_smoothing(len(truth)))
