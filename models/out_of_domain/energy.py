"""Energy: high where no logit is large."""

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain.outputs import Outputs


def energy_scores(outputs: Outputs) -> NDArray[np.float64]:
    """Return the negative energy, `log sum exp z`, (N,); high is in domain."""
    return outputs.logsumexp.astype(np.float64)
