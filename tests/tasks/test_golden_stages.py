"""One tiny run of every stage against stored numbers.

A difference beyond the tolerance means that a stage computes something else than it did: either a
bug, or a reason to raise that stage's version constant, so that old results are not taken for new
ones. Then: `python -m pytest tests/tasks/test_golden_stages.py --update-golden`, and say why in the
commit. The tolerance covers other processors and library versions.
"""

from typing import Any

import numpy as np
import pytest

from models.balancing import NsBinnedConfig, TopKConfig
from models.description import weights_from_bytes
from models.thresholds import FixedThresholdConfig
from storage.corpus import Corpus, Shard, save_corpus
from storage.manifest import read_stored
from storage.predictions import read_predictions, read_record
from storage.selections import from_parquet
from tasks import evaluation, labeling, selection, training_orders
from tasks.evaluation import promote, read_report, specify_promotion
from tasks.selection import SelectionConfig
from tasks.training import read_curve

ONE_SAMPLE = 1 / 15 + 1e-9  # of dev or test: one that lies on the fence


def rounded(values) -> list[float]:
    return [round(float(value), 6) for value in values]


def training_numbers(lab, manifest) -> dict[str, Any]:
    curve = read_curve(lab.store, manifest)
    weights = weights_from_bytes(read_stored(lab.store, manifest.object("model")), where="golden")
    floating = [weights[n].double() for n in sorted(weights) if weights[n].is_floating_point()]
    return {
        "version": training_orders.VERSION,
        "losses": rounded(curve[i]["loss"] for i in (0, 1, 4, 9, 14, 19)),
        "learning_rates": rounded(curve[i]["learning_rate"] for i in (0, 1, 2, 10, 19)),
        "norm_of_weights": rounded(float((w * w).sum().sqrt()) for w in floating),
    }


def evaluation_numbers(lab, manifest) -> dict[str, Any]:
    report = read_report(lab.store, manifest)
    names = ("accuracy", "interval", "ece", "negative_log_likelihood", "samples")
    return {"version": evaluation.VERSION} | {name: report[name] for name in names}


def labeling_numbers(pipeline) -> dict[str, Any]:
    lab = pipeline.lab
    shard = lab.unlabeled.shard("unlabeled-2")
    record = read_record(lab.store, lab.labeler(pipeline.teacher.fingerprint), shard.digest)
    assert record is not None
    found = read_predictions(lab.store, record)
    return {
        "version": [labeling.VERSION, labeling.LABELER_VERSION],
        "keys": list(found.keys),
        "true_label": found.true_label.tolist(),
        "probs": [rounded(row) for row in np.exp(found.log_probs.astype(np.float64))],
        "logsumexp": rounded(found.logsumexp),
    }


def selection_numbers(lab) -> dict[str, Any]:
    """Copies of planted predictions: exact, for no network is in it."""
    rng = np.random.default_rng(5)
    rows = {
        stem: [
            (f"{i:03d}", int(rng.choice(3, p=[0.6, 0.3, 0.1])), float(rng.uniform(0.34, 1)))
            for i in range(40)
        ]
        for stem in ("a", "b")
    }
    shards = [Shard(stem, digest * 64, 40, 1024) for stem, digest in (("a", "1"), ("b", "2"))]
    corpus = Corpus.of(shards, lab.class_names)
    save_corpus(lab.store, corpus, {stem: f"/nowhere/{stem}" for stem in rows})
    labels = lab.plant_labeling(lab.store, corpus, rows)
    dev = [(str(i), i % 3, 0.9, (i if i % 7 else i + 1) % 3) for i in range(60)]
    validation = lab.plant_validation(lab.store, lab.predictions_of(dev))
    numbers: dict[str, Any] = {"version": selection.VERSION}
    for balance in (NsBinnedConfig(), TopKConfig(k=17)):
        config = SelectionConfig(
            threshold=FixedThresholdConfig(confidence=0.5), balance=balance, max_class_share=1.0
        )
        manifest = lab.select(labels, validation, config, seed=3, round_index=2)
        numbers[balance.kind] = {
            shard.stem: from_parquet(
                read_stored(lab.store, manifest.object(shard.digest)), num_samples=40
            ).copies.tolist()
            for shard in corpus.shards
        }
        numbers["temperature"] = selection.read_summary(lab.store, manifest)["temperature"]
    return numbers


@pytest.fixture(scope="module")
def numbers(pipeline, golden, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the stages give now, and what is stored."""
    lab = pipeline.lab
    specification = specify_promotion(
        teacher=pipeline.validation.fingerprint, student=pipeline.student_validation.fingerprint
    )
    promotion = promote(lab.store, specification, pipeline.validation, pipeline.student_validation)
    report = read_report(lab.store, promotion)
    current = {
        "train": training_numbers(lab, pipeline.teacher),
        "train_student": training_numbers(lab, pipeline.student),
        "validate": evaluation_numbers(lab, pipeline.validation),
        "test": evaluation_numbers(lab, pipeline.tested),
        "label": labeling_numbers(pipeline),
        "select": selection_numbers(lab.in_empty_store(tmp_path_factory.mktemp("golden"))),
        "promote": {
            "version": evaluation.PROMOTE_VERSION,
            "is_promoted": report["is_promoted"],
            "difference": report["difference"],
            "interval": report["interval"],
        },
    }
    return current, golden("stages", current)


def assert_close(current: Any, stored: Any, tolerance: float, where: str) -> None:
    if isinstance(stored, dict):
        assert set(current) == set(stored), where
        for name in stored:
            assert_close(current[name], stored[name], tolerance, f"{where}.{name}")
    elif isinstance(stored, list):
        assert len(current) == len(stored), where
        for i, (a, b) in enumerate(zip(current, stored, strict=True)):
            assert_close(a, b, tolerance, f"{where}[{i}]")
    elif isinstance(stored, float):
        assert current == pytest.approx(stored, abs=tolerance, rel=tolerance), where
    else:
        assert current == stored, where


@pytest.mark.parametrize(
    ("stage", "tolerance"),
    [
        ("train", 0.01),
        ("train_student", 0.01),
        ("label", 0.01),
        ("select", 1e-6),
        ("validate", ONE_SAMPLE),
        ("test", ONE_SAMPLE),
        ("promote", 2 * ONE_SAMPLE),
    ],
)
def test_a_stage_gives_the_stored_numbers(numbers, stage, tolerance):
    current, stored = numbers
    assert set(current) == set(stored)
    assert_close(current[stage], stored[stage], tolerance, stage)


def test_a_changed_number_would_be_noticed(numbers):
    _, stored = numbers
    changed = stored["train"] | {"losses": [loss + 0.02 for loss in stored["train"]["losses"]]}
    with pytest.raises(AssertionError, match=r"train\.losses\[0\]"):
        assert_close(changed, stored["train"], 0.01, "train")
