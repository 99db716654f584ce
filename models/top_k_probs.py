"""Distributions over many classes of which the k most probable are listed, and the rest is a sum.

Wherever all C probabilities of a row are wanted, the rest mass counts as spread evenly over the
classes that are not listed. Labels, confidences and normalisers of such rows have closed forms, for
which no (N, C) array is made.
"""

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from models.calibration import apply_temperature
from models.exact_sums import exact_sum

_PROBS_AT_A_TIME = 2**22  # probabilities: 32 MB of float64


@dataclass(frozen=True)
class TopKProbs:
    """N distributions over C classes.

    Attributes:
        class_ids: (N, k) int64, of falling probability when made; each once a row.
        log_probs: (N, k) float64; rows of exp sum to 1 with the rest mass.
        rest_mass: (N,) float64 in [0, 1], of the C - k classes that are not listed.
        num_classes: C.
    """

    class_ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    rest_mass: NDArray[np.float64]
    num_classes: int

    @classmethod
    def normalized(
        cls,
        class_ids: NDArray[np.integer],
        log_probs: NDArray[np.floating],
        rest_mass: NDArray[np.floating],
        num_classes: int,
    ) -> "TopKProbs":
        """Make it from values that sum to 1 within their rounding only.

        Where every class is listed there is no rest, whatever rounding left of it.
        """
        values = np.asarray(log_probs, dtype=np.float64)
        rest = np.asarray(rest_mass, dtype=np.float64)
        if values.shape[1] == num_classes:
            rest = np.zeros_like(rest)
        total = np.exp(values).sum(axis=1) + rest
        return cls(
            class_ids.astype(np.int64),
            values - np.log(total)[:, None],
            rest / total,
            num_classes,
        )

    def only(self, chosen: NDArray[np.bool_]) -> "TopKProbs":
        """Return the distributions of some rows, chosen by (N,) bool."""
        return replace(
            self,
            class_ids=self.class_ids[chosen],
            log_probs=self.log_probs[chosen],
            rest_mass=self.rest_mass[chosen],
        )

    @property
    def num_unlisted(self) -> int:
        """Classes that share the rest mass."""
        return self.num_classes - self.class_ids.shape[1]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The most probable class of each row, (N,); of equal ones the first listed."""
        best = self.log_probs.argmax(axis=1)
        return np.take_along_axis(self.class_ids, best[:, None], axis=1)[:, 0]

    @property
    def confidences(self) -> NDArray[np.float64]:
        """Its probability, (N,)."""
        return np.exp(self.log_probs.max(axis=1))

    def with_offsets(self, offsets: NDArray[np.float64]) -> "TopKProbs":
        """Add (C,) offsets to the logits and normalise.

        A class that was not listed may become the most probable one. It then takes the place of the
        least probable listed class, so that label and confidence of a row are among what is listed.
        What remains in the rest mass is exact as a sum, and counts as even again.
        """
        shift = offsets - offsets.max()  # of no effect after normalising, and exp cannot overflow
        listed = np.exp(self.log_probs + shift[self.class_ids])  # (N, k)
        ids = self.class_ids.copy()
        unlisted = np.zeros(len(ids))
        if self.num_unlisted:
            weights = np.exp(shift)
            share = self.rest_mass / self.num_unlisted  # (N,) probability of each unlisted class
            others = np.maximum(weights.sum() - weights[ids].sum(axis=1), 0)
            unlisted = share * others
            best, best_weight = _first_unlisted(ids, shift)
            rivals = share * best_weight
            rows = np.flatnonzero(rivals > listed.max(axis=1))
            least = listed[rows].argmin(axis=1)
            unlisted[rows] += listed[rows, least] - rivals[rows]
            ids[rows, least], listed[rows, least] = best[rows], rivals[rows]
        unlisted = np.maximum(unlisted, 0)
        total = listed.sum(axis=1) + unlisted
        with np.errstate(divide="ignore"):  # a listed probability may vanish
            log_probs = np.log(listed) - np.log(total)[:, None]
        return TopKProbs(ids, log_probs, unlisted / total, self.num_classes)

    def dense_probs(self) -> NDArray[np.float64]:
        """The probabilities of all classes, (N, C), the rest spread evenly: for few rows."""
        share = self.rest_mass / max(self.num_unlisted, 1)
        dense = np.repeat(share[:, None], self.num_classes, axis=1)
        np.put_along_axis(dense, self.class_ids, np.exp(self.log_probs), axis=1)
        return dense


def _first_unlisted(
    class_ids: NDArray[np.int64], shift: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The unlisted class of the largest offset of each row, and the exponential of its offset.

    Of the k + 1 classes with the largest offsets at least one is not listed. Of equal offsets the
    smaller class comes first.
    """
    k = class_ids.shape[1]
    leading = np.argsort(-shift, kind="stable")[: k + 1]
    found = np.full(len(class_ids), -1, dtype=np.int64)
    for candidate in leading.tolist():
        is_open = (found < 0) & (class_ids != candidate).all(axis=1)
        found[is_open] = candidate
        if (found >= 0).all():
            break
    return found, np.exp(shift[found])


@dataclass(frozen=True)
class TopKRows:
    """What is kept of N whole calibrated distributions when all but k classes are dropped.

    Attributes:
        class_ids: (N, k) int64, of falling probability, of equal ones the smaller class first.
        log_probs: (N, k) float64.
        rest_mass: (N,) float64.
        confidences: (N,) float64, largest probability.
        margins: (N,) float64, over the second largest.
        entropies: (N,) float64, nats.
        sums: (2, C) exact sum of the whole distributions, see `exact_sum`.
    """

    class_ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    rest_mass: NDArray[np.float64]
    confidences: NDArray[np.float64]
    margins: NDArray[np.float64]
    entropies: NDArray[np.float64]
    sums: NDArray[np.int64]


def cut_to_top_k(log_probs: NDArray[np.floating], *, temperature: float, k: int) -> TopKRows:
    """Calibrate distributions by a temperature and keep their k most probable classes.

    Args:
        log_probs: (N, C), uncalibrated.
        temperature: positive.
        k: 1 to C.
    Raises: ValueError for another k.
    """
    num_rows, num_classes = log_probs.shape
    if not 1 <= k <= num_classes:
        raise ValueError(f"k={k} of {num_classes} classes: must be 1 to all")
    step = max(1, _PROBS_AT_A_TIME // num_classes)
    starts = range(0, max(num_rows, 1), step)
    parts = [_cut(log_probs[start : start + step], temperature, k) for start in starts]
    return TopKRows(
        class_ids=np.concatenate([part.class_ids for part in parts]),
        log_probs=np.concatenate([part.log_probs for part in parts]),
        rest_mass=np.concatenate([part.rest_mass for part in parts]),
        confidences=np.concatenate([part.confidences for part in parts]),
        margins=np.concatenate([part.margins for part in parts]),
        entropies=np.concatenate([part.entropies for part in parts]),
        sums=reduce(np.add, [part.sums for part in parts]),
    )


def _cut(log_probs: NDArray[np.floating], temperature: float, k: int) -> TopKRows:
    whole = apply_temperature(log_probs, temperature)  # (n, C)
    probs = np.exp(whole)
    num_classes = whole.shape[1]
    ids = largest_columns(whole, max(k, min(2, num_classes)))  # a margin needs two
    top_two = np.exp(np.take_along_axis(whole, ids[:, :2], axis=1))
    ids = ids[:, :k]
    kept = np.take_along_axis(whole, ids, axis=1)
    is_all = k == num_classes
    rest = np.zeros(len(whole)) if is_all else np.maximum(1 - np.exp(kept).sum(axis=1), 0)
    entropies = np.maximum(-(probs * whole).sum(axis=1), 0)
    margins = top_two[:, 0] - top_two[:, -1] if num_classes > 1 else top_two[:, 0]
    return TopKRows(ids, kept, rest, top_two[:, 0], margins, entropies, exact_sum(probs))


def largest_columns(values: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """The columns of the k largest values of each row, (N, k), falling.

    Of equal values the smaller column comes first.
    """
    num_columns = values.shape[1]
    if k == num_columns:
        return np.argsort(-values, axis=1, kind="stable")
    ids = np.sort(np.argpartition(values, num_columns - k, axis=1)[:, num_columns - k :], axis=1)
    found = np.take_along_axis(values, ids, axis=1)
    smallest = found.min(axis=1, keepdims=True)
    # Where the k-th value occurs once more, which of the equal ones was taken is arbitrary.
    is_tied = (values == smallest).sum(axis=1) > (found == smallest).sum(axis=1)
    ids[is_tied] = np.sort(np.argsort(-values[is_tied], axis=1, kind="stable")[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(values, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)
