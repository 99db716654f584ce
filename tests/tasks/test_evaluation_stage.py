"""Validate, promote and test: reports, joins on keys, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from storage.manifest import Manifest, commit_manifest, read_manifest
from tasks import evaluation
from tasks.classifiers import ClassesMismatch
from tasks.evaluation import (
    promote,
    read_evaluation_predictions,
    read_report,
    specify_promotion,
)
from tasks.shard_items import TooManyBadSamples


def test_the_report_agrees_with_the_predictions_behind_it(pipeline):
    store, validation = pipeline.lab.store, pipeline.validation
    report = read_report(store, validation)
    found = read_evaluation_predictions(store, validation)
    truth = found.true_label.astype(int)
    is_right = found.label == truth
    assert report["samples"] == 15
    assert report["correct"] == int(is_right.sum())
    assert report["accuracy"] == validation.counts["accuracy"] == is_right.mean()
    low, high = report["interval"]
    assert low < report["accuracy"] < high
    expected_nll = -found.log_probs.astype(np.float64)[np.arange(15), truth].mean()
    assert report["negative_log_likelihood"] == pytest.approx(expected_nll, abs=1e-9)
    assert [c["name"] for c in report["per_class"]] == ["red", "green", "blue"]
    assert [c["total"] for c in report["per_class"]] == [5, 5, 5]
    assert [sum(row) for row in report["confusion"]] == [5, 5, 5]
    assert sum(report["confusion"][i][i] for i in range(3)) == report["correct"]
    assert report["schema"] == 1
    json.dumps(report, allow_nan=False)


def test_predictions_are_keyed_by_whole_sample_keys_with_the_truth(pipeline):
    found = read_evaluation_predictions(pipeline.lab.store, pipeline.validation)
    assert found.keys == tuple(f"dev-0/d{i:03d}" for i in range(15))
    assert found.true_label.tolist() == [i % 3 for i in range(15)]


def test_evaluating_twice_gives_the_same_manifest(pipeline, tmp_path, lab):
    teacher = lab.train()
    assert teacher.sha256 == pipeline.teacher.sha256
    assert lab.evaluate("validate", teacher.fingerprint).sha256 == pipeline.validation.sha256
    assert lab.evaluate("test", teacher.fingerprint).sha256 == pipeline.tested.sha256


def test_validate_reads_dev_and_test_reads_test(pipeline):
    lab = pipeline.lab
    assert pipeline.validation.kind == "validate"
    assert pipeline.validation.inputs["corpus"].fingerprint == lab.dev.digest
    assert pipeline.tested.kind == "test"
    assert pipeline.tested.inputs["corpus"].fingerprint == lab.test.digest
    model = pipeline.validation.inputs["model"]
    assert (model.fingerprint, model.manifest_sha256) == (
        pipeline.teacher.fingerprint,
        pipeline.teacher.sha256,
    )


def split_in_another_order(lab, folder, **more):
    """The dev split with its classes numbered in another order: same images, same names."""
    to_other = [1, 2, 0]  # red, green, blue are numbers 1, 2, 0 of (blue, red, green)
    samples = [
        (key, image, to_other[label])
        for key, image, label in lab.images_of("d", 15, start=1000, hardness=0.7)
    ]
    folder = lab.write_split(folder, {"dev-0": samples}, ["blue", "red", "green"])
    return lab.with_corpora(dev=lab.index_into(lab.store, folder), **more)


def test_a_split_may_number_its_classes_in_another_order(pipeline, lab, tmp_path):
    teacher = lab.train()
    other = split_in_another_order(lab, tmp_path / "dev")
    manifest = other.evaluate("validate", teacher.fingerprint)
    first = read_evaluation_predictions(pipeline.lab.store, pipeline.validation)
    second = read_evaluation_predictions(lab.store, manifest)
    np.testing.assert_array_equal(second.true_label, first.true_label)
    np.testing.assert_array_equal(second.log_probs, first.log_probs)
    assert manifest.counts["accuracy"] == pipeline.validation.counts["accuracy"]


def test_a_split_of_other_classes_is_refused(lab, tmp_path):
    teacher = lab.train()
    folder = lab.write_split(
        tmp_path / "dev", {"d-0": lab.images_of("d", 6, start=50)}, ["red", "green", "violet"]
    )
    other = lab.with_corpora(dev=lab.index_into(lab.store, folder))
    with pytest.raises(
        ClassesMismatch, match="only in the corpus: violet; only in the model: blue"
    ):
        other.evaluate("validate", teacher.fingerprint)


def test_a_split_that_lacks_a_class_is_evaluated_on_the_others(lab, tmp_path):
    teacher = lab.train()
    samples = [s for s in lab.images_of("d", 12, start=50) if s[2] != 1]
    folder = lab.write_split(tmp_path / "dev", {"d-0": samples})
    other = lab.with_corpora(dev=lab.index_into(lab.store, folder))
    report = read_report(lab.store, other.evaluate("validate", teacher.fingerprint))
    assert [one["total"] for one in report["per_class"]] == [4, 0, 4]
    assert report["per_class"][1]["accuracy"] is None
    json.dumps(report, allow_nan=False)


def test_an_unlabelled_sample_of_a_split_is_named(lab, tmp_path):
    teacher = lab.train()
    samples = lab.images_of("d", 5, start=50)
    samples[3] = (*samples[3][:2], None)
    folder = lab.write_split(tmp_path / "dev", {"d-0": samples})
    other = lab.with_corpora(dev=lab.index_into(lab.store, folder))
    with pytest.raises(ValueError, match=r"d-0/d003: no \.cls member, but dev and test splits"):
        other.evaluate("validate", teacher.fingerprint)


def test_undecodable_images_of_a_split_cost_the_budget(lab, tmp_path):
    teacher = lab.train()
    samples = [*lab.images_of("d", 5, start=50), ("bad", b"\x89PNG cut", 0)]
    folder = lab.write_split(tmp_path / "dev", {"d-0": samples})
    other = lab.with_corpora(dev=lab.index_into(lab.store, folder))
    with pytest.raises(TooManyBadSamples, match=r"shard d-0: 1 undecodable .* d-0/bad"):
        other.evaluate("validate", teacher.fingerprint)
    manifest = other.evaluate("validate", teacher.fingerprint, max_bad_samples=1)
    assert manifest.counts["samples"] == 5
    # What an accuracy was measured on, and what not, can be read from the result.
    assert list(manifest.counts["bad_samples"]) == ["d-0/bad"]


def planted(store, name, is_right, keys=None) -> Manifest:
    """A validation on len(is_right) samples of class 0; other keys make another dev split."""
    from storage.manifest import InputReference, put_object
    from storage.predictions import Predictions, to_parquet

    n = len(is_right)
    probs = np.where(np.array(is_right)[:, None], [0.8, 0.2], [0.2, 0.8])
    predictions = Predictions(
        keys=tuple(keys or [f"dev-0/{i}" for i in range(n)]),
        label=np.where(is_right, 0, 1).astype(np.uint32),
        confidence=np.full(n, 0.8, np.float32),
        margin=np.full(n, 0.6, np.float32),
        entropy=np.full(n, 0.5, np.float32),
        log_probs=np.log(probs).astype(np.float16),
        logsumexp=np.zeros(n, np.float32),
        true_label=np.zeros(n, np.int32),
    )
    specification = evaluation.specify(
        "validate", model=name * 64, corpus="d" * 64, view={}, class_names=("x", "y")
    )
    stored = put_object(
        store, specification.folder, "predictions", to_parquet(predictions), "parquet"
    )
    return commit_manifest(
        store,
        specification.folder,
        Manifest(
            kind="validate",
            fingerprint=specification.fingerprint,
            stage_version=specification.version,
            settings=specification.settings,
            inputs={k: InputReference(fp, fp) for k, fp in specification.inputs.items()},
            objects=(stored,),
            counts={"samples": n, "classes": 2},
        ),
    )


def compare(store, teacher, student):
    specification = specify_promotion(teacher=teacher.fingerprint, student=student.fingerprint)
    return promote(store, specification, teacher, student)


@pytest.mark.parametrize(
    ("teacher_right", "student_right", "is_promoted"),
    [
        # 40 samples. Student alone right 6, teacher alone 2: difference 4 / 40.
        ([1] * 2 + [0] * 6 + [1] * 32, [0] * 2 + [1] * 6 + [1] * 32, True),
        # A little worse, within the interval: 2 against 4.
        ([1] * 4 + [0] * 2 + [1] * 34, [0] * 4 + [1] * 2 + [1] * 34, True),
        # Worse beyond it: 0 against 10.
        ([1] * 40, [0] * 10 + [1] * 30, False),
        ([1] * 40, [1] * 40, True),
    ],
)
def test_a_student_is_promoted_unless_it_is_worse_beyond_the_interval(
    lab, teacher_right, student_right, is_promoted
):
    teacher, student = (
        planted(lab.store, "a", teacher_right),
        planted(lab.store, "b", student_right),
    )
    manifest = compare(lab.store, teacher, student)
    report = read_report(lab.store, manifest)
    assert report["is_promoted"] is is_promoted
    assert manifest.counts["is_promoted"] is is_promoted
    difference = (sum(student_right) - sum(teacher_right)) / 40
    assert report["difference"] == manifest.counts["difference"] == pytest.approx(difference)
    low, high = report["interval"]
    assert low <= difference <= high
    assert (high >= 0) is is_promoted
    pairs = list(zip(student_right, teacher_right, strict=True))
    assert report["only_student"] == pairs.count((1, 0))
    assert report["only_teacher"] == pairs.count((0, 1))


def test_promotion_joins_on_keys_and_not_on_positions(lab):
    right = [1, 0, 1, 1, 1, 0]
    keys = [f"dev-0/{i}" for i in range(6)]
    teacher = planted(lab.store, "a", right, keys)
    # The same samples right, in another order: no disagreement at all.
    student = planted(lab.store, "b", right[::-1], keys[::-1])
    report = read_report(lab.store, compare(lab.store, teacher, student))
    assert (report["only_student"], report["only_teacher"]) == (0, 0)


def test_validations_on_different_samples_are_not_compared(lab):
    teacher = planted(lab.store, "a", [1, 0, 1])
    student = planted(lab.store, "b", [1, 0, 1], keys=["dev-0/0", "dev-0/1", "dev-1/2"])
    with pytest.raises(ValueError, match="different dev samples"):
        compare(lab.store, teacher, student)


def test_promotion_reads_validations_only(pipeline, lab):
    # By its inputs: nothing of the test split can reach the decision.
    specification = specify_promotion(teacher="a" * 64, student="b" * 64)
    assert specification.inputs == {"teacher": "a" * 64, "student": "b" * 64}
    manifest = compare(pipeline.lab.store, pipeline.validation, pipeline.student_validation)
    assert set(manifest.inputs) == {"teacher", "student"}
    assert manifest.inputs["teacher"].manifest_sha256 == pipeline.validation.sha256


def test_a_finished_stage_is_found_by_its_specification(pipeline):
    lab = pipeline.lab
    specification = lab.specify_evaluation("validate", pipeline.teacher.fingerprint)
    assert specification.result(lab.store) == pipeline.validation
    assert replace(specification, version=2).result(lab.store) is None
    assert read_manifest(lab.store, specification.folder) == pipeline.validation


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "b" * 64},
        {"corpus": "d" * 64},
        {"view": {"image_size": 9}},
        {"class_names": ("y", "x")},
        {"kind": "test"},
    ],
)
def test_what_changes_an_evaluation_changes_its_fingerprint(changes):
    base = {
        "kind": "validate",
        "model": "a" * 64,
        "corpus": "c" * 64,
        "view": {"image_size": 8},
        "class_names": ("x", "y"),
    }

    def fingerprint(given):
        return evaluation.specify(given.pop("kind"), **given).fingerprint

    assert fingerprint(base | changes) != fingerprint(dict(base))
