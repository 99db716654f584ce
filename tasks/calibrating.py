"""The temperature of a model, from the predictions of its validation."""

import numpy as np

from models.calibration import fit_temperature, platt_smoothing
from storage.manifest import Manifest
from storage.store import Store
from tasks.evaluation import read_evaluation_predictions


def dev_temperature(store: Store, validation: Manifest) -> float:
    """Fit the temperature to the dev predictions of a finished validation."""
    dev = read_evaluation_predictions(store, validation)
    truth = dev.true_label.astype(np.int64)
    smoothing = platt_smoothing(len(truth))
    return fit_temperature(dev.log_probs.astype(np.float64), truth, smoothing=smoothing)
