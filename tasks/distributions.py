"""Predicted distributions as a threshold sees them: calibrated and debiased, full or top-k."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from models.calibration import apply_temperature
from models.calibration_vector import VectorScaling
from models.debiasing import apply_offsets
from models.top_k_probs import TopKProbs, largest_columns
from storage.predictions import Listed, Predictions

Distributions = NDArray[np.float64] | TopKProbs
"""Log-probabilities of N rows over C classes: (N, C), or the k most probable and a rest."""

_PROBS_AT_A_TIME = 2**20  # 8 MB of float64


@dataclass(frozen=True)
class Calibration:
    """What is done to the stored distributions, in this order; None is left out.

    Attributes:
        temperature: one for all classes; None where it was part of the labelling.
        vector: scaling of each class.
        offsets: (C,) what debiasing adds to the logits.
    """

    temperature: float | None = None
    vector: VectorScaling | None = None
    offsets: NDArray[np.float64] | None = None

    @classmethod
    def of_summary(cls, summary: Mapping[str, Any]) -> "Calibration":
        """Take it out of the summary of a finished selection."""
        vector, debias = summary.get("vector"), summary.get("debias")
        is_labelers = summary.get("is_temperature_of_labeler", False)
        return cls(
            None if is_labelers else summary.get("temperature"),
            None
            if vector is None
            else VectorScaling(np.array(vector["weights"]), np.array(vector["biases"])),
            None if debias is None else np.array(debias["offsets"]),
        )

    def debiased_by(self, offsets: NDArray[np.float64] | None) -> "Calibration":
        """Return it with the offsets of the debiasing."""
        return replace(self, offsets=offsets)

    @property
    def changes_confidences(self) -> bool:
        """Whether stored confidences are not those that the threshold sees."""
        return self.temperature is not None or self.moves_labels

    @property
    def moves_labels(self) -> bool:
        """Whether another class than the teacher's may come out on top; a temperature cannot."""
        return self.vector is not None or self.offsets is not None

    def of(self, log_probs: NDArray[np.floating], listed: Listed | None) -> Distributions:
        """Apply it to stored distributions; rows are normalised, whatever is applied."""
        if listed is not None:
            assert self.temperature is None, "the top_k form is calibrated when it is labelled"
            assert self.vector is None, "refused where the calibration is fitted"
            found = TopKProbs.normalized(
                listed.class_ids, log_probs, listed.rest_mass, listed.num_classes
            )
            return found if self.offsets is None else found.with_offsets(self.offsets)
        if self.vector is not None:
            calibrated = self.vector.apply(log_probs)
        elif self.temperature is not None or self.offsets is None:
            calibrated = apply_temperature(log_probs, self.temperature or 1.0)
        else:
            calibrated = np.asarray(log_probs, dtype=np.float64)
        return calibrated if self.offsets is None else apply_offsets(calibrated, self.offsets)

    def blocks(
        self, log_probs: NDArray[np.floating], listed: Listed | None
    ) -> Iterator[tuple[slice, Distributions]]:
        """Yield the rows of a shard a few at a time, so that float64 copies of them stay small."""
        step = max(1, _PROBS_AT_A_TIME // log_probs.shape[1])
        for start in range(0, len(log_probs), step):
            rows = slice(start, start + step)
            part = None
            if listed is not None:
                part = replace(
                    listed, class_ids=listed.class_ids[rows], rest_mass=listed.rest_mass[rows]
                )
            yield rows, self.of(log_probs[rows], part)

    def labels_and_confidences(
        self,
        labels: NDArray[np.uint32],
        confidences: NDArray[np.float32],
        log_probs: NDArray[np.floating],
        listed: Listed | None,
    ) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Return both as the threshold sees them, from the stored columns of a shard."""
        if not self.changes_confidences:
            return labels, confidences
        labels, confidences = labels.copy(), np.empty(len(labels), np.float32)
        for rows, found in self.blocks(log_probs, listed):
            if self.moves_labels:
                labels[rows] = top_classes(found)
            confidences[rows] = _confidences(found, labels[rows])
        return labels, confidences

    def seen_by_threshold(
        self, predictions: Predictions
    ) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Return labels and confidences of a shard's whole predictions."""
        p = predictions
        return self.labels_and_confidences(p.label, p.confidence, p.log_probs, p.listed)


def top_classes(distributions: Distributions) -> NDArray[np.int64]:
    """Return the most probable class of each row, (N,)."""
    if isinstance(distributions, TopKProbs):
        return distributions.labels
    return distributions.argmax(axis=1)


def most_probable(
    distributions: Distributions, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the most probable classes of each row and their probabilities, (N, count), falling.

    Raises: ValueError if so many classes are not known of a row.
    """
    is_cut = isinstance(distributions, TopKProbs)
    log_probs = distributions.log_probs if is_cut else distributions
    if count > log_probs.shape[1]:
        listed = "these predictions list (labeling.k)" if is_cut else "there are"
        raise ValueError(
            f"selection.balance.classes_per_image={count} is more than the {log_probs.shape[1]}"
            f" classes that {listed}"
        )
    places = largest_columns(log_probs, count)
    probs = np.exp(np.take_along_axis(log_probs, places, axis=1)).astype(np.float32)
    if isinstance(distributions, TopKProbs):
        places = np.take_along_axis(distributions.class_ids, places, axis=1)
    return places, probs


def dense_probs(distributions: Distributions) -> NDArray[np.float64]:
    """Return the probabilities of all classes, (N, C); rest mass is spread evenly."""
    if isinstance(distributions, TopKProbs):
        return distributions.dense_probs()
    return np.exp(distributions)


def _confidences(distributions: Distributions, labels: NDArray[np.uint32]) -> NDArray[np.float64]:
    if isinstance(distributions, TopKProbs):
        return distributions.confidences
    rows = np.arange(len(labels))
    return np.exp(cast("NDArray[np.float64]", distributions[rows, labels]))
