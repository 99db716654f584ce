"""Sums in fixed point: exact, and the same bits in any order and grouping."""

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.exact_sums import exact_mean, exact_sum


def test_the_mean_is_of_rows_not_of_the_means_of_shards():
    # (.5 + .5 + .2) / 3 = .4; the mean of the shards' means would be .35
    sums = exact_sum(np.array([[0.5], [0.5]])) + exact_sum(np.array([[0.2]]))
    assert exact_mean(sums, 3).tolist() == pytest.approx([0.4], abs=1e-15)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
    st.integers(1, 7),
)
def test_order_and_grouping_change_no_bit(values: list[float], random, size: int):
    # A plain float64 sum fails: .1 + .2 + .3 is not .3 + .2 + .1.
    shuffled = np.array(random.sample(values, len(values)))[:, None]
    groups = [exact_sum(shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
    whole = exact_sum(np.array(values)[:, None])
    assert np.array_equal(reduce(np.add, groups), whole)
    mean = exact_mean(whole, len(values))[0]
    assert mean == pytest.approx(math.fsum(values) / len(values), rel=1e-15, abs=2.0**-63)


def test_small_values_are_not_lost_beside_large_ones():
    # A million ones and a million of 2**-60: float64 would drop the latter beside a sum of 1e6.
    sums = exact_sum(np.ones((1000, 1))) * 1000 + exact_sum(np.full((1000, 1), 2.0**-60)) * 1000
    total = (int(sums[0, 0]) << 32) + int(sums[1, 0])
    assert total == (1_000_000 << 64) + 1_000_000 * 2**4


def test_the_words_hold_two_billion_rows():
    one = exact_sum(np.ones((1, 1)))
    assert exact_mean(one * (2**31 - 1), 2**31 - 1).tolist() == [1.0]
    with pytest.raises(ValueError, match="need 1 to 2147483647"):
        exact_mean(one, 2**31)
    with pytest.raises(ValueError, match="0 rows"):
        exact_mean(one * 0, 0)


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1])
def test_what_is_no_probability_is_refused(value: float):
    with pytest.raises(ValueError, match=r"all in \[0, 1\]"):
        exact_sum(np.array([[0.5, value]]))
