"""Thresholds that read several predictions of an image: uncertainty and agreement."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from models.thresholds import (
    AgreementThresholdConfig,
    FinishedThresholds,
    ThresholdConfig,
    ThresholdSearch,
    UncertaintyThresholdConfig,
    begin_thresholds,
    reaches_thresholds,
    threshold_values,
)

RULES = st.lists(
    st.tuples(st.floats(0, 1, width=32), st.floats(0, 0.5, width=32), st.floats(0, 1, width=32)),
    max_size=20,
)


def column(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def kept(
    thresholds: FinishedThresholds,
    confidences: list[float],
    *,
    uncertainty: list[float] | None = None,
    agreement: list[float] | None = None,
) -> NDArray[np.bool_]:
    return reaches_thresholds(
        thresholds,
        np.zeros(len(confidences), np.uint32),
        column(confidences),
        uncertainty=None if uncertainty is None else column(uncertainty),
        agreement=None if agreement is None else column(agreement),
    )


def test_ups_keeps_confidence_from_tau_and_deviation_below_kappa():
    # The defaults .7 and .05, as released: confidence >= tau_p, deviation < kappa_p.
    found = kept(
        UncertaintyThresholdConfig(),
        [0.7, 0.69, 0.9, 0.9, 0.9],
        uncertainty=[0.01, 0.01, 0.05, 0.0499, 0.2],
    )
    assert found.tolist() == [True, False, False, True, False]


def test_agreement_keeps_the_share_of_votes_from_the_fraction_on():
    both = AgreementThresholdConfig()
    assert kept(both, [0.1, 0.9], agreement=[1.0, 0.5]).tolist() == [True, False]
    some = AgreementThresholdConfig(min_fraction=0.5, confidence=0.7)
    found = kept(some, [0.7, 0.7, 0.69], agreement=[0.5, 0.4, 1.0])
    assert found.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("rule", "lower"),
    [
        (UncertaintyThresholdConfig(), ("confidence", "max_std")),
        (AgreementThresholdConfig(), ("confidence", "min_fraction")),
    ],
    ids=["uncertainty", "agreement"],
)
@given(rows=RULES, limits=st.tuples(*[st.floats(0.01, 1)] * 4))
def test_a_stricter_rule_never_adds_a_row(
    rule: UncertaintyThresholdConfig | AgreementThresholdConfig,
    lower: tuple[str, str],
    rows: list[tuple[float, float, float]],
    limits: tuple[float, float, float, float],
):
    confidence, other = lower
    is_limit_from_above = other == "max_std"
    loose_other, strict_other = sorted(limits[2:], reverse=is_limit_from_above)
    loose = rule.model_copy(update={confidence: min(limits[:2]), other: loose_other})
    strict = rule.model_copy(update={confidence: max(limits[:2]), other: strict_other})
    columns: dict[str, Any] = {
        "uncertainty": [row[1] for row in rows],
        "agreement": [row[2] for row in rows],
    }
    confidences = [row[0] for row in rows]
    assert not (kept(strict, confidences, **columns) & ~kept(loose, confidences, **columns)).any()


def test_neither_rule_looks_at_the_corpus():
    for rule in (UncertaintyThresholdConfig(confidence=0.8), AgreementThresholdConfig()):
        found = begin_thresholds(rule, num_classes=3, round_index=1)
        assert not isinstance(found, ThresholdSearch)
        assert threshold_values(found) == rule.confidence


def test_what_was_not_measured_is_asked_for():
    with pytest.raises(ValueError, match=r"label with labeling\.uncertainty"):
        kept(UncertaintyThresholdConfig(), [0.9], agreement=[1.0])
    with pytest.raises(ValueError, match="several teachers, views or dropout passes"):
        kept(AgreementThresholdConfig(), [0.9], uncertainty=[0.0])


@pytest.mark.parametrize("value", [float("nan"), -0.1])
def test_what_is_no_deviation_or_share_is_refused(value: float):
    with pytest.raises(ValueError, match="1 of 2 standard deviations"):
        kept(UncertaintyThresholdConfig(), [0.9, 0.9], uncertainty=[0.1, value])
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        kept(AgreementThresholdConfig(), [0.9, 0.9], agreement=[1.0, value])


def test_limits_that_keep_nothing_are_refused():
    adapter = TypeAdapter[Any](ThresholdConfig)
    for settings in ({"kind": "uncertainty", "max_std": 0}, {"kind": "agreement", "confidence": 2}):
        with pytest.raises(ValidationError):
            adapter.validate_python(settings)
