"""Soft targets of many classes, of which each lists few: what they are until a batch is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.selections import Selection

_VALUES_AT_ONCE = 2**20
"""Dense probabilities that are made at a time to add them up."""


class ListedProbs(NamedTuple):
    """Normalised distributions, ready to be laid out as (n, C).

    Attributes:
        positions: (M,) int64 of the listed probabilities in the flattened (n, C).
        probs: (M,) float32.
        rest: (n,) float32, of each class of a row that is not listed.
    """

    positions: NDArray[np.int64]
    probs: NDArray[np.float32]
    rest: NDArray[np.float32]


@dataclass(frozen=True)
class SparseTargets:
    """n distributions over C classes; the classes that a row does not list share what is left.

    A hard target lists its class alone. Held as it is stored, a listed probability takes four bytes
    up to 65,536 classes: never more than a dense one would.

    Attributes:
        num_classes: C.
        offsets: (n + 1,) int64 from 0; row i lists `ids[offsets[i]:offsets[i + 1]]`.
        ids: (M,) uint16, or uint32 for more classes than that holds.
        log_probs: (M,) float16, natural logarithm.
        rest: (n,) float32, probability of each class that is not listed.
        totals: (n,) float32, what a row's C probabilities sum to and are divided by.
    """

    num_classes: int
    offsets: NDArray[np.int64]
    ids: NDArray[np.uint16 | np.uint32]
    log_probs: NDArray[np.float16]
    rest: NDArray[np.float32]
    totals: NDArray[np.float32]

    @classmethod
    def of(cls, selection: Selection, rows: NDArray[np.int64], num_classes: int) -> "SparseTargets":
        """Take the targets of some rows of a selection, in their order."""
        found = np.diff(selection.target_offsets)[rows]  # 0 where hard
        is_hard = found == 0
        lengths = np.maximum(found, 1)
        offsets = _offsets(lengths)
        ids = np.empty(int(offsets[-1]), _id_type(num_classes))
        log_probs = np.zeros(len(ids), np.float16)
        of_soft = np.repeat(~is_hard, lengths)
        values = _values_of(selection.target_offsets[rows[~is_hard]], found[~is_hard])
        assert (selection.target_ids[values] < num_classes).all(), "classes are the run's"
        ids[of_soft] = selection.target_ids[values]
        log_probs[of_soft] = selection.target_log_probs[values]
        ids[~of_soft] = selection.label[rows[is_hard]]
        share = selection.rest_mass[rows] / np.maximum(num_classes - lengths, 1)
        rest = np.where(is_hard, 0, share).astype(np.float32)
        targets = cls(num_classes, offsets, ids, log_probs, rest, np.ones(len(rows), np.float32))
        targets.totals[:] = targets._sums()
        return targets

    def __len__(self) -> int:
        """Return n."""
        return len(self.rest)

    @property
    def num_bytes(self) -> int:
        """What the arrays hold."""
        arrays = (self.offsets, self.ids, self.log_probs, self.rest, self.totals)
        return sum(array.nbytes for array in arrays)

    def take(self, rows: NDArray[np.int64]) -> "SparseTargets":
        """Return the targets of some rows, in their order; a row may be taken twice."""
        lengths = np.diff(self.offsets)[rows]
        values = _values_of(self.offsets[rows], lengths)
        return SparseTargets(
            self.num_classes,
            _offsets(lengths),
            self.ids[values],
            self.log_probs[values],
            self.rest[rows],
            self.totals[rows],
        )

    @staticmethod
    def joined(parts: Sequence["SparseTargets"]) -> "SparseTargets":
        """Put targets of one number of classes behind each other."""
        return SparseTargets(
            parts[0].num_classes,
            _offsets(np.concatenate([np.diff(part.offsets) for part in parts])),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.log_probs for part in parts]),
            np.concatenate([part.rest for part in parts]),
            np.concatenate([part.totals for part in parts]),
        )

    def normalized(self) -> ListedProbs:
        """Return rows that sum to 1: bit for bit those of `Selection.dense_targets`."""
        lengths = np.diff(self.offsets)
        positions = np.repeat(np.arange(len(self)) * self.num_classes, lengths) + self.ids
        probs = np.exp(self.log_probs.astype(np.float32)) / np.repeat(self.totals, lengths)
        return ListedProbs(positions, probs.astype(np.float32), self.rest / self.totals)

    def _sums(self) -> NDArray[np.float32]:
        """Add up the rows as they are when dense, a few at a time: the order of sums is in it."""
        sums = np.empty(len(self), np.float32)
        at_once = max(1, _VALUES_AT_ONCE // self.num_classes)
        for start in range(0, len(self), at_once):
            end = min(start + at_once, len(self))
            own = slice(int(self.offsets[start]), int(self.offsets[end]))
            rows = np.repeat(np.arange(end - start), np.diff(self.offsets[start : end + 1]))
            dense = np.repeat(self.rest[start:end, None], self.num_classes, axis=1)
            dense[rows, self.ids[own]] = np.exp(self.log_probs[own].astype(np.float32))
            sums[start:end] = dense.sum(axis=1)
        return sums


def target_bytes(*, num_items: int, num_listed: int, num_classes: int) -> int:
    """Return what targets hold, with the weights and confidences beside them.

    Args:
        num_items: n.
        num_listed: M, listed probabilities of all of them; one of a hard target.
        num_classes: C.
    """
    per_listed = _id_type(num_classes).itemsize + np.dtype(np.float16).itemsize
    return num_listed * per_listed + num_items * _BYTES_PER_ITEM


_BYTES_PER_ITEM = 8 + 4 * 4
"""Of an offset, rest and total, weight and confidence."""


def _id_type(num_classes: int) -> np.dtype:
    return np.dtype(np.uint16 if num_classes <= 2**16 else np.uint32)


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _values_of(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places of the values of rows that begin at `starts`, row by row."""
    offsets = _offsets(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
