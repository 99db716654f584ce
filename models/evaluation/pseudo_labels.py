"""How good the selected pseudo-labels are, where the truth happens to be known."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PseudoLabelQuality:
    """Counts, which add over shards.

    Attributes:
        total: predictions.
        kept: selected, copies counted.
        unique: selected, each once.
        known: of the unique ones, those with a known true label.
        correct: of the known ones, those whose pseudo-label is true.
    """

    total: int
    kept: int
    unique: int
    known: int
    correct: int

    def __add__(self, other: "PseudoLabelQuality") -> "PseudoLabelQuality":
        return PseudoLabelQuality(
            total=self.total + other.total,
            kept=self.kept + other.kept,
            unique=self.unique + other.unique,
            known=self.known + other.known,
            correct=self.correct + other.correct,
        )

    @property
    def precision(self) -> float | None:
        """Share of true pseudo-labels among the unique, known ones; None if none is known."""
        return self.correct / self.known if self.known else None

    @property
    def coverage(self) -> float | None:
        """Share of the predictions that is selected; None of no predictions."""
        return self.unique / self.total if self.total else None


def pseudo_label_quality(
    labels: NDArray[np.integer], true_labels: NDArray[np.integer], copies: NDArray[np.integer]
) -> PseudoLabelQuality:
    """Quality of one shard's selection; for diagnosis only, never for steering.

    Args:
        labels: (N,) pseudo-labels of all predictions.
        true_labels: (N,) truth, -1 where unknown.
        copies: (N,) copies selected, 0 where rejected.
    """
    if not labels.shape == true_labels.shape == copies.shape or labels.ndim != 1:
        raise ValueError(
            f"labels {labels.shape}, true_labels {true_labels.shape} and copies {copies.shape} "
            "must all be (N,)"
        )
    is_kept = copies > 0
    known = np.flatnonzero(is_kept & (true_labels >= 0))  # of an unlabelled corpus mostly none
    return PseudoLabelQuality(
        total=len(labels),
        kept=int(copies.sum(dtype=np.int64)),
        unique=int(is_kept.sum()),
        known=len(known),
        correct=int((labels[known] == true_labels[known]).sum()),
    )
