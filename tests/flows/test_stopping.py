"""When the loop ends before its last round."""

import pytest

from flows.stopping import has_stalled


@pytest.mark.parametrize(
    ("accuracies", "patience", "expected"),
    [
        ([0.5], 1, False),  # nothing to compare with
        ([0.5, 0.5], 1, True),  # equal is no gain
        ([0.5, 0.51], 1, False),
        ([0.6, 0.5], 1, True),
        ([0.6, 0.5], 2, False),  # one round of two
        ([0.6, 0.5, 0.55], 2, True),
        ([0.6, 0.5, 0.61], 2, False),
        # A gain over the round before is none if an earlier round was better.
        ([0.5, 0.7, 0.6, 0.65], 2, True),
        ([0.5, 0.7, 0.6, 0.65], 3, False),  # the best is among the last three
        ([0.5, 0.4, 0.3, 0.2], None, False),
        ([], 1, False),
    ],
)
def test_the_loop_stalls_after_so_many_rounds_without_a_new_best(accuracies, patience, expected):
    assert has_stalled(accuracies, patience) is expected
