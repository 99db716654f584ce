"""Entropy: high where the probability is spread over the classes."""

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain.outputs import Outputs


def entropy_scores(outputs: Outputs) -> NDArray[np.float64]:
    """Return the negative entropy, (N,); high is in domain."""
    return -outputs.entropy.astype(np.float64)
