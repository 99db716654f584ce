"""Exact quantiles of float32 confidences over a corpus, from histograms that shards can add.

Non-negative floats are ordered as their bits are, so the bits are searched digit by digit: each
pass counts one digit of the rows whose leading digits are those found so far. After the last digit
the value is known exactly; a histogram of equal bins would hold most of a confident teacher's
predictions in its last one.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import cast

import numpy as np
from numpy.typing import NDArray

_POOLED_DIGITS = (15, 15)  # bits of each digit: two passes, 0.5 MB
_CLASS_DIGITS = (10, 10, 10)  # three passes, 16 KB a class


@dataclass(frozen=True)
class QuantileSearch:
    """The search for one quantile of each group: the values next below and above it.

    Attributes:
        keep: share of a group above the quantile.
        num_groups: G; 1 where all rows are one group.
        digits: bits of each digit, leading first; they add up to 30, for 1.0 is 0x3F800000.
        found: digits found so far.
        prefixes: (G, 2) leading bits of the two values.
        ranks: (G, 2) their places, from 0, among the rows with these leading bits.
        fractions: (G,) place of the quantile between the two.
    """

    keep: Fraction
    num_groups: int
    digits: tuple[int, ...]
    found: int
    prefixes: NDArray[np.int64]
    ranks: NDArray[np.int64]
    fractions: NDArray[np.float64]

    @classmethod
    def begin(cls, keep: Fraction, *, num_groups: int) -> "QuantileSearch":
        """A search that has seen nothing."""
        none = np.zeros((num_groups, 2), dtype=np.int64)
        digits = _POOLED_DIGITS if num_groups == 1 else _CLASS_DIGITS
        return cls(keep, num_groups, digits, 0, none, none, np.zeros(num_groups))

    def count(
        self, groups: NDArray[np.integer], confidences: NDArray[np.floating]
    ) -> NDArray[np.int64]:
        """Map: (G, 2, 2**bits) rows by group and next digit, for each of the two values.

        Raises: ValueError for anything but float32, whose bits are searched.
        """
        if confidences.dtype != np.float32:
            raise ValueError(f"confidences of dtype {confidences.dtype}: must be float32")
        # + 0 turns a negative zero, whose bits are not in order, into zero.
        bits = (confidences + np.float32(0)).view(np.uint32).astype(np.int64)
        width = self.digits[self.found]
        after = sum(self.digits[self.found + 1 :])
        leading, digit = bits >> (width + after), (bits >> after) & ((1 << width) - 1)
        counts = np.zeros((self.num_groups, 2, 1 << width), dtype=np.int64)
        for side in (0, 1):
            fits = leading == self.prefixes[groups, side]
            cells = (groups[fits].astype(np.int64) << width) + digit[fits]
            found = np.bincount(cells, minlength=self.num_groups << width)
            counts[:, side] = found.reshape(self.num_groups, -1)
        return counts

    def advance(self, counts: NDArray[np.int64]) -> "QuantileSearch | NDArray[np.float64]":
        """Finish a pass: the search with one digit more, or the quantiles (G,).

        A quantile lies between the values next to it as numpy's default method has it; of a group
        without rows it is 0.
        """
        search = self if self.found else self._with_ranks(counts[:, 0].sum(axis=1))
        cumulated = counts.cumsum(axis=2)  # (G, 2, D)
        places = (cumulated <= search.ranks[:, :, None]).sum(axis=2)
        places = np.minimum(places, counts.shape[2] - 1)  # of groups without rows
        reached = np.take_along_axis(cumulated - counts, places[:, :, None], axis=2)[:, :, 0]
        width = self.digits[self.found]
        search = replace(
            search,
            found=self.found + 1,
            prefixes=(search.prefixes << width) + places,
            ranks=search.ranks - reached,
        )
        return search._values(counts) if search.found == len(self.digits) else search

    def _with_ranks(self, totals: NDArray[np.int64]) -> "QuantileSearch":
        """Place the quantile of each group: (1 - keep) (n - 1), exactly."""
        places = [(1 - self.keep) * max(n - 1, 0) for n in cast("list[int]", totals.tolist())]
        lower = [place.numerator // place.denominator for place in places]
        upper = [-(-place.numerator // place.denominator) for place in places]
        fractions = [float(place - below) for place, below in zip(places, lower, strict=True)]
        return replace(self, ranks=np.array([lower, upper]).T, fractions=np.array(fractions))

    def _values(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        bits = np.ascontiguousarray(self.prefixes.astype(np.uint32))
        values = bits.view(np.float32).astype(np.float64)  # (G, 2)
        found = values[:, 0] + self.fractions * (values[:, 1] - values[:, 0])
        return np.where(counts[:, 0].sum(axis=1) > 0, found, 0.0)
