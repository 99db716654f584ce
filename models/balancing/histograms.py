"""Counts of samples by class and confidence bin: what a quota needs to know of a corpus."""

import numpy as np
from numpy.typing import NDArray

from models.thresholds.fixed import check_confidences


def confidence_bins(
    confidences: NDArray[np.floating], edges: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The bin of each confidence: the last edge that it reaches.

    The edges are rounded to the dtype of the confidences and then compared exactly. So a
    confidence written as 0.29 is in bin 29 of hundredths in float32 (where it is 0.28999999) and in
    float64 (where 0.29 * 100 is 28.999999999999996) alike.
    """
    return np.searchsorted(edges.astype(confidences.dtype), confidences, side="right") - 1


def binary_bins(confidences: NDArray[np.floating], num_bins: int) -> NDArray[np.int32]:
    """The bin of each confidence among `num_bins` equal ones, a power of two; 1 is in the last.

    Scaling by a power of two is exact, so a value on an edge belongs to the bin above it.
    """
    scaled = confidences * confidences.dtype.type(num_bins)
    # Of float32 processors make int32 six times as fast as int64.
    bins = scaled.astype(np.int32)
    return np.minimum(bins, num_bins - 1, out=bins)


def check_rows(
    labels: NDArray[np.integer], confidences: NDArray[np.floating], num_classes: int
) -> None:
    """Refuse arrays of different length, NaN, and values or labels out of range."""
    check_confidences(confidences)
    if labels.shape != confidences.shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels of shape {labels.shape} and dtype {labels.dtype} for {len(confidences)} "
            "confidences: must be as many integers"
        )
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels reach from {labels.min()} to {labels.max()}: must be in [0, {num_classes}); "
            "are these predictions of another label space?"
        )


def confidence_histogram(
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    *,
    num_classes: int,
    bins: NDArray[np.integer],
    num_bins: int,
) -> NDArray[np.int64]:
    """Samples by class and bin, (C, num_bins)."""
    check_rows(labels, confidences, num_classes)
    cells = labels.astype(np.int64) * num_bins + bins
    counts = np.bincount(cells, minlength=num_classes * num_bins)
    return counts.astype(np.int64, copy=False).reshape(num_classes, num_bins)


def packed_histogram(histogram: NDArray[np.int64]) -> NDArray[np.integer]:
    """The same counts in as few bytes as hold each of them: what is sent between processes."""
    return histogram.astype(np.min_scalar_type(int(histogram.max(initial=0))))


def merge_histograms(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.int64]:
    """The histogram of both, packed or not; associative and commutative.

    Raises: ValueError if they differ in shape, which addition would hide by broadcasting.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"histograms of shapes {first.shape} and {second.shape} are of different rules or "
            "label spaces"
        )
    return np.add(first, second, dtype=np.int64)
