"""Several predictions of one image: which views, whose, under which dropout, and what is stored."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models.aggregation import (
    McDropoutConfig,
    TeachersUncertaintyConfig,
    ViewsUncertaintyConfig,
)
from models.durations import Duration
from models.noise import NoiseConfig
from models.views import (
    FiveCropViewConfig,
    HflipViewConfig,
    KRandomViewConfig,
    MultiScaleViewConfig,
)
from storage.predictions import from_parquet, to_parquet
from storage.samples import RawSample
from tasks.ensembles import Ensemble, forward, load_ensemble
from tasks.images import clean_view
from tasks.labeling_config import LabelingConfig
from tasks.predicting import predict_samples
from tasks.shard_items import BadSampleBudget

SHARD = "5" * 64
DROPOUT = McDropoutConfig(passes=4, rate=0.5)


@pytest.fixture(scope="module")
def teacher(pipeline):
    return pipeline.lab.classifier(pipeline.teacher.fingerprint)


@pytest.fixture(scope="module")
def student(pipeline):
    return pipeline.lab.classifier(pipeline.student.fingerprint)


def file_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return memoryview(buffer.getvalue())


def pixels_of(number, *, size=12):
    return np.random.default_rng(number).integers(0, 256, (size, size, 3))


@pytest.fixture(scope="module")
def samples():
    """Seven images of 12 pixels in shard s, larger than the networks' 8."""
    return [RawSample(f"s/{i}", file_of(pixels_of(i)), "png", None, 0) for i in range(7)]


def predict(samples, ensemble, *, shard=SHARD, batch_size=4, limit=0):
    return predict_samples(
        samples, ensemble, shard=shard, batch_size=batch_size, budget=BadSampleBudget("s", limit)
    )


def probs_of(classifier, views):
    """(B, C) of (B, S, S, 3) views, by the network alone."""
    images = torch.from_numpy(np.ascontiguousarray(np.stack(views))).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        return classifier.network(images).softmax(dim=1).double().numpy()


def clean(number):
    return clean_view(Image.fromarray(pixels_of(number).astype(np.uint8)), 8, 0, "bilinear")


def ensemble_of(lab, models, *, class_names=None, **settings):
    return load_ensemble(
        lab.store,
        models,
        LabelingConfig(**settings),
        device=torch.device("cpu"),
        class_names=class_names or lab.class_names,
    )


def looking(*teachers, rates=(), **settings):
    return Ensemble(teachers, LabelingConfig(**settings), rates)


def test_two_views_are_averaged(samples, teacher):
    found = predict(samples, looking(teacher, view=HflipViewConfig()))
    views = [clean(i) for i in range(7)]
    both = probs_of(teacher, views), probs_of(teacher, [view[:, ::-1] for view in views])
    np.testing.assert_allclose(np.exp(found.log_probs), sum(both) / 2, rtol=1e-4)
    # Averaged logits are another thing, by more than rounding.
    logits = predict(samples, looking(teacher, view=HflipViewConfig(), aggregate="mean_logit"))
    geometric = np.sqrt(both[0] * both[1])
    expected = geometric / geometric.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(logits.log_probs), expected, rtol=1e-4)
    assert np.abs(np.exp(found.log_probs) - expected).max() > 1e-3


def test_a_symmetric_image_looks_the_same_in_the_mirror(teacher):
    half = pixels_of(1)[:, :6]
    symmetric = np.concatenate([half, half[:, ::-1]], axis=1)
    samples = [RawSample("s/0", file_of(symmetric), "png", None, 0)]
    once = predict(samples, Ensemble((teacher,)))
    twice = predict(
        samples,
        looking(teacher, view=HflipViewConfig(), uncertainty=ViewsUncertaintyConfig()),
    )
    np.testing.assert_allclose(twice.log_probs, once.log_probs, atol=1e-6)
    assert twice.agreement is not None
    assert twice.uncertainty is not None
    assert twice.agreement.tolist() == [1.0]
    np.testing.assert_allclose(twice.uncertainty, 0, atol=1e-6)


def test_scales_are_shown_to_the_network_at_their_size(samples, teacher):
    sizes = []
    handle = teacher.ready("fp32").register_forward_pre_hook(
        lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:]))
    )
    config = MultiScaleViewConfig(scales=(1.0, 1.5, 2.0), flip=False)
    try:
        predict(samples[:2], looking(teacher, view=config))
    finally:
        handle.remove()
    assert sizes == [(8, 8), (12, 12), (16, 16)]


@pytest.mark.parametrize(
    "view", [KRandomViewConfig(k=3), FiveCropViewConfig()], ids=lambda v: v.kind
)
def test_views_do_not_depend_on_the_batch(samples, teacher, view):
    ensemble = looking(teacher, view=view)
    whole = predict(samples, ensemble)
    alone = [predict([one], ensemble).log_probs[0] for one in samples]
    np.testing.assert_allclose(whole.log_probs, alone, atol=1e-5)
    np.testing.assert_array_equal(predict(samples, ensemble).log_probs, whole.log_probs)


def test_random_views_are_those_of_the_shards_content_and_the_key(samples, teacher):
    ensemble = looking(teacher, view=KRandomViewConfig(k=2))
    found = predict(samples, ensemble).log_probs
    # The shard by another name: keys in it are the same.
    renamed = [replace(one, key=one.key.replace("s/", "t/")) for one in samples]
    budget = BadSampleBudget("t", 0)
    again = predict_samples(renamed, ensemble, shard=SHARD, batch_size=4, budget=budget)
    np.testing.assert_array_equal(again.log_probs, found)
    assert not np.array_equal(predict(samples, ensemble, shard="6" * 64).log_probs, found)
    reseeded = looking(teacher, view=KRandomViewConfig(k=2, seed=1))
    assert not np.array_equal(predict(samples, reseeded).log_probs, found)


def test_dropout_passes_are_the_same_again_and_others_under_another_seed(samples, teacher):
    ensemble = looking(teacher, uncertainty=DROPOUT, rates=(0.5,))
    first = predict(samples, ensemble)
    again = predict(samples, ensemble)
    np.testing.assert_array_equal(again.log_probs, first.log_probs)
    np.testing.assert_array_equal(again.uncertainty, first.uncertainty)
    assert first.uncertainty is not None
    assert (first.uncertainty > 0).all()
    reseeded = looking(teacher, uncertainty=McDropoutConfig(passes=4, seed=1), rates=(0.5,))
    for other in (predict(samples, reseeded), predict(samples, ensemble, shard="6" * 64)):
        assert not np.array_equal(other.log_probs, first.log_probs)


def test_every_batch_of_a_shard_drops_other_units(samples, teacher):
    ensemble = looking(teacher, uncertainty=DROPOUT, rates=(0.5,))
    twice = predict([samples[0], replace(samples[0], key="s/again")], ensemble, batch_size=1)
    assert not np.array_equal(twice.log_probs[0], twice.log_probs[1])


def test_batch_norm_is_in_evaluation_mode_while_dropout_is_on(samples, teacher):
    # A pass that drops next to nothing is the clean prediction; under BatchNorm's statistics of
    # the batch it would be far off.
    ensemble = looking(teacher, uncertainty=DROPOUT, rates=(1e-9,))
    found = predict(samples, ensemble)
    np.testing.assert_allclose(
        found.log_probs, predict(samples, Ensemble((teacher,))).log_probs, atol=1e-5
    )
    assert found.uncertainty is not None
    np.testing.assert_allclose(found.uncertainty, 0, atol=1e-5)


def test_two_teachers_are_averaged_by_class_name(samples, pipeline, teacher, student):
    lab = pipeline.lab
    models = [pipeline.student.fingerprint, pipeline.teacher.fingerprint]
    found = predict(samples, ensemble_of(lab, models, uncertainty=TeachersUncertaintyConfig()))
    views = [clean(i) for i in range(7)]
    both = np.stack([probs_of(teacher, views), probs_of(student, views)])
    np.testing.assert_allclose(np.exp(found.log_probs), both.mean(axis=0), rtol=1e-4)
    labels = both.mean(axis=0).argmax(axis=1)
    rows = np.arange(7)
    assert found.uncertainty is not None
    assert found.agreement is not None
    np.testing.assert_allclose(
        found.uncertainty, both[:, rows, labels].std(axis=0, ddof=1), atol=1e-6
    )
    votes = (both.argmax(axis=2) == labels).mean(axis=0)
    assert found.agreement.tolist() == votes.tolist()
    # In another order of classes, and of teachers.
    swapped = predict(samples, ensemble_of(lab, models[::-1], class_names=["blue", "red", "green"]))
    np.testing.assert_allclose(swapped.log_probs[:, [1, 2, 0]], found.log_probs, atol=1e-6)


def test_dropout_is_as_in_the_teachers_training_unless_it_is_given(pipeline):
    model = pipeline.teacher.fingerprint  # trained with noise.dropout 0.2
    own = ensemble_of(pipeline.lab, [model], uncertainty=McDropoutConfig())
    assert own.dropout_rates == (0.2,)
    assert ensemble_of(pipeline.lab, [model], uncertainty=DROPOUT).dropout_rates == (0.5,)


def test_dropout_of_a_teacher_that_knew_none_is_refused(pipeline, lab):
    order = lab.order(lab.config(noise=NoiseConfig(), duration=Duration(steps=1), warmup=None))
    model = lab.train(order).fingerprint
    with pytest.raises(ValueError, match=r"trained without dropout.*labeling\.uncertainty\.rate"):
        ensemble_of(lab, [model], uncertainty=McDropoutConfig())


def test_a_teacher_that_cannot_take_a_scale_is_refused(pipeline):
    view = MultiScaleViewConfig(scales=(0.5, 1.0))
    with pytest.raises(ValueError, match="shows images of 4 pixels to a network made for 8"):
        ensemble_of(pipeline.lab, [pipeline.teacher.fingerprint], view=view)


def test_what_was_predicted_once_has_neither_deviation_nor_votes(samples, teacher):
    found = predict(samples, Ensemble((teacher,))).to_predictions([-1] * 7)[0]
    assert found.optional == ()


@pytest.mark.parametrize("count", [7, 0])
def test_deviation_and_votes_are_stored(samples, teacher, count):
    ensemble = looking(teacher, uncertainty=DROPOUT, rates=(0.5,))
    found = predict(samples[:count], ensemble).to_predictions([-1] * count)[0]
    read = from_parquet(
        to_parquet(found), num_samples=count, num_classes=3, where="x", optional=found.optional
    )
    assert found.optional == ("uncertainty", "agreement")
    np.testing.assert_array_equal(read.uncertainty, found.uncertainty)
    np.testing.assert_array_equal(read.agreement, found.agreement)


def test_images_that_fill_up_a_batch_are_seen_by_the_network_alone(teacher):
    views = torch.from_numpy(np.stack([pixels_of(i, size=8) for i in range(3)]).astype(np.uint8))
    expected = forward(views, teacher, "fp32")
    shapes = []
    network = teacher.ready("fp32")
    handle = network.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    try:
        found = forward(views, teacher, "fp32", filled_to=5)
    finally:
        handle.remove()
    assert shapes == [(5, 3, 8, 8)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
