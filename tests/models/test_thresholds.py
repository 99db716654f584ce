"""Fixed confidence threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.thresholds import FixedThresholdConfig, reaches_threshold


def test_confidence_equal_to_the_threshold_is_kept():
    config = FixedThresholdConfig(confidence=0.3)
    confidences = np.array([0.3, np.nextafter(0.3, 0), 0.31, 0.0, 1.0])
    assert reaches_threshold(confidences, config).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("value", [0.7, 0.3, 0.29, 0.95, 0.1])
def test_float32_confidence_written_as_the_threshold_is_kept(value: float):
    # float32(0.7) is 0.699999988 < 0.7
    kept = reaches_threshold(np.array([value], np.float32), FixedThresholdConfig(confidence=value))
    assert kept.tolist() == [True]


def test_zero_keeps_everything_and_one_only_certainty():
    confidences = np.array([0.0, 0.999, 1.0], dtype=np.float32)
    assert reaches_threshold(confidences, FixedThresholdConfig(confidence=0)).all()
    assert reaches_threshold(confidences, FixedThresholdConfig(confidence=1)).tolist() == [
        False,
        False,
        True,
    ]


@given(
    st.lists(st.floats(0, 1, width=32), max_size=20),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_raising_the_threshold_never_adds_a_row(values: list[float], a: float, b: float):
    confidences = np.array(values, dtype=np.float32)
    low = reaches_threshold(confidences, FixedThresholdConfig(confidence=min(a, b)))
    high = reaches_threshold(confidences, FixedThresholdConfig(confidence=max(a, b)))
    assert not (high & ~low).any()


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1, float("inf")])
def test_what_is_no_probability_is_refused(value: float):
    with pytest.raises(ValueError, match=r"1 of 2 confidences lie outside \[0, 1\].*in row 1"):
        reaches_threshold(np.array([0.5, value]), FixedThresholdConfig())


def test_integers_are_no_confidences():
    with pytest.raises(ValueError, match="int64"):
        reaches_threshold(np.array([1, 0]), FixedThresholdConfig())


def test_thresholds_outside_the_unit_interval_are_refused():
    with pytest.raises(ValidationError):
        FixedThresholdConfig(confidence=1.5)
