"""A threshold for each class, as the rules that learn from the corpus find them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.thresholds.fixed import check_confidences


@dataclass(frozen=True)
class ClassThresholds:
    """The confidence that each class must reach.

    Attributes:
        values: (C,) in [0, 1]; one equal to it is kept.
    """

    values: NDArray[np.float64]

    def are_reached(
        self, labels: NDArray[np.integer], confidences: NDArray[np.floating]
    ) -> NDArray[np.bool_]:
        """Whether each confidence reaches the threshold of its class, (N,); compared in float64."""
        check_confidences(confidences)
        return confidences.astype(np.float64) >= self.values[labels]
