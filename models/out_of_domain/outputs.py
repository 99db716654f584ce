"""What a gate reads of a prediction: four numbers, none of them of a class."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Outputs:
    """Predictions as they were stored, before a selection calibrates them.

    Attributes:
        confidence: (N,) in [0, 1].
        margin: (N,) in [0, 1], over the second largest probability.
        entropy: (N,) nats.
        logsumexp: (N,) of the logits.
    """

    confidence: NDArray[np.floating]
    margin: NDArray[np.floating]
    entropy: NDArray[np.floating]
    logsumexp: NDArray[np.floating]

    def table(self) -> NDArray[np.float64]:
        """Return the four as columns, (N, 4)."""
        columns = (self.confidence, self.margin, self.entropy, self.logsumexp)
        return np.stack(columns, axis=1).astype(np.float64)

    @classmethod
    def of_table(cls, table: NDArray[np.float64]) -> "Outputs":
        """Make them of four columns, (N, 4)."""
        return cls(*(table[:, i] for i in range(4)))
