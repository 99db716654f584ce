"""The teacher's mean prediction over a corpus: exact, kept, and the same in any order."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from models.exact_sums import exact_mean
from storage.manifest import read_record
from tasks.class_prior import class_prior, sum_of_probabilities

# Of each shard: (key, label, confidence); the other two classes share the rest.
ROWS = {
    "unlabeled-0": [("a", 0, 0.8), ("b", 1, 0.5)],
    "unlabeled-1": [("c", 2, 0.9)],
    "unlabeled-2": [("d", 0, 1.0)],
    "unlabeled-3": [("e", 0, 0.4)],
    "unlabeled-4": [],
}


@pytest.fixture
def labeling(lab):
    return lab.plant_labeling(lab.store, lab.unlabeled, ROWS)


def test_the_prior_is_the_mean_over_all_predictions_of_all_shards(lab, labeling):
    # Class 0: .8 + .25 + .05 + 1 + .4 = 2.5 of 5 images; class 1: .1 + .5 + .05 + 0 + .3 = .95;
    # class 2: .1 + .25 + .9 + 0 + .3 = 1.55. A mean of the shards' means would give .5875 first.
    prior = class_prior(lab.store, labeling)
    assert prior.dtype == torch.float64
    # Half precision: each log-probability is off by 2**-11 of itself at most.
    assert_allclose(prior.numpy(), [0.5, 0.19, 0.31], atol=1e-3)
    assert float(prior.sum()) == pytest.approx(1, abs=1e-12)


def test_what_is_computed_once_is_read_the_next_time(lab, labeling, monkeypatch):
    first = class_prior(lab.store, labeling)
    monkeypatch.setattr("tasks.class_prior.read_predictions", None)
    assert torch.equal(class_prior(lab.store, labeling), first)
    path = f"labelings/{labeling.fingerprint}/class_prior.json"
    assert read_record(lab.store, path) == {"schema": 1, "prior": first.tolist()}


def test_rows_that_half_precision_left_off_one_are_divided_by_their_sums():
    # exp(log p) sums to .8 + .4 = 1.2 in the first row, which would count for a fifth too much.
    log_probs = np.log([[0.8, 0.4], [0.25, 0.75]]).astype(np.float16)
    mean = exact_mean(sum_of_probabilities(log_probs), 2)
    assert_allclose(2 * mean, [2 / 3 + 0.25, 1 / 3 + 0.75], rtol=1e-3)


def test_shards_are_added_as_integers_so_that_their_order_changes_no_bit():
    # In float64 .1 + .2 + .3 is not .3 + .2 + .1; tests/models/test_exact_sums.py has the rest.
    shards = [np.log([[p, 1 - p]]).astype(np.float16) for p in (0.1, 0.2, 0.3)]
    one, two, three = (sum_of_probabilities(shard) for shard in shards)
    assert one.dtype == np.int64
    assert np.array_equal((one + two) + three, (three + two) + one)
