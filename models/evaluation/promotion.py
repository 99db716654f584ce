"""Whether a student becomes the next teacher."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.evaluation.accuracy import Accuracy, normal_quantile


@dataclass(frozen=True)
class PromotionDecision:
    """Comparison of student and teacher on the same dev samples.

    Attributes:
        is_promoted: unless the interval lies wholly below 0.
        difference: student's accuracy - teacher's, as observed.
        low: lower bound of the interval of the difference.
        high: upper bound.
        student: accuracy.
        teacher: accuracy.
        only_student: samples that the student alone has right.
        only_teacher: samples that the teacher alone has right.
    """

    is_promoted: bool
    difference: float
    low: float
    high: float
    student: Accuracy
    teacher: Accuracy
    only_student: int
    only_teacher: int


def paired_interval(
    only_first: int, only_second: int, total: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference of two accuracies measured on the same samples.

    The adjusted Wald interval of Agresti and Min: half a sample is added to each of the four cells,
    so it keeps its level on small splits and is not empty where both always agree.

    Args:
        only_first: samples that the first alone has right.
        only_second: samples that the second alone has right.
        total: all samples.
        level: in (0, 1).
    Returns: bounds of first - second, within [-1, 1].
    Source: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
        proportions", section 2.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > total:
        raise ValueError(f"{only_first} + {only_second} disagreements of {total} samples")
    adjusted_total = total + 2
    gain = only_first - only_second
    disagreements = only_first + only_second + 1
    center = gain / adjusted_total
    error = math.sqrt(disagreements - gain * gain / adjusted_total) / adjusted_total
    half = normal_quantile(level) * error
    return max(-1.0, center - half), min(1.0, center + half)


def decide_promotion(
    student_is_correct: NDArray[np.bool_],
    teacher_is_correct: NDArray[np.bool_],
    *,
    level: float = 0.95,
) -> PromotionDecision:
    """Promote unless the student is worse beyond the paired interval.

    Args:
        student_is_correct: (N,) bool, joined on the sample key with the teacher's.
        teacher_is_correct: (N,) bool.
        level: of the interval.
    Raises: ValueError for different lengths or no samples.
    """
    if student_is_correct.shape != teacher_is_correct.shape or student_is_correct.ndim != 1:
        raise ValueError(
            f"student {student_is_correct.shape} and teacher {teacher_is_correct.shape} must be "
            "judged on the same samples"
        )
    total = len(student_is_correct)
    if total == 0:
        raise ValueError("promotion needs dev samples; the dev split is empty")
    student = Accuracy(int(student_is_correct.sum()), total)
    teacher = Accuracy(int(teacher_is_correct.sum()), total)
    only_student = int((student_is_correct & ~teacher_is_correct).sum())
    only_teacher = int((teacher_is_correct & ~student_is_correct).sum())
    low, high = paired_interval(only_student, only_teacher, total, level)
    return PromotionDecision(
        is_promoted=high >= 0,
        difference=(only_student - only_teacher) / total,
        low=low,
        high=high,
        student=student,
        teacher=teacher,
        only_student=only_student,
        only_teacher=only_teacher,
    )
