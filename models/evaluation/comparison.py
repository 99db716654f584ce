"""Two accuracies compared: exactly on the same samples, or on different ones."""

import math

from models.evaluation.accuracy import Accuracy


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test that two models are equally often right.

    Args:
        only_first: samples that the first alone has right.
        only_second: samples that the second alone has right.
    Returns: in (0, 1]; 1 where they never disagree.
    Source: McNemar 1947, in its exact binomial form.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"{only_first} and {only_second} disagreements: counts are not negative")
    total, fewer = only_first + only_second, min(only_first, only_second)
    # Of `total` fair coins at most `fewer` show one side. Integers: powers of 2 beyond a float.
    term = tail = 1
    for k in range(fewer):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def newcombe_interval(
    first: Accuracy, second: Accuracy, level: float = 0.95
) -> tuple[float, float]:
    """Interval of first - second for accuracies measured on different samples, within [-1, 1].

    Made of the Wilson intervals of both. On samples that overlap it is too wide rather than too
    narrow.

    Raises: ValueError without samples.
    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions",
        method 10.
    """
    if first.value is None or second.value is None:
        raise ValueError("accuracies of no samples cannot be compared")
    difference = first.value - second.value
    first_low, first_high = first.wilson_interval(level)
    second_low, second_high = second.wilson_interval(level)
    low = difference - math.hypot(first.value - first_low, second_high - second.value)
    high = difference + math.hypot(first_high - first.value, second.value - second_low)
    return max(-1.0, low), min(1.0, high)
