"""The rows of a shard as a balancing rule ranks them: found by one pass, needed by the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.balancing import BalanceConfig, classes_per_image


@dataclass(frozen=True)
class Ranked:
    """Rows of a shard, each under a class; once, or under its most probable ones behind each other.

    Attributes:
        rows: (M,) in the shard, ascending.
        labels: (M,) class; of one row each once, the most probable first.
        values: (M,) in [0, 1], by which rows of a class are ranked, the best at 1.
    """

    rows: NDArray[np.intp]
    labels: NDArray[np.integer]
    values: NDArray[np.floating]


@dataclass(frozen=True)
class RankedShard:
    """The rows of a shard, calibrated and debiased, and how those that pass are ranked.

    Attributes:
        labels: (N,).
        confidences: (N,).
        passes: (N,) bool, admitted and at the threshold.
        otherwise: how they are ranked, where it is not once each, under their label and by their
            confidence.
    """

    labels: NDArray[np.integer]
    confidences: NDArray[np.floating]
    passes: NDArray[np.bool_]
    otherwise: Ranked | None = None

    @property
    def ranked(self) -> Ranked:
        """The rows that pass as a balancing rule ranks them."""
        if self.otherwise is not None:
            return self.otherwise
        rows = np.flatnonzero(self.passes)
        return Ranked(rows, self.labels[rows], self.confidences[rows])

    def ranked_where(
        self,
        chosen: Callable[[NDArray[np.integer], NDArray[np.floating]], NDArray[np.bool_]],
    ) -> Ranked:
        """Return those of `ranked` that are chosen, by their classes and values; a few of many."""
        found = self.otherwise
        if found is not None:
            near = np.flatnonzero(chosen(found.labels, found.values))
            return Ranked(found.rows[near], found.labels[near], found.values[near])
        rows = np.flatnonzero(chosen(self.labels, self.confidences) & self.passes)
        return Ranked(rows, self.labels[rows], self.confidences[rows])

    def arrays(self) -> list[NDArray[Any]]:
        """Return it as arrays; `of_arrays` makes it again."""
        found: list[NDArray[Any]] = [self.labels, self.confidences, self.passes]
        if self.otherwise is not None:
            found += [self.otherwise.rows, self.otherwise.labels, self.otherwise.values]
        return found

    @classmethod
    def of_arrays(cls, arrays: Sequence[NDArray[Any]]) -> "RankedShard":
        """Make it of what `arrays` returned."""
        labels, confidences, passes, *otherwise = arrays
        return cls(labels, confidences, passes, Ranked(*otherwise) if otherwise else None)

    @staticmethod
    def most_bytes_of_a_row(balance: BalanceConfig) -> int:
        """Return what the arrays take at most, for each row of the shard."""
        return 8 + 8 + 1 + classes_per_image(balance) * (8 + 8 + 8)
