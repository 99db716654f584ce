"""The predictions of one shard as a pass of a selection sees them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.calibration import apply_temperature
from models.calibration_vector import VectorScaling
from models.debiasing import apply_offsets
from models.thresholds import FinishedThresholds, reaches_thresholds
from models.weighting import FinishedWeighting
from storage.corpus import Corpus
from storage.predictions import Predictions, read_predictions, read_record
from storage.samples import sample_key
from storage.store import Store
from tasks.selection_config import SelectionConfig

Step = Literal["calibrate", "debias", "threshold", "weight", "balance", "write"]
STEPS: tuple[Step, ...] = get_args(Step)
"""The order of selection: what is dropped must not count in what comes after it."""


@dataclass(frozen=True)
class SelectionInputs:
    """What every pass over the shards needs to know, with what the steps so far have found.

    Attributes:
        corpus: digest of the labelled corpus.
        labeler: address of its predictions.
        num_classes: C.
        temperature: 1 where confidences are not calibrated by one.
        stream: of the draws that round copies.
        round_index: of the selection.
        vector: scaling of each class, where calibration is vector.
        labeled_counts: (C,) labelled images of each class, where a rule reads them.
        offsets: (C,) what debiasing adds to the logits; None where nothing is debiased.
        thresholds: of the classes.
        weighting: how rows are weighted.
        done: the steps so far, in their order.
    """

    corpus: str
    labeler: str
    num_classes: int
    temperature: float
    stream: int
    round_index: int
    vector: VectorScaling | None = None
    labeled_counts: NDArray[np.int64] | None = None
    offsets: NDArray[np.float64] | None = None
    thresholds: FinishedThresholds | None = None
    weighting: FinishedWeighting | None = None
    done: tuple[Step, ...] = ()

    def after(self, step: Step, **found: Any) -> "SelectionInputs":
        """Return the inputs with what a step found; steps come in their order only."""
        self.assert_next(step)
        return replace(self, done=(*self.done, step), **found)

    def assert_next(self, step: Step) -> None:
        """Assert that all steps before this one are done, and no other."""
        before = STEPS[: STEPS.index(step)]
        assert self.done == before, f"{step} comes after {before}, but {self.done} are done"


@dataclass(frozen=True)
class Rows:
    """The predictions of one shard with what calibration and debiasing make of them.

    Attributes:
        stem: of the shard.
        predictions: as stored.
        labels: (N,) uint32.
        confidences: (N,) float32.
    """

    stem: str
    predictions: Predictions
    labels: NDArray[np.uint32]
    confidences: NDArray[np.float32]
    _log_probs: NDArray[np.float64] | None
    _are_labels_moved: bool

    @classmethod
    def read(
        cls,
        store: Store,
        inputs: SelectionInputs,
        corpus: Corpus,
        stem: str,
        config: SelectionConfig,
    ) -> "Rows":
        """Read one shard's predictions, calibrate and debias them as far as is known."""
        record = prediction_record(store, inputs.labeler, corpus.shard(stem).digest)
        predictions = read_predictions(store, record)
        labels, confidences, log_probs = calibrated_and_debiased(
            predictions,
            temperature=inputs.temperature if config.calibration == "temperature" else None,
            vector=inputs.vector,
            offsets=inputs.offsets,
        )
        are_moved = inputs.vector is not None or inputs.offsets is not None
        return cls(stem, predictions, labels, confidences, log_probs, are_moved)

    def keys(self) -> NDArray[np.str_]:
        """Return the sample keys, (N,)."""
        keys = [sample_key(self.stem, key) for key in self.predictions.keys]
        return np.array(keys, dtype=np.str_)

    def log_probs(self) -> NDArray[np.float64]:
        """Return the calibrated and debiased log-probabilities, (N, C)."""
        if self._log_probs is not None:
            return self._log_probs
        return apply_temperature(self.predictions.log_probs, 1.0)

    def probs(self) -> NDArray[np.float64]:
        """Return the calibrated and debiased probabilities, (N, C)."""
        return np.exp(self.log_probs())

    def target_log_probs(self) -> NDArray[np.floating]:
        """Return what a student learns as soft targets, (N, C).

        The teacher's own distribution; where a step may change the class, the distribution that
        class and confidence are of, for a target must not contradict its label.
        """
        return self.log_probs() if self._are_labels_moved else self.predictions.log_probs

    def passes(self, inputs: SelectionInputs) -> NDArray[np.bool_]:
        """Return which rows reach the threshold, (N,)."""
        assert inputs.thresholds is not None, "the threshold comes before"
        return reaches_thresholds(
            inputs.thresholds,
            self.labels,
            self.confidences,
            uncertainty=self.predictions.uncertainty,
            agreement=self.predictions.agreement,
        )


def calibrated_and_debiased(
    predictions: Predictions,
    *,
    temperature: float | None,
    vector: VectorScaling | None,
    offsets: NDArray[np.float64] | None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float64] | None]:
    """Return label, confidence and log-probabilities as the threshold sees them.

    A temperature alone changes no label. Without any of the three, labels and confidences are the
    teacher's own and the log-probabilities None.
    """
    log_probs = None
    if vector is not None:
        log_probs = vector.apply(predictions.log_probs)
    elif temperature is not None:
        log_probs = apply_temperature(predictions.log_probs, temperature)
    if offsets is not None:
        log_probs = apply_offsets(
            predictions.log_probs if log_probs is None else log_probs, offsets
        )
    labels = predictions.label
    if log_probs is None:
        return labels, predictions.confidence, None
    if vector is not None or offsets is not None:
        labels = log_probs.argmax(axis=1).astype(np.uint32)
    rows = np.arange(predictions.num_samples)
    return labels, np.exp(log_probs[rows, labels]).astype(np.float32), log_probs


def from_summary(
    summary: Mapping[str, Any],
) -> tuple[float | None, VectorScaling | None, NDArray[np.float64] | None]:
    """Return temperature, vector scaling and offsets of a finished selection, as far as it has."""
    vector = summary.get("vector")
    debias = summary.get("debias")
    return (
        summary.get("temperature"),
        None
        if vector is None
        else VectorScaling(np.array(vector["weights"]), np.array(vector["biases"])),
        None if debias is None else np.array(debias["offsets"]),
    )


def prediction_record(store: Store, labeler: str, shard_digest: str) -> dict[str, Any]:
    """Return the record of a shard's predictions.

    Raises: ValueError if there is none.
    """
    record = read_record(store, labeler, shard_digest)
    if record is None:
        raise ValueError(
            f"selection: no prediction of labeler {labeler[:12]} for shard {shard_digest[:12]};"
            " the labelling is not finished or was deleted: run the labelling again"
        )
    return record
