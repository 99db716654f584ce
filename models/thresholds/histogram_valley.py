"""ASTOD's threshold: the first least filled bin of the confidences' histogram."""

import numpy as np
from numpy.typing import NDArray

from models.thresholds.class_thresholds import ClassThresholds
from models.thresholds.configs import HistogramValleyConfig


def valley_histogram(
    config: HistogramValleyConfig,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    *,
    num_classes: int,
) -> NDArray[np.int64]:
    """Map: (C, bins) rows from `low` up; 1 belongs to the last bin."""
    bins = np.searchsorted(_edges(config).astype(confidences.dtype), confidences, side="right") - 1
    bins = np.minimum(bins, config.bins - 1)
    is_in = bins >= 0
    cells = labels[is_in].astype(np.int64) * config.bins + bins[is_in]
    counts = np.bincount(cells, minlength=num_classes * config.bins)
    return counts.astype(np.int64).reshape(num_classes, config.bins)


def valley_thresholds(
    config: HistogramValleyConfig, histogram: NDArray[np.int64]
) -> ClassThresholds:
    """Finish: the left edge of the first bin with the least count, of all classes or of each.

    Raises: ValueError if all classes together are below `min_per_bin`.
    """
    pooled = histogram.sum(axis=0)
    if pooled.sum() < config.min_per_bin * config.bins:
        raise ValueError(
            f"histogram_valley: {int(pooled.sum())} predictions reach {config.low}, "
            f"{pooled.sum() / config.bins:.1f} for each of {config.bins} bins (limit "
            f"min_per_bin={config.min_per_bin:g}): empty bins would decide. Take fewer bins, a "
            "lower `low`, or another selection.threshold"
        )
    valleys = np.full(len(histogram), pooled.argmin())
    if config.scope == "per_class":
        is_enough = histogram.sum(axis=1) >= config.min_per_bin * config.bins
        valleys = np.where(is_enough, histogram.argmin(axis=1), valleys)
    # As float32, for a confidence written as the edge is to reach it.
    return ClassThresholds(_edges(config).astype(np.float32).astype(np.float64)[valleys])


def _edges(config: HistogramValleyConfig) -> NDArray[np.float64]:
    return config.low + (1 - config.low) * np.arange(config.bins) / config.bins
