"""Largest probability: low where the classifier finds none of its classes."""

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain.outputs import Outputs


def max_prob_scores(outputs: Outputs) -> NDArray[np.float64]:
    """Return the confidence, (N,); high is in domain."""
    return outputs.confidence.astype(np.float64)
