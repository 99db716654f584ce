"""Uncertainty and agreement, from stored predictions through the whole selection stage."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from models.balancing import BalanceNoneConfig, CapMinConfig
from models.debiasing import LogitAdjustConfig
from models.thresholds import (
    AgreementThresholdConfig,
    FixedThresholdConfig,
    UncertaintyThresholdConfig,
)
from models.weighting import AgreementWeightConfig
from storage.corpus import Corpus, Shard, save_corpus
from storage.manifest import read_stored
from storage.predictions import write_predictions
from storage.selections import Reason, from_parquet
from tasks import labeling
from tasks.calibrating import finished_calibration, read_dev_predictions
from tasks.explaining import explain_round
from tasks.selection import SelectionConfig, read_summary
from tasks.selection_summary import EmptySelection

# (key, label, confidence), deviation, share of votes; of three classes.
ROWS = [
    (("0", 0, 0.9375), 0.01, 1.0),
    (("1", 1, 0.9375), 0.05, 1.0),
    (("2", 2, 0.75), 0.01, 0.5),
    (("3", 1, 0.6875), 0.01, 1.0),
    (("4", 2, 0.9375), 0.04, 0.75),
]


@pytest.fixture
def labels(lab):
    return plant(lab, is_measured=True)


def plant(lab, *, is_measured):
    predictions = lab.predictions_of([row for row, _, _ in ROWS])
    if is_measured:
        predictions = replace(
            predictions,
            uncertainty=np.array([row[1] for row in ROWS], np.float32),
            agreement=np.array([row[2] for row in ROWS], np.float32),
        )
    labeler = ("e" if is_measured else "d") * 64
    shard = Shard("s", "5" * 64, len(ROWS), 1024)
    corpus = Corpus.of([shard], lab.class_names)
    save_corpus(lab.store, corpus, {"s": "/nowhere/s.tar"})
    write_predictions(lab.store, labeler, shard.digest, predictions, {"bad_samples": {}})
    specification = labeling.specify(labeler=labeler, corpus=corpus.digest)
    return labeling.finish(lab.store, specification, seconds=0.0)


def config(**changes):
    settings = {
        "calibration": "none",
        "balance": BalanceNoneConfig(),
        "target": "hard",
        "allow_collapse": True,
    }
    return SelectionConfig(**settings | changes)


def selected(lab, labels, chosen, validation=None):
    manifest = lab.select(labels, validation, chosen)
    (stored,) = [one for one in manifest.objects if one.path.endswith(".parquet")]
    return from_parquet(read_stored(lab.store, stored), num_samples=len(ROWS), where="s")


def kept(selection):
    return [key for key, one in zip(selection.keys, selection.reason, strict=True) if one == 0]


def test_ups_keeps_what_is_confident_and_hardly_varies(lab, labels):
    chosen = config(threshold=UncertaintyThresholdConfig(confidence=0.7, max_std=0.05))
    found = selected(lab, labels, chosen)
    assert kept(found) == ["0", "2", "4"]
    assert found.reason.tolist()[1] == Reason.BELOW_THRESHOLD


def test_the_threshold_reads_calibrated_confidences(lab, labels):
    # Dev predictions that claim .9 and are right 3 times of 4: a temperature above 1, by which
    # .75 becomes less than .7. On raw confidences "2" would be kept.
    rows = [(str(i), i % 3, 0.9, i % 3 if i % 4 < 3 else (i + 1) % 3) for i in range(48)]
    validation = lab.plant_validation(lab.store, lab.predictions_of(rows))
    chosen = config(calibration="temperature", threshold=UncertaintyThresholdConfig())
    assert kept(selected(lab, labels, chosen, validation)) == ["0", "4"]


def test_labels_from_several_views_are_calibrated_by_dev_as_it_is_labelled(lab, labels):
    # The same dev predictions, once as a validation's, once as a labelling's of two shards.
    rows = [(str(i), i % 3, 0.9, i % 3 if i % 4 < 3 else (i + 1) % 3) for i in range(48)]
    validation = lab.plant_validation(lab.store, lab.predictions_of(rows))
    shards = [Shard("d0", "7" * 64, 20, 1024), Shard("d1", "8" * 64, 28, 1024)]
    dev = Corpus.of(shards, lab.class_names)
    save_corpus(lab.store, dev, {"d0": "/nowhere/d0.tar", "d1": "/nowhere/d1.tar"})
    parts = {"d0": rows[:20], "d1": rows[20:]}
    labeled = lab.plant_labeling(lab.store, dev, parts, labeler="b" * 64)
    summaries = []
    for one in (validation, labeled):
        chosen = config(calibration="temperature", threshold=UncertaintyThresholdConfig())
        summaries.append(read_summary(lab.store, lab.select(labels, one, chosen)))
    assert summaries[0]["temperature"] > 1.1
    assert summaries[0] == summaries[1]
    assert finished_calibration(lab.store, labeled.fingerprint) == labeled
    assert finished_calibration(lab.store, validation.fingerprint) == validation
    with pytest.raises(ValueError, match="is not finished"):
        finished_calibration(lab.store, "0" * 64)
    with pytest.raises(ValueError, match="shard s has images without labels"):
        read_dev_predictions(lab.store, labels)


def test_a_cap_by_uncertainty_keeps_the_least_uncertain_of_each_class(lab, labels):
    # Classes 0, 1 and 2 have one, two and two rows: one of each stays. Of class 1 "3" of deviation
    # .01 stays and "1" of .05, which is more confident, goes; of class 2 "2" and not "4".
    chosen = config(
        threshold=FixedThresholdConfig(confidence=0),
        balance=CapMinConfig(floor=1, by="uncertainty"),
    )
    found = selected(lab, labels, chosen)
    assert kept(found) == ["0", "2", "3"]
    assert found.reason.tolist()[1] == Reason.OVER_QUOTA
    manifest = lab.select(labels, None, chosen)
    summary = read_summary(lab.store, manifest)
    assert summary["class_max_std"] == pytest.approx([1.0, 0.01, 0.01])
    assert "class_thresholds" not in summary
    by_confidence = chosen.model_copy(update={"balance": CapMinConfig(floor=1)})
    assert kept(selected(lab, labels, by_confidence)) == ["0", "1", "4"]
    sample = explain_round(
        lab.store,
        Shard("s", "5" * 64, len(ROWS), 1024),
        "1",
        labeling=labels,
        selection=manifest,
        class_names=lab.class_names,
    )
    assert sample is not None
    words = "over quota: its class is full with deviations up to 0.0100"
    assert sample.judgement.reason_in_words == words


def test_later_rounds_than_the_caps_keep_everything(lab, labels):
    chosen = config(
        threshold=FixedThresholdConfig(confidence=0),
        balance=CapMinConfig(floor=1, by="uncertainty", rounds=1),
    )
    first, second = (lab.select(labels, None, chosen, round_index=i) for i in (1, 2))
    assert (first.counts["unique"], second.counts["unique"]) == (3, 5)


def test_agreement_keeps_what_enough_predictions_say(lab, labels):
    assert kept(selected(lab, labels, config(threshold=AgreementThresholdConfig()))) == [
        "0",
        "1",
        "3",
    ]
    most = AgreementThresholdConfig(min_fraction=0.75, confidence=0.7)
    assert kept(selected(lab, labels, config(threshold=most))) == ["0", "1", "4"]


def test_votes_weigh(lab, labels):
    chosen = config(
        threshold=AgreementThresholdConfig(min_fraction=0.5), weighting=AgreementWeightConfig()
    )
    found = selected(lab, labels, chosen)
    assert found.weight.tolist() == [1.0, 1.0, 0.5, 1.0, 0.75]


@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": UncertaintyThresholdConfig()},
        {"threshold": AgreementThresholdConfig()},
        {"balance": CapMinConfig(by="uncertainty")},
    ],
    ids=["uncertainty", "agreement", "balance"],
)
def test_predictions_without_the_column_are_refused(lab, rule):
    with pytest.raises(ValueError, match="label with"):
        selected(lab, plant(lab, is_measured=False), config(**rule))


def test_a_rule_that_keeps_nothing_says_what_to_change(lab, labels):
    chosen = config(threshold=UncertaintyThresholdConfig(max_std=0.001))
    with pytest.raises(EmptySelection, match="raise max_std"):
        selected(lab, labels, chosen)


@pytest.mark.parametrize(
    "changes",
    [{"debias": LogitAdjustConfig()}, {"calibration": "vector"}],
    ids=["debias", "vector"],
)
def test_rules_on_the_teachers_class_are_refused_where_it_may_change(changes):
    with pytest.raises(ValidationError, match="may change the class"):
        config(threshold=UncertaintyThresholdConfig(), **changes)
    with pytest.raises(ValidationError, match=r"balance\.by=uncertainty"):
        config(balance=CapMinConfig(by="uncertainty"), **changes)
    with pytest.raises(ValidationError, match="weighting=agreement"):
        config(weighting=AgreementWeightConfig(), **changes)
