"""Predictions that were lost or damaged after they were recorded are made again, alike."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.damaged_predictions import read_whole_record
from storage.manifest import ManifestMismatch
from storage.prediction_columns import PredictionColumns, PredictionReference
from storage.predictions import (
    DamagedPredictions,
    prediction_record,
    read_predictions,
    read_record,
    record_path,
    write_predictions,
)
from tasks import labeling
from tasks.ensembles import Ensemble
from tasks.selection_config import SelectionConfig


@pytest.fixture
def labeled(pipeline: Any, lab: Any) -> Any:
    """This test's store with the pipeline's teacher and its finished labelling."""
    teacher = pipeline.teacher.fingerprint
    for folder in (f"models/{teacher}", f"predictions/{lab.labeler(teacher)}"):
        shutil.copytree(Path(pipeline.lab.store.url) / folder, Path(lab.store.url) / folder)
    return lab


def object_of(lab: Any, labeler: str, stem: str) -> Path:
    record = read_record(lab.store, labeler, lab.unlabeled.shard(stem).digest)
    assert record is not None
    return Path(lab.store.url) / record["object"]["path"]


def to_label(lab: Any, labeler: str, **verify: Any) -> list[str]:
    found = labeling.shards_to_label(lab.store, labeler, lab.unlabeled, **verify)
    return [shard.stem for shard in found]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_lost_cut_and_damaged_objects_are_labelled_again_to_the_same_manifest(
    pipeline: Any, labeled: Any, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = pipeline.teacher.fingerprint
    labeler = labeled.labeler(teacher)
    objects = {stem: object_of(labeled, labeler, stem) for stem in ("unlabeled-0", "unlabeled-2")}
    bitten = object_of(labeled, labeler, "unlabeled-3")
    whole = {path: path.read_bytes() for path in (*objects.values(), bitten)}
    untouched = object_of(labeled, labeler, "unlabeled-1").stat().st_mtime_ns
    objects["unlabeled-0"].unlink()
    objects["unlabeled-2"].write_bytes(whole[objects["unlabeled-2"]][:-1])
    flip_a_bit(bitten)

    assert to_label(labeled, labeler) == [], "a plan asks for the records only"
    assert to_label(labeled, labeler, verify="size") == ["unlabeled-0", "unlabeled-2"]
    assert to_label(labeled, labeler, verify="full") == [
        "unlabeled-0",
        "unlabeled-2",
        "unlabeled-3",
    ]
    assert "is withdrawn, to be labelled again" in caplog.text
    manifest = labeled.label(teacher)

    assert manifest.sha256 == pipeline.labels.sha256
    assert {path: path.read_bytes() for path in whole} == whole
    assert object_of(labeled, labeler, "unlabeled-1").stat().st_mtime_ns == untouched
    assert to_label(labeled, labeler, verify="full") == []


def test_a_damaged_record_is_labelled_again(pipeline: Any, labeled: Any) -> None:
    labeler = labeled.labeler(pipeline.teacher.fingerprint)
    shard = labeled.unlabeled.shards[4]
    path = Path(labeled.store.url) / record_path(labeler, shard.digest)
    flip_a_bit(path)
    assert to_label(labeled, labeler, verify="size") == ["unlabeled-4"]
    assert labeled.label(pipeline.teacher.fingerprint).sha256 == pipeline.labels.sha256


def test_predictions_that_come_out_otherwise_get_a_record_of_their_own(
    pipeline: Any, labeled: Any
) -> None:
    """On another type of device the last bits differ: the new record names the new object."""
    teacher = pipeline.teacher.fingerprint
    labeler, shard = labeled.labeler(teacher), labeled.unlabeled.shards[0]
    before = read_record(labeled.store, labeler, shard.digest)
    assert before is not None
    old = Path(labeled.store.url) / before["object"]["path"]
    flip_a_bit(old)
    assert read_whole_record(labeled.store, labeler, shard.digest, verify="full") is None
    other = labeled.classifier(teacher)
    for parameter in other.network.parameters():
        parameter.data *= 1.01

    sizes = labeling.label_shards(
        labeled.store,
        labeled.unlabeled.digest,
        [shard.stem],
        Ensemble((other,)),
        labeler=labeler,
        batch_size=16,
        max_bad_samples=0,
    )

    assert list(sizes) == [10]
    after = read_record(labeled.store, labeler, shard.digest)
    assert after is not None
    assert after["object"]["sha256"] != before["object"]["sha256"]
    assert read_predictions(labeled.store, after).num_samples == 10


def test_other_predictions_than_a_finished_labelling_names_are_refused(
    pipeline: Any, labeled: Any
) -> None:
    """A shard labelled again on another type of device leaves the labelling naming what is gone."""
    teacher = pipeline.teacher.fingerprint
    labels = labeled.label(teacher)
    labeler, shard = labeled.labeler(teacher), labeled.unlabeled.shards[1]
    record = read_record(labeled.store, labeler, shard.digest)
    assert record is not None
    same = read_predictions(labeled.store, record)
    other = replace(same, margin=same.margin * np.float32(0.5))
    (Path(labeled.store.url) / record_path(labeler, shard.digest)).unlink()
    write_predictions(labeled.store, labeler, shard.digest, other, {"bad_samples": {}})
    named = f"of 1 shards are not those that it names; first {shard.stem}: record"

    with pytest.raises(ManifestMismatch, match=named):
        labeled.label(teacher)
    with pytest.raises(ManifestMismatch, match=named):
        labeled.select(labels, None, SelectionConfig(calibration="none"))

    (Path(labeled.store.url) / f"labelings/{labels.fingerprint}/manifest.json").unlink()
    again = labeled.label(teacher)
    assert (again.fingerprint, again.sha256 == labels.sha256) == (labels.fingerprint, False)
    labeled.select(again, None, SelectionConfig(calibration="none", allow_collapse=True))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "recorded predictions are lost"),
        (flip_a_bit, "sha256"),
    ],
    ids=["lost", "flipped"],
)
def test_who_reads_damaged_predictions_is_told_that_they_are(
    pipeline: Any, labeled: Any, damage: Any, told: str
) -> None:
    labeler = labeled.labeler(pipeline.teacher.fingerprint)
    shard = labeled.unlabeled.shards[2]
    record = prediction_record(labeled.store, labeler, shard.digest)
    damage(object_of(labeled, labeler, shard.stem))
    with pytest.raises(DamagedPredictions, match=told):
        read_predictions(labeled.store, record)
    with pytest.raises(DamagedPredictions, match=told):
        PredictionColumns(labeled.store, PredictionReference.of(record), verify=True)
    flip_a_bit(Path(labeled.store.url) / record_path(labeler, shard.digest))
    with pytest.raises(DamagedPredictions, match=r"damaged or was edited|not a record"):
        prediction_record(labeled.store, labeler, shard.digest)
