"""The stages on a CUDA device: what the CPU computes, up to rounding; a stop costs nothing."""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from models.durations import Duration
from storage.predictions import prediction_record, read_predictions
from tasks import labeling
from tasks.classifiers import load_classifier
from tasks.devices import threads_of_labeler
from tasks.ensembles import Ensemble
from tasks.labeling_config import LabelingConfig
from tasks.training import TrainingStopped, run_training

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def train(lab, order, *, should_stop=lambda: False):
    return run_training(
        lab.store,
        order,
        device=CUDA,
        on_report=lambda report, total: None,
        should_stop=should_stop,
    )


def weights(lab, manifest):
    return load(lab.store.read(manifest.object("model").path))


def label(lab, model, device, config):
    classifier = load_classifier(lab.store, model, device=device, class_names=lab.class_names)
    labeler = labeling.labeler_fingerprint(
        config,
        teacher=model,
        view={"image_size": 8, "crop_padding": 0, "interpolation": "bilinear", "on": str(device)},
        class_names=lab.class_names,
    )
    stems = [shard.stem for shard in lab.unlabeled.shards]
    done = labeling.label_shards(
        lab.store,
        lab.unlabeled.digest,
        stems,
        Ensemble((classifier,), config),
        labeler=labeler,
        batch_size=4,
        max_bad_samples=0,
    )
    assert sum(done) == lab.unlabeled.num_samples
    return [
        read_predictions(lab.store, prediction_record(lab.store, labeler, shard.digest))
        for shard in lab.unlabeled.shards
    ]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.03)])
def test_labels_are_those_of_the_cpu(lab, precision, tolerance):
    model = lab.train().fingerprint
    config = LabelingConfig(form="full", precision=precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = label(lab, model, CUDA, config)
        assert torch.get_num_threads() == 3, "as it was before decoding beside the GPU"
    finally:
        torch.set_num_threads(threads)
    expected = label(lab, model, torch.device("cpu"), LabelingConfig(form="full"))
    assert [one.keys for one in found] == [one.keys for one in expected]
    confidence = np.concatenate([one.confidence for one in found])
    reference = np.concatenate([one.confidence for one in expected])
    np.testing.assert_allclose(confidence, reference, atol=tolerance)


def test_shards_of_any_size_take_batches_of_few(lab):
    # Of each size a GPU's libraries choose and compile kernels anew.
    classifier = load_classifier(
        lab.store, lab.train().fingerprint, device=CUDA, class_names=lab.class_names
    )
    shapes = set()
    network = classifier.ready("fp32")
    handle = network.register_forward_pre_hook(lambda _, given: shapes.add(len(given[0])))
    ensemble = Ensemble((classifier,), LabelingConfig(form="full"))
    views = torch.zeros(128, 8, 8, 3, dtype=torch.uint8)
    try:
        for count in range(1, 129):
            found = ensemble.predict([views[:count]], shard="5" * 64, batch=0, batch_size=128)
            assert found.log_probs.shape == (count, len(lab.class_names))
    finally:
        handle.remove()
    assert shapes == {16 * i for i in range(1, 9)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_learns_in_every_precision(lab, precision):
    config = lab.config(precision=precision, duration=Duration(steps=120))
    model = train(lab, lab.order(config)).fingerprint
    predicted = label(lab, model, CUDA, LabelingConfig(form="full"))
    known = [(one.label, one.true_label) for one in predicted]
    right = sum(int((labels == truth)[truth >= 0].sum()) for labels, truth in known)
    assert right >= 20, f"of 25 images whose class is known; a third by chance, got {right}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_training_that_was_stopped_goes_on_where_it_was(lab, tmp_path, precision):
    config = lab.config(precision=precision, checkpoint_every_steps=4)
    whole = weights(lab, train(lab, lab.order(config)))

    again = lab.in_store(tmp_path / "again")
    steps = iter(range(100))
    with pytest.raises(TrainingStopped):
        train(again, again.order(config), should_stop=lambda: next(steps) >= 9)
    resumed = weights(again, train(again, again.order(config)))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        # Sums on a GPU may be taken in another order each time.
        torch.testing.assert_close(resumed[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_a_labeler_beside_a_gpu_has_its_share_of_the_cores():
    assert threads_of_labeler("cuda", 1) >= threads_of_labeler("cuda", 2) >= 1
