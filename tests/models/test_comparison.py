"""Two accuracies compared: McNemar's test, and intervals for different samples."""

import pytest

from models.evaluation.accuracy import Accuracy
from models.evaluation.comparison import mcnemar_p_value, newcombe_interval


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 1, 1.0),  # one fair coin shows some side
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 7, 2 * (1 + 8) / 256),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_counts_the_coins_that_fall_as_unevenly(
    only_first: int, only_second: int, p_value: float
) -> None:
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(p_value, abs=0, rel=1e-12)


def test_mcnemar_bears_more_disagreements_than_a_float_has_powers_of_two() -> None:
    # Normal approximation with continuity: z = (200 - 1) / sqrt(10200) = 1.970, p = 0.0488.
    assert mcnemar_p_value(5000, 5200) == pytest.approx(0.0488, abs=2e-4)
    assert mcnemar_p_value(0, 4000) == 0.0  # smaller than any float


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="-1 and 3"):
        mcnemar_p_value(-1, 3)


def test_newcombe_gives_the_intervals_of_the_paper() -> None:
    # Newcombe 1998, table II, method 10: columns a, b, d, h.
    cases = {
        ((56, 70), (48, 80)): (0.0524, 0.3339),
        ((9, 10), (3, 10)): (0.1705, 0.8090),
        ((5, 56), (0, 29)): (-0.0381, 0.1926),
        ((10, 10), (0, 10)): (0.6075, 1.0),
    }
    for (first, second), (low, high) in cases.items():
        found = newcombe_interval(Accuracy(*first), Accuracy(*second))
        assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_newcombe_of_the_other_order_is_the_mirror_image() -> None:
    low, high = newcombe_interval(Accuracy(48, 80), Accuracy(56, 70))
    assert (low, high) == (pytest.approx(-0.3339, abs=5e-5), pytest.approx(-0.0524, abs=5e-5))


def test_newcombe_refuses_accuracies_of_nothing() -> None:
    with pytest.raises(ValueError, match="no samples"):
        newcombe_interval(Accuracy(0, 0), Accuracy(1, 2))
