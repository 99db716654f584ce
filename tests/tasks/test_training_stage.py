"""Training: exact resume, checkpoints, divergence, versions, and what a finished model says."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import models.training
import tasks.batches
import tasks.provenance
from models.durations import Duration
from models.noise import AffineConfig, CutoutConfig, NoiseConfig, RandomResizedConfig
from models.objectives import ConsistencyConfig, DecoupledHeadConfig, JointConfig
from models.optimization import AdamWConfig, RMSpropTFConfig, SGDConfig, StaircaseConfig
from storage.checkpoints import newest_checkpoint
from storage.manifest import read_manifest, read_provenance
from tasks.checkpointing import VersionsChanged
from tasks.shard_items import TooManyBadSamples
from tasks.training import TrainingDiverged, TrainingStopped, read_curve

NOISE = NoiseConfig(
    affine=AffineConfig(), dropout=0.3, cutout=CutoutConfig(fraction=0.3), horizontal_flip=True
)


def stop_at(*reports: int) -> Callable[[], bool]:
    """Ask to stop at the n-th report of an attempt; each number serves one attempt."""
    left, seen = list(reports), 0

    def should_stop() -> bool:
        nonlocal seen
        seen += 1
        if left and seen == left[0]:
            left.pop(0)
            seen = 0
            return True
        return False

    return should_stop


def train_with_interruptions(lab, order, *reports):
    should_stop = stop_at(*reports)
    stopped_at = []
    for _ in reports:
        with pytest.raises(TrainingStopped) as caught:
            lab.train(order, should_stop=should_stop)
        stopped_at.append(str(caught.value))
    return lab.train(order, should_stop=should_stop), stopped_at


def shas(manifest):
    return {name: manifest.object(name).sha256 for name in ("model", "metrics", "description")}


def checkpoint_files(lab, manifest_or_order):
    fingerprint = getattr(manifest_or_order, "fingerprint", None)
    fingerprint = fingerprint or manifest_or_order.specification.fingerprint
    return list(Path(lab.store.url).glob(f"models/{fingerprint}/attempts/**/*.*"))


@pytest.fixture
def with_selection(pipeline, lab):
    """This test's store with all that a student reads: labelling and selection."""
    for folder in ("labelings", "selections", "predictions"):
        shutil.copytree(Path(pipeline.lab.store.url) / folder, Path(lab.store.url) / folder)
    return lab


def student_order(pipeline, lab, **changes):
    config = lab.config(**{"unlabeled_ratio": 2, "noise": NOISE} | changes)
    return lab.order(
        config, role="student", round_index=1, selection=pipeline.selection.fingerprint
    )


def test_a_teacher_that_is_interrupted_ends_in_the_same_bytes(lab, tmp_path):
    order = lab.order(lab.config(noise=NOISE))
    whole = lab.train(order)
    other = lab.in_store(tmp_path / "other")
    resumed, stopped_at = train_with_interruptions(other, order, 3, 5, 1)
    assert shas(resumed) == shas(whole)
    assert resumed.sha256 == whole.sha256
    # Attempts began at 0, 3 and 8, and a report comes every step.
    assert stopped_at == [f"stopped at step {step} of 20, checkpoint written" for step in (3, 8, 9)]


@pytest.mark.parametrize("mode", ["cached", "streamed", "random_crops", "bf16", "rmsprop_tf"])
def test_a_student_that_is_interrupted_ends_in_the_same_bytes(
    pipeline, with_selection, tmp_path, monkeypatch, mode
):
    lab = with_selection
    changes = {}
    if mode == "random_crops":
        crop = RandomResizedConfig(scale=(0.3, 1.0))
        changes["noise"] = NOISE.model_copy(update={"crop": crop})
    if mode == "bf16":
        changes["precision"] = "bf16"
    if mode == "rmsprop_tf":
        changes |= {
            "optimizer": RMSpropTFConfig(lr=0.1),
            "schedule": StaircaseConfig(decay_every=Duration(labeled_epochs=1.1)),
            "ema": None,
            "gradient_clip_norm": 1.0,
        }
    order = student_order(pipeline, lab, **changes)
    if mode == "streamed":
        monkeypatch.setattr(tasks.batches, "CACHE_BYTES", 0)
    resumed, _ = train_with_interruptions(lab, order, 7, 6)
    monkeypatch.undo()
    other = lab.in_store(tmp_path / "other")
    for folder in ("labelings", "selections", "predictions"):
        shutil.copytree(Path(lab.store.url) / folder, Path(other.store.url) / folder)
    whole = other.train(order)
    assert shas(resumed) == shas(whole)
    assert resumed.sha256 == whole.sha256
    assert [row["step"] for row in read_curve(lab.store, resumed)] == list(range(1, 21))
    assert all(math.isfinite(row["pseudo_loss"]) for row in read_curve(lab.store, resumed))


def test_checkpoints_by_steps_do_not_change_the_result_and_two_are_kept(lab, tmp_path):
    plain = lab.train()
    other = lab.in_store(tmp_path / "other")
    order = other.order(other.config(checkpoint_every_steps=2))
    assert order.specification.fingerprint == plain.fingerprint
    with pytest.raises(TrainingStopped):
        other.train(order, should_stop=stop_at(11))
    steps = {path.parent.name for path in checkpoint_files(other, order)}
    # The last two: which one is before the last depends on how fast they are written.
    assert len(steps) == 2
    assert max(steps) == f"{11:012d}"
    assert shas(other.train(order)) == shas(plain)


def test_checkpoints_are_deleted_once_the_model_is_committed(lab):
    order = lab.order(lab.config(checkpoint_every_steps=3))
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=stop_at(7))
    assert checkpoint_files(lab, order)
    manifest = lab.train(order)
    assert checkpoint_files(lab, manifest) == []
    assert newest_checkpoint(lab.store, manifest.fingerprint) is None
    provenance = read_provenance(lab.store, f"models/{manifest.fingerprint}")
    assert provenance is not None
    assert provenance["resumed_at_step"] == 7
    assert provenance["steps"] == 13


def test_a_damaged_newest_checkpoint_is_skipped_and_the_result_is_the_same(lab, tmp_path):
    order = lab.order(lab.config(checkpoint_every_steps=2))
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=stop_at(11))
    newest = newest_checkpoint(lab.store, order.specification.fingerprint)
    assert newest is not None
    path = Path(lab.store.url_of(newest.state.path))
    path.write_bytes(path.read_bytes()[:-1])
    # Which steps have one depends on how fast they are written beside the training.
    before = newest_checkpoint(lab.store, order.specification.fingerprint)
    assert before is not None
    assert 0 < before.step < newest.step == 11
    resumed = lab.train(order)
    provenance = read_provenance(lab.store, f"models/{resumed.fingerprint}")
    assert provenance is not None
    assert provenance["resumed_at_step"] == before.step
    assert shas(resumed) == shas(lab.in_store(tmp_path / "other").train())


@pytest.mark.parametrize(
    "optimizer", [AdamWConfig(lr=1e9, weight_decay=0), SGDConfig(lr=1e12)], ids=["adamw", "sgd"]
)
def test_diverged_training_is_an_error_and_leaves_no_model(lab, optimizer):
    config = lab.config(optimizer=optimizer, warmup=None, duration=Duration(steps=200))
    order = lab.order(config)
    with pytest.raises(TrainingDiverged) as caught:
        lab.train(order)
    message = str(caught.value)
    assert "is not finite at step" in message
    assert "lower the learning rate" in message
    assert "there is no checkpoint yet" in message
    folder = order.specification.folder
    assert read_manifest(lab.store, folder) is None
    assert not list(Path(lab.store.url).glob(f"{folder}/model-*"))
    assert checkpoint_files(lab, order) == []


def test_a_divergence_names_the_last_good_checkpoint(lab, monkeypatch):
    order = lab.order(lab.config(checkpoint_every_steps=4))
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=stop_at(9))
    monkeypatch.setattr(
        models.training, "learning_rate", lambda step, **_: 1e30 if step >= 10 else 0.01
    )
    with pytest.raises(TrainingDiverged, match=r"last good checkpoint: step (9|1\d), .*/attempts/"):
        lab.train(order)
    newest = newest_checkpoint(lab.store, order.specification.fingerprint)
    assert newest is not None  # and it was read whole: no checkpoint holds what is not finite


def changed_versions(monkeypatch):
    now = tasks.provenance.versions()
    monkeypatch.setattr(tasks.provenance, "versions", lambda: now | {"torch": "9.9.9"})


def test_other_versions_do_not_go_on_with_a_training_unless_told_to(lab, monkeypatch, tmp_path):
    order = lab.order()
    with pytest.raises(TrainingStopped):
        lab.train(order, should_stop=stop_at(5))
    changed_versions(monkeypatch)
    with pytest.raises(VersionsChanged) as caught:
        lab.train(order)
    message = str(caught.value)
    assert "the checkpoint of step 5 was written under other versions: torch " in message
    assert "-> 9.9.9. " in message
    assert "SELFTRAIN_RESUME_ACROSS_VERSIONS=1" in message
    monkeypatch.setenv("SELFTRAIN_RESUME_ACROSS_VERSIONS", "0")
    with pytest.raises(VersionsChanged):
        lab.train(order)
    monkeypatch.setenv("SELFTRAIN_RESUME_ACROSS_VERSIONS", "1")
    assert shas(lab.train(order)) == shas(lab.in_store(tmp_path / "other").train())


def test_a_finished_model_is_reused_across_versions(lab, monkeypatch):
    order = lab.order()
    manifest = lab.train(order)
    changed_versions(monkeypatch)
    assert order.specification.result(lab.store) == manifest


def test_the_manifest_counts_what_was_seen(pipeline):
    counts = pipeline.student.counts
    assert counts["steps"] == 20
    assert counts["labeled_samples"] == 24
    assert counts["labeled_images_seen"] == 20 * 6
    assert counts["pseudo_images_seen"] == 20 * 12
    assert counts["architecture"] == "small_cnn-4x1"
    assert pipeline.teacher.counts["pseudo_images_seen"] == 0
    selection = pipeline.student.inputs["selection"]
    assert (selection.fingerprint, selection.manifest_sha256) == (
        pipeline.selection.fingerprint,
        pipeline.selection.sha256,
    )
    assert set(pipeline.teacher.inputs) == {"labeled"}


def test_a_head_of_the_training_alone_is_not_counted_among_the_parameters(pipeline, with_selection):
    objective = JointConfig(decoupled_head=DecoupledHeadConfig())
    order = student_order(pipeline, with_selection, objective=objective)
    manifest = with_selection.train(order)
    assert manifest.counts["parameters"] == pipeline.teacher.counts["parameters"]


def test_the_curve_has_one_row_a_report_and_null_where_there_is_no_pseudo_label(pipeline):
    rows = read_curve(pipeline.lab.store, pipeline.teacher)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["learning_rate"] == 0  # warm-up begins at 0
    assert rows[1]["learning_rate"] == pytest.approx(0.01)  # half of the peak of 0.02
    assert {row["pseudo_loss"] for row in rows} == {None}
    assert all(0 <= row["labeled_accuracy"] <= 1 for row in rows)


def test_the_curve_holds_everything_that_the_objective_logs(lab):
    config = lab.config(objective=JointConfig(consistency=ConsistencyConfig()))
    rows = read_curve(lab.store, lab.train(lab.order(config)))
    usual = ["step", "loss", "learning_rate", "labeled_loss", "labeled_accuracy", "pseudo_loss"]
    assert list(rows[0]) == [*usual, "pseudo_accuracy", "consistency"]
    # Known-broken variant: fixed columns, which leave it out.
    assert all(row["consistency"] > 0 for row in rows)
    assert {row["pseudo_loss"] for row in rows} == {None}


def test_labeled_epochs_and_samples_seen_give_the_steps(lab):
    # 24 labels, 6 a step: 2.5 epochs are 10 steps, 31 samples are 5.
    config = lab.config(duration=Duration(labeled_epochs=2.5))
    assert lab.train(lab.order(config)).counts["steps"] == 10
    config = lab.config(duration=Duration(samples_seen=31))
    assert lab.train(lab.order(config)).counts["steps"] == 5


def test_seed_round_and_role_give_other_weights(lab):
    first = lab.train(lab.order())
    others = [
        lab.train(lab.order(seed=1)),
        lab.train(lab.order(round_index=1)),
        lab.train(lab.order(role="baseline")),
    ]
    models = {m.object("model").sha256 for m in (first, *others)}
    assert len(models) == 4
    assert len({m.fingerprint for m in (first, *others)}) == 4


def test_a_student_without_its_selection_or_labelling_is_refused(pipeline, with_selection):
    lab = with_selection
    order = student_order(pipeline, lab)
    manifest = Path(lab.store.url) / "labelings" / pipeline.labels.fingerprint / "manifest.json"
    manifest.unlink()
    with pytest.raises(ValueError, match=r"labelling .* of the selection is gone"):
        lab.train(order)
    selection = Path(lab.store.url) / "selections" / pipeline.selection.fingerprint
    (selection / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not finished: run the selection first"):
        lab.train(order)


def test_too_many_undecodable_labels_stop_the_training(lab, tmp_path):
    samples = [*lab.images_of("l", 8, start=0), ("bad", b"no image", 1)]
    folder = lab.write_split(tmp_path / "bad", {"bad-0": samples})
    broken = lab.with_corpora(labeled=lab.index_into(lab.store, folder))
    with pytest.raises(TooManyBadSamples, match=r"shard bad-0: 1 undecodable .* bad-0/bad"):
        broken.train(broken.order())
    manifest = broken.train(broken.order(max_bad_samples=1))
    assert manifest.counts["steps"] == 20
    provenance = read_provenance(lab.store, f"models/{manifest.fingerprint}")
    assert provenance is not None
    assert list(provenance["bad_samples"]) == ["bad-0/bad"]
