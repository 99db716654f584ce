"""FlexMatch's thresholds, from the counts of the whole corpus."""

import numpy as np
from numpy.typing import NDArray

from models.thresholds.class_thresholds import ClassThresholds
from models.thresholds.configs import ClassAdaptiveFlexConfig


def flex_counts(
    config: ClassAdaptiveFlexConfig,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    *,
    num_classes: int,
) -> NDArray[np.int64]:
    """Map: (C + 1,) rows of each class above the threshold, and last all other rows."""
    is_above = confidences > confidences.dtype.type(config.confidence)
    cells = np.where(is_above, labels.astype(np.int64), num_classes)
    return np.bincount(cells, minlength=num_classes + 1).astype(np.int64)


def flex_thresholds(config: ClassAdaptiveFlexConfig, counts: NDArray[np.int64]) -> ClassThresholds:
    """Finish: tau beta / (2 - beta), with beta a class's count over the largest count.

    While more rows lie below the threshold than the largest class has above it, beta is a share of
    those instead (warm-up), so that a weak teacher starts with low thresholds.
    """
    learned, unused = counts[:-1], int(counts[-1])
    beta = learned / max(int(learned.max()), unused, 1)
    return ClassThresholds(mapped(beta, config.confidence))


def mapped(beta: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """The convex mapping of learning effects beta in [0, 1] to thresholds."""
    return confidence * beta / (2 - beta)
