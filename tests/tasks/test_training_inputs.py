"""What a training starts from and calls: real stages that follow one another in a store."""

from typing import Any

import pytest
import torch

from models.architectures import SmallCnnConfig, WideResNetConfig
from models.description import weights_from_bytes
from models.durations import Duration
from models.finetuning import FinetuneConfig
from models.noise import NoiseConfig
from models.objectives import DistillationConfig, FixMatchConfig, JointConfig
from models.optimization import SGDConfig
from storage.manifest import Manifest, read_stored
from tasks.classifiers import UnknownModel, read_description
from tasks.initial_weights import WeightsMismatch, store_initial_weights
from tasks.training import read_curve
from tasks.training_inputs import frozen_teacher
from tasks.training_orders import TrainingOrder, pretraining_config, specify

FINETUNE = FinetuneConfig(duration=Duration(steps=4), optimizer=SGDConfig(lr=0.01), batch_size=6)


def weights_of(lab, manifest: Manifest) -> dict[str, torch.Tensor]:
    return weights_from_bytes(read_stored(lab.store, manifest.object("model")))


def trained(lab, config, *, role: Any = "student", **more: Any) -> Manifest:
    specification = specify(
        config,
        seed=0,
        round_index=1,
        role=role,
        class_names=lab.class_names,
        labeled=lab.labeled.digest,
        **more,
    )
    return lab.train(TrainingOrder(specification, config, 0))


def test_a_stage_starts_from_the_weights_before_it(pipeline, lab):
    # At learning rate 1e-12 nothing moves; a training from fresh weights would end elsewhere.
    still = FINETUNE.model_copy(update={"optimizer": SGDConfig(lr=1e-12)})
    teacher = lab.train()
    after = trained(
        lab, still.training(lab.config()), role="finetune", init={"init": teacher.fingerprint}
    )
    before, now = weights_of(lab, teacher), weights_of(lab, after)
    assert before.keys() == now.keys()
    moved = [n for n in before if not torch.allclose(before[n].float(), now[n].float(), atol=1e-6)]
    assert {name.rpartition(".")[2] for name in moved} <= {
        *("running_mean", "running_var", "num_batches_tracked")
    }
    assert after.inputs["init"].manifest_sha256 == teacher.sha256
    assert after.settings["role"] == "finetune"


def test_frozen_layers_and_their_batchnorm_stand_still_and_the_others_learn(lab):
    config = lab.config(architecture=WideResNetConfig(depth=10, width=1))
    teacher = lab.train(lab.order(config))
    after = trained(
        lab,
        FINETUNE.training(config),
        role="resolution_fix",
        init={"init": teacher.fingerprint},
        frozen_fraction=0.7,
    )
    before, now = weights_of(lab, teacher), weights_of(lab, after)
    equal = {name for name in before if torch.equal(before[name], now[name])}
    # Three blocks of a WRN-10-1, of which 0.7 are two: stem and blocks 0 and 1, statistics too.
    shallow = {n for n in before if n.startswith(("backbone.conv.", "backbone.blocks.0.",
                                                  "backbone.blocks.1."))}  # fmt: skip
    assert any("running_mean" in name for name in shallow)
    assert equal == shallow


def test_the_average_starts_from_the_same_weights_as_the_model(lab):
    # An average that began at fresh weights would still be near them after four steps.
    still = FINETUNE.model_copy(
        update={"optimizer": SGDConfig(lr=1e-12), "ema": lab.config().ema}
    ).training(lab.config())
    teacher = lab.train()
    after = trained(lab, still, role="finetune", init={"init": teacher.fingerprint})
    before, now = weights_of(lab, teacher), weights_of(lab, after)
    head = next(name for name in before if before[name].ndim == 2)
    assert torch.allclose(before[head], now[head], atol=1e-6)


def test_a_resolution_fix_gives_a_model_of_the_higher_resolution(lab):
    teacher = lab.train()
    fix = FINETUNE.model_copy(update={"image_size": 16}).training(lab.config())
    after = trained(lab, fix, role="resolution_fix", init={"init": teacher.fingerprint})
    assert read_description(lab.store, after.fingerprint).image_size == 16
    assert read_description(lab.store, teacher.fingerprint).image_size == 8


def test_weights_from_elsewhere_are_where_a_training_starts(lab, tmp_path):
    teacher = lab.train()
    path = tmp_path / "w.safetensors"
    path.write_bytes(read_stored(lab.store, teacher.object("model")))
    sha256 = store_initial_weights(lab.store, str(path), lab.config().architecture)
    path.unlink()  # the store has it now
    still = lab.config(optimizer=SGDConfig(lr=1e-12), ema=None, warmup=None)
    after = trained(lab, still, init={"init_weights": sha256})
    before, now = weights_of(lab, teacher), weights_of(lab, after)
    head = next(name for name in before if before[name].ndim == 2)
    assert torch.allclose(before[head], now[head], atol=1e-6)
    assert after.inputs["init_weights"].fingerprint == sha256


def test_a_model_that_is_gone_or_of_another_network_is_refused(lab):
    with pytest.raises(UnknownModel):
        trained(lab, lab.config(), init={"init": "9" * 64})
    teacher = lab.train()
    wider = lab.config(architecture=SmallCnnConfig(width=8, depth=1))
    with pytest.raises(WeightsMismatch, match="of another shape"):
        trained(lab, wider, init={"init": teacher.fingerprint})


def test_pretraining_reads_no_labelled_image(pipeline):
    lab = pipeline.lab
    config = pretraining_config(lab.config(unlabeled_ratio=2))
    manifest = trained(lab, config, selection=pipeline.selection.fingerprint)
    assert manifest.counts["labeled_images_seen"] == 0
    assert manifest.counts["pseudo_images_seen"] == 20 * 12


def test_an_online_student_trains_on_the_unlabelled_corpus(lab):
    config = lab.config(unlabeled_ratio=2, objective=FixMatchConfig(threshold=0.4))
    manifest = trained(lab, config, unlabeled=lab.unlabeled.digest)
    assert manifest.counts["pseudo_images_seen"] == 20 * 12
    assert manifest.inputs["unlabeled"].fingerprint == lab.unlabeled.digest
    assert "selection" not in manifest.inputs
    kept = [row["pseudo_kept"] for row in read_curve(lab.store, manifest)]
    assert all(0 <= share <= 1 for share in kept)
    assert len(set(kept)) > 1


def test_a_distilled_student_learns_the_classes_without_a_label(pipeline):
    lab = pipeline.lab
    config = lab.config(
        unlabeled_ratio=2,
        objective=DistillationConfig(),
        noise=NoiseConfig(),
        duration=Duration(steps=60),
    )
    given = {"unlabeled": lab.unlabeled.digest, "teacher": pipeline.teacher.fingerprint}
    manifest = trained(lab, config, **given)
    assert manifest.inputs["teacher"].manifest_sha256 == pipeline.teacher.sha256
    assert manifest.counts["labeled_images_seen"] == 0
    # Classes that it knows from its teacher alone; chance is a third.
    assert lab.evaluate("validate", manifest.fingerprint).counts["accuracy"] > 0.5


def test_the_teacher_that_is_called_is_frozen_and_answers_in_the_runs_class_order(pipeline):
    lab = pipeline.lab
    config = lab.config(unlabeled_ratio=2, objective=DistillationConfig())
    given = {"unlabeled": lab.unlabeled.digest, "teacher": pipeline.teacher.fingerprint}
    names = ("blue", "green", "red")
    specification = specify(
        config,
        seed=0,
        round_index=1,
        role="student",
        class_names=names,
        labeled=lab.labeled.digest,
        **given,
    )
    teacher = frozen_teacher(lab.store, specification, config, device=torch.device("cpu"))
    assert teacher is not None
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = lab.classifier(pipeline.teacher.fingerprint).network(images)
    assert torch.equal(teacher(images), own[:, [2, 1, 0]])

    larger = config.model_copy(update={"image_size": 16})
    with pytest.raises(ValueError, match="is made for 8 pixels and would be shown the student's"):
        frozen_teacher(lab.store, specification, larger, device=torch.device("cpu"))


def test_the_margin_is_given_the_prior_of_the_whole_corpus(pipeline):
    lab = pipeline.lab
    plain = trained(lab, lab.config(unlabeled_ratio=2), selection=pipeline.selection.fingerprint)
    with_margin = trained(
        lab,
        lab.config(unlabeled_ratio=2, objective=JointConfig(margin=0.5)),
        selection=pipeline.selection.fingerprint,
    )
    assert with_margin.fingerprint != plain.fingerprint
    path = f"labelings/{pipeline.labels.fingerprint}/class_prior.json"
    assert lab.store.read(path)
    one, other = weights_of(lab, plain), weights_of(lab, with_margin)
    assert not all(torch.equal(one[name], other[name]) for name in one)
