"""Distributions cut to their top k: golden values, and equality with the dense ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.calibration import apply_temperature
from models.debiasing import apply_offsets
from models.exact_sums import exact_mean
from models.top_k_probs import TopKProbs, cut_to_top_k
from models.weighting.softmatch import aligned_confidences


def listed(ids: list[int], probs: list[float], rest: float, num_classes: int) -> TopKProbs:
    return TopKProbs.normalized(np.array([ids]), np.log([probs]), np.array([rest]), num_classes)


def dense_of(top: TopKProbs) -> NDArray[np.float64]:
    """The rest spread evenly, row by row."""
    dense = np.empty((len(top.class_ids), top.num_classes))
    for row, (ids, log_probs, rest) in enumerate(
        zip(top.class_ids, top.log_probs, top.rest_mass, strict=True)
    ):
        dense[row] = rest / max(top.num_classes - len(ids), 1)
        dense[row, ids] = np.exp(log_probs)
    return dense


def test_alignment_of_a_cut_row_matches_the_golden_values():
    # Classes 2 and 0 are listed with .5 and .2; 1, 3 and 4 share .3, .1 each. Offsets log(1, 2, .5,
    # 4, 1): weighted .2, .2, .25, .4, .1, of sum 1.15. Class 3, which is not listed, comes out on
    # top with .4 / 1.15 = .347826 and takes the place of the smaller listed one, class 0 (.2). The
    # rest is of classes 0, 1 and 4: (.2 + .2 + .1) / 1.15 = .434783; class 2: .25 / 1.15 = .217391.
    top = listed([2, 0], [0.5, 0.2], 0.3, 5)
    found = top.with_offsets(np.log([1, 2, 0.5, 4, 1]))
    assert found.class_ids.tolist() == [[2, 3]]
    assert np.exp(found.log_probs[0]) == pytest.approx([0.217391, 0.347826], abs=5e-7)
    assert found.rest_mass == pytest.approx([0.434783], abs=5e-7)
    assert found.labels.tolist() == [3]
    assert found.confidences == pytest.approx([0.347826], abs=5e-7)


def test_listed_classes_keep_their_places_where_they_stay_on_top():
    # .5 * 2, .2 * 1, .1 * (1 + 1 + 1): sum 1.5
    found = listed([2, 0], [0.5, 0.2], 0.3, 5).with_offsets(np.log([1, 1, 2, 1, 1]))
    assert found.class_ids.tolist() == [[2, 0]]
    assert np.exp(found.log_probs[0]) == pytest.approx([1 / 1.5, 0.2 / 1.5])
    assert found.rest_mass == pytest.approx([0.3 / 1.5])


@st.composite
def rows_of_probs(draw: st.DrawFn) -> tuple[NDArray[np.float64], int, NDArray[np.float64]]:
    num_classes = draw(st.integers(2, 12))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    log_probs = apply_temperature(rng.normal(0, 3, (draw(st.integers(1, 6)), num_classes)), 1.0)
    return log_probs, draw(st.integers(1, num_classes)), rng.normal(0, 2, num_classes)


@settings(deadline=None)
@given(rows_of_probs())
def test_alignment_equals_that_of_the_dense_row_with_the_rest_spread_evenly(case):
    log_probs, k, offsets = case
    cut = cut_to_top_k(log_probs, temperature=1.0, k=k)
    top = TopKProbs.normalized(cut.class_ids, cut.log_probs, cut.rest_mass, log_probs.shape[1])
    dense = np.exp(apply_offsets(np.log(np.maximum(dense_of(top), 1e-300)), offsets))
    found = top.with_offsets(offsets)
    rows = np.arange(len(dense))
    np.testing.assert_allclose(found.confidences, dense.max(axis=1), rtol=1e-9)
    np.testing.assert_allclose(dense[rows, found.labels], dense.max(axis=1), rtol=1e-9)
    np.testing.assert_allclose(
        np.exp(found.log_probs), np.take_along_axis(dense, found.class_ids, axis=1), rtol=1e-9
    )
    np.testing.assert_allclose(found.rest_mass, 1 - np.exp(found.log_probs).sum(axis=1), atol=1e-9)
    np.testing.assert_allclose(aligned_confidences(top, offsets), dense.max(axis=1), rtol=1e-9)


@settings(deadline=None)
@given(rows_of_probs())
def test_what_lists_every_class_is_the_dense_row(case):
    log_probs, _, offsets = case
    num_classes = log_probs.shape[1]
    cut = cut_to_top_k(log_probs, temperature=1.0, k=num_classes)
    assert cut.rest_mass.tolist() == [0] * len(log_probs)
    top = TopKProbs.normalized(cut.class_ids, cut.log_probs, cut.rest_mass, num_classes)
    np.testing.assert_allclose(top.dense_probs(), np.exp(log_probs), rtol=1e-12)
    expected = np.exp(apply_offsets(log_probs, offsets))
    np.testing.assert_allclose(top.with_offsets(offsets).dense_probs(), expected, rtol=1e-9)


def test_cutting_matches_the_golden_values():
    # At temperature 2 the row .64, .16, .16, .04 has roots .8, .4, .4, .2, of sum 1.8.
    cut = cut_to_top_k(np.log([[0.16, 0.04, 0.64, 0.16]]), temperature=2.0, k=2)
    assert cut.class_ids.tolist() == [[2, 0]]  # of equal ones the smaller class
    assert np.exp(cut.log_probs[0]) == pytest.approx([0.8 / 1.8, 0.4 / 1.8])
    assert cut.rest_mass == pytest.approx([0.6 / 1.8])
    assert cut.confidences == pytest.approx([0.8 / 1.8])
    assert cut.margins == pytest.approx([0.4 / 1.8])
    shares = np.array([0.8, 0.4, 0.4, 0.2]) / 1.8
    assert cut.entropies == pytest.approx([-(shares * np.log(shares)).sum()])
    assert exact_mean(cut.sums, 1) == pytest.approx(np.array([0.4, 0.2, 0.8, 0.4]) / 1.8)


def test_of_equal_probabilities_the_smaller_classes_are_listed():
    cut = cut_to_top_k(np.zeros((2, 9)), temperature=1.0, k=3)
    assert cut.class_ids.tolist() == [[0, 1, 2]] * 2


def test_rows_are_cut_alike_in_any_company(monkeypatch: pytest.MonkeyPatch):
    log_probs = apply_temperature(np.random.default_rng(0).normal(size=(7, 30)), 1.0)
    whole = cut_to_top_k(log_probs, temperature=1.5, k=4)
    monkeypatch.setattr("models.top_k_probs._PROBS_AT_A_TIME", 60)  # two rows at a time
    parts = cut_to_top_k(log_probs, temperature=1.5, k=4)
    for name in ("class_ids", "log_probs", "rest_mass", "confidences", "entropies", "sums"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_a_k_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match="k=4 of 3 classes"):
        cut_to_top_k(np.zeros((1, 3)), temperature=1.0, k=4)


def test_no_rows_are_cut_to_no_rows():
    cut = cut_to_top_k(np.zeros((0, 5)), temperature=1.0, k=2)
    assert cut.class_ids.shape == (0, 2)
    assert cut.sums.tolist() == [[0] * 5] * 2
