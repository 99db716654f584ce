"""Accuracy, calibration error, promotion and pseudo-label quality."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.evaluation.accuracy import Accuracy, accuracy, per_class_accuracy, wilson_interval
from models.evaluation.calibration_error import expected_calibration_error, reliability_bins
from models.evaluation.promotion import decide_promotion, paired_interval
from models.evaluation.pseudo_labels import PseudoLabelQuality, pseudo_label_quality


def test_ece_matches_the_golden_value():
    # both pairs of one bin: |0.5 - 0.75| = 0.25
    confidences = np.array([0.95, 0.95, 0.55, 0.55])
    is_correct = np.array([True, False, True, False])
    assert expected_calibration_error(confidences, is_correct, 2) == pytest.approx(0.25)


def test_ece_weighs_bins_by_their_samples():
    # bin (0, .5]: 1 sample, confidence .4, wrong: .4; bin (.5, 1]: 3 samples, .9, all right: .1
    confidences = np.array([0.4, 0.9, 0.9, 0.9])
    is_correct = np.array([False, True, True, True])
    assert expected_calibration_error(confidences, is_correct, 2) == pytest.approx(
        (1 * 0.4 + 3 * 0.1) / 4
    )


def test_reliability_bins_are_closed_above_and_hold_both_ends():
    bins = reliability_bins(np.array([0.0, 0.5, 0.500001, 1.0]), np.ones(4, dtype=bool), 2)
    assert [b.total for b in bins] == [2, 2]
    assert (bins[0].low, bins[0].high, bins[1].high) == (0.0, 0.5, 1.0)
    assert bins[0].confidence == 0.25


def test_float32_confidence_on_an_edge_is_in_the_bin_below():
    # float32(0.1) is above 0.1
    bins = reliability_bins(np.array([0.1], dtype=np.float32), np.array([True]), 10)
    assert [b.total for b in bins] == [1] + [0] * 9


def test_ece_of_nothing_is_unknown_and_nan_is_refused():
    assert expected_calibration_error(np.zeros(0), np.zeros(0, dtype=bool)) is None
    with pytest.raises(ValueError, match="outside"):
        expected_calibration_error(np.array([np.nan]), np.array([True]))


def test_wilson_interval_matches_worked_values():
    # 9 of 10, z = 1.959964: centre (.9 + .192073) / 1.384146 = .788986,
    # half 1.959964 * sqrt(.009 + .009604) / 1.384146 = .193137
    low, high = Accuracy(9, 10).wilson_interval()
    assert low == pytest.approx(0.595850, abs=1e-6)
    assert high == pytest.approx(0.982124, abs=1e-6)


def test_wilson_interval_is_not_empty_at_the_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(10, 10)
    assert high == 1.0
    assert low == pytest.approx(0.722467, abs=1e-6)  # 1 / (1 + z^2 / 10)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(1 - 0.722467, abs=1e-6))


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.5, 0.999))
def test_wilson_interval_holds_the_share_and_stays_in_the_unit_interval(
    a: int, b: int, level: float
):
    low, high = wilson_interval(min(a, b), max(a, b), level)
    assert 0 <= low <= high <= 1
    if max(a, b):
        assert low <= min(a, b) / max(a, b) <= high


def test_accuracy_adds_over_shards_and_is_unknown_of_nothing():
    total = accuracy(np.array([0, 1]), np.array([0, 0])) + accuracy(np.array([2]), np.array([2]))
    assert total == Accuracy(2, 3)
    assert Accuracy(0, 0).value is None
    assert Accuracy(1, 4).value == 0.25
    with pytest.raises(ValueError, match="impossible"):
        Accuracy(2, 1)


def test_per_class_accuracy_is_by_true_class():
    labels, predictions = np.array([0, 0, 1, 3]), np.array([0, 1, 1, 0])
    assert per_class_accuracy(labels, predictions, num_classes=4) == (
        Accuracy(1, 2),
        Accuracy(1, 1),
        Accuracy(0, 0),
        Accuracy(0, 1),
    )
    with pytest.raises(ValueError, match="label 3 where there are 2"):
        per_class_accuracy(labels, predictions, num_classes=2)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="must both"):
        accuracy(np.array([0, 1]), np.array([0]))


def test_paired_interval_matches_agresti_and_min_by_hand():
    # 6 and 2 disagreements of 100: n* = 102, d = 4 / 102 = .0392157,
    # error = sqrt(9 - 16 / 102) / 102 = .0291541; z = 1.959964
    low, high = paired_interval(6, 2, 100)
    assert low == pytest.approx(-0.0179253, abs=1e-6)
    assert high == pytest.approx(0.0963567, abs=1e-6)


def test_paired_interval_is_antisymmetric():
    low, high = paired_interval(6, 2, 100)
    assert paired_interval(2, 6, 100) == pytest.approx((-high, -low))


def judged(both: int, student: int, teacher: int, neither: int):
    student_right = [True] * both + [True] * student + [False] * (teacher + neither)
    teacher_right = [True] * both + [False] * student + [True] * teacher + [False] * neither
    return decide_promotion(np.array(student_right), np.array(teacher_right))


def test_equal_and_slightly_worse_students_are_promoted():
    assert judged(80, 0, 0, 20).is_promoted
    decision = judged(80, 4, 6, 10)
    assert decision.is_promoted
    assert decision.difference == -0.02
    assert (decision.only_student, decision.only_teacher) == (4, 6)
    assert (decision.student.correct, decision.teacher.correct) == (84, 86)


def test_clearly_worse_student_is_not_promoted():
    # 2 against 20 of 100: d = -18 / 102 = -.176, error = sqrt(23 - 3.18) / 102 = .0436
    decision = judged(70, 2, 20, 8)
    assert not decision.is_promoted
    assert decision.high < 0


def test_promotion_needs_the_same_samples_and_some():
    with pytest.raises(ValueError, match="same samples"):
        decide_promotion(np.array([True]), np.array([True, False]))
    with pytest.raises(ValueError, match="dev split is empty"):
        decide_promotion(np.zeros(0, dtype=bool), np.zeros(0, dtype=bool))


def test_pseudo_label_quality_counts_copies_unique_and_known():
    quality = pseudo_label_quality(
        labels=np.array([0, 1, 2, 3, 1], dtype=np.uint32),
        true_labels=np.array([0, 2, -1, 3, 1], dtype=np.int32),
        copies=np.array([3, 1, 1, 0, 2], dtype=np.uint16),
    )
    assert quality == PseudoLabelQuality(total=5, kept=7, unique=4, known=3, correct=2)
    assert quality.precision == pytest.approx(2 / 3)
    assert quality.coverage == 0.8


def test_unknown_truth_never_counts_as_right():
    # as uint32, -1 would be 4294967295, a legal label
    quality = pseudo_label_quality(
        np.array([4294967295], dtype=np.uint32),
        np.array([-1], dtype=np.int32),
        np.array([1], dtype=np.uint16),
    )
    assert quality.known == 0
    assert quality.precision is None


def test_quality_adds_over_shards():
    a = PseudoLabelQuality(total=2, kept=3, unique=1, known=1, correct=0)
    b = PseudoLabelQuality(total=3, kept=1, unique=1, known=0, correct=0)
    assert a + b == PseudoLabelQuality(total=5, kept=4, unique=2, known=1, correct=0)
    assert PseudoLabelQuality(0, 0, 0, 0, 0).coverage is None
