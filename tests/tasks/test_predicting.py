"""Raw samples to predictions: order, batches cut by position, bad images counted and left out."""

import numpy as np
import pytest

from storage.samples import RawSample
from tasks.ensembles import Ensemble
from tasks.predicting import Predicted, predict_samples
from tasks.shard_items import BadSampleBudget, TooManyBadSamples

BAD = b"GIF89a not one of ours"


@pytest.fixture(scope="module")
def classifier(pipeline):
    return pipeline.lab.classifier(pipeline.teacher.fingerprint)


@pytest.fixture
def samples(lab):
    """Ten images of shard s, of which every other bears a label."""
    return [
        RawSample(f"s/{i}", memoryview(lab.png(i % 3, i)), "png", i % 3 if i % 2 else None, 0)
        for i in range(10)
    ]


def broken(samples, bad):
    return [
        RawSample(s.key, memoryview(BAD), "png", s.label, 0) if i in bad else s
        for i, s in enumerate(samples)
    ]


def predict(samples, classifier, *, batch_size=4, limit=0):
    budget = BadSampleBudget("s", limit)
    predicted = predict_samples(
        samples, Ensemble((classifier,)), shard="0" * 64, batch_size=batch_size, budget=budget
    )
    return predicted, budget


def test_predictions_come_in_the_shards_order_with_its_labels(samples, classifier):
    predicted, budget = predict(samples, classifier)
    assert predicted.keys == tuple("0123456789")
    assert predicted.labels == (None, 1, None, 0, None, 2, None, 1, None, 0)
    assert predicted.log_probs.shape == (10, 3)
    assert predicted.log_probs.dtype == np.float32
    np.testing.assert_allclose(np.exp(predicted.log_probs).sum(axis=1), 1, rtol=1e-5)
    assert budget.reasons == {}


def test_bad_images_are_counted_and_left_out_and_shift_nothing(samples, classifier):
    whole, _ = predict(samples, classifier, batch_size=1)
    predicted, budget = predict(broken(samples, {0, 5}), classifier, limit=2)
    kept = [1, 2, 3, 4, 6, 7, 8, 9]
    assert predicted.keys == tuple(str(i) for i in kept)
    assert predicted.labels == tuple(whole.labels[i] for i in kept)
    np.testing.assert_allclose(predicted.log_probs, whole.log_probs[kept], atol=1e-5)
    assert list(budget.reasons) == ["s/0", "s/5"]
    assert "s/0: not a readable image" in budget.reasons["s/0"]


def test_a_bad_image_changes_no_bit_of_other_batches(samples, classifier):
    # Batches are cut by position in the shard: 0-3, 4-7, 8-9.
    whole, _ = predict(samples, classifier)
    predicted, _ = predict(broken(samples, {1}), classifier, limit=1)
    np.testing.assert_array_equal(predicted.log_probs[3:], whole.log_probs[4:])


def test_one_bad_image_too_many_stops_with_shard_and_key(samples, classifier):
    with pytest.raises(TooManyBadSamples, match=r"shard s: 2 undecodable .*s/5"):
        predict(broken(samples, {1, 5}), classifier, limit=1)


@pytest.mark.parametrize("count", [0, 3])
def test_a_shard_without_decodable_images_gives_no_rows(samples, classifier, count):
    predicted, _ = predict(broken(samples[:count], range(count)), classifier, limit=3)
    assert predicted.keys == ()
    stored, _ = predicted.to_predictions([])
    assert stored.num_samples == 0
    assert stored.num_classes == 3
    assert stored.confidence.shape == (0,)


def test_the_stored_form_has_confidence_margin_and_entropy_of_the_full_vector():
    probs = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], np.float32)
    predicted = Predicted(
        ("a", "b"), (None, 2), np.log(probs), np.array([1.5, -2.0], dtype=np.float32)
    )
    stored, _ = predicted.to_predictions([-1, 2])
    assert stored.keys == ("a", "b")
    assert stored.label.tolist() == [0, 2]
    np.testing.assert_allclose(stored.confidence, [0.5, 0.75], rtol=1e-6)
    np.testing.assert_allclose(stored.margin, [0.25, 0.625], rtol=1e-6)
    # -(1/2 ln 1/2 + 1/2 ln 1/4) = 1.5 ln 2; -(1/4 ln 1/8 + 3/4 ln 3/4) = 0.519860 + 0.215762.
    np.testing.assert_allclose(stored.entropy, [1.039721, 0.735622], rtol=1e-5)
    np.testing.assert_allclose(np.exp(stored.log_probs.astype(np.float32)), probs, rtol=2e-3)
    assert stored.logsumexp.tolist() == [1.5, -2.0]
    assert stored.true_label.tolist() == [-1, 2]
    assert [stored.label.dtype, stored.true_label.dtype] == [np.uint32, np.int32]
