"""Rows near a boundary, ranked so that any order of merging keeps the same ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KeysOfRows = Callable[[NDArray[np.intp]], NDArray[np.str_]]
Keys = NDArray[np.str_] | KeysOfRows
"""The sample keys of N rows, or what gives those of some rows, where most are never asked for."""

_SORTED_TOGETHER = 2**17


def keys_of(keys: Keys, num_rows: int) -> KeysOfRows:
    """What gives the keys of some rows.

    Raises: ValueError for an array of another length or kind.
    """
    if callable(keys):
        return keys
    check_keys(keys, num_rows)
    return keys.__getitem__


def check_keys(keys: NDArray[np.str_], num_rows: int) -> None:
    """Refuse an array of another length or kind."""
    if keys.shape != (num_rows,) or keys.dtype.kind != "U":
        raise ValueError(
            f"keys of shape {keys.shape} and dtype {keys.dtype} for {num_rows} rows: must be as "
            "many strings (a numpy array of dtype U)"
        )


@dataclass(frozen=True)
class Candidates:
    """Rows sorted by class, then confidence from high to low, then key; at most `limits` a class.

    Attributes:
        labels: (N,) int64.
        confidences: (N,) float64.
        keys: (N,) str; empty ones where keys are not needed, of which rows then are alike.
        limits: (C,) int64, rows kept of each class.
    """

    labels: NDArray[np.int64]
    confidences: NDArray[np.float64]
    keys: NDArray[np.str_]
    limits: NDArray[np.int64]


def best_candidates(
    labels: NDArray[np.int64],
    confidences: NDArray[np.float64],
    keys: NDArray[np.str_],
    limits: NDArray[np.int64],
) -> Candidates:
    """The best `limits[c]` rows of each class c; a row dropped here can never be among the best."""
    order = np.lexsort((keys, -confidences, labels))
    labels, confidences, keys = labels[order], confidences[order], keys[order]
    starts = np.searchsorted(labels, np.arange(len(limits)))  # (C,)
    ranks = np.arange(len(labels)) - starts[labels]
    is_best = ranks < limits[labels]
    return Candidates(labels[is_best], confidences[is_best], keys[is_best], limits)


def merge_candidates(first: Candidates, *others: Candidates) -> Candidates:
    """The best of all; associative and commutative, for rows of one rank are alike.

    Raises: ValueError if their limits differ, that is, if they are of different plans.
    """
    if not all(np.array_equal(first.limits, other.limits) for other in others):
        raise ValueError("candidates of different plans cannot be merged: their limits differ")
    parts = [first, *others]
    return best_candidates(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.confidences for part in parts]),
        np.concatenate([part.keys for part in parts]),
        first.limits,
    )


def merge_all_candidates(parts: Iterable[Candidates]) -> Candidates:
    """The best of all parts, at least one, which need not all be there at once.

    Sorting anew with each of many small parts would take as long as finding them, so they wait
    until they are as many rows as the best so far.
    """
    waiting: list[Candidates] = []
    for part in parts:
        waiting.append(part)
        num_rows = sum(len(one.labels) for one in waiting)
        if num_rows > max(2 * len(waiting[0].labels), _SORTED_TOGETHER):
            waiting = [merge_candidates(*waiting)]
    return merge_candidates(*waiting)
