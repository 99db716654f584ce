"""Selections of predictions in the top_k form: as of full ones where every class is listed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.balancing import BalanceNoneConfig, CapMinConfig, TopKConfig
from models.debiasing import DistributionAlignmentConfig, LogitAdjustConfig
from models.exact_sums import exact_sum
from models.out_of_domain import EntropyConfig, MaxProbConfig, PuConfig
from models.thresholds import FixedThresholdConfig, FreeMatchConfig, PercentileThresholdConfig
from models.top_k_probs import TopKProbs
from models.weighting import ConfidenceWeightConfig, SoftMatchConfig
from storage.corpus import Corpus, Shard, save_corpus
from storage.manifest import read_stored
from storage.objects import CorruptObject
from storage.predictions import Listed, read_record, write_predictions
from storage.selections import Reason, from_parquet
from tasks import labeling
from tasks.selection import SelectionConfig, read_summary

ROWS = {
    "a": [("0", 0, 0.9375, 0), ("1", 0, 0.5, 1), ("2", 1, 0.75, 1), ("3", 2, 0.4375, 2)],
    "b": [("0", 0, 0.875, 0), ("1", 0, 0.8125, -1), ("2", 2, 0.75, 2), ("3", 1, 0.625, 0)],
    "c": [("0", 0, 0.875, 0), ("1", 1, 0.5625, -1), ("2", 0, 0.53125, 2)],
}
TEMPERATURE = 1.25
TOP, FULL = "e" * 64, "f" * 64


def config(**changes: Any) -> SelectionConfig:
    settings: dict[str, Any] = {
        "threshold": FixedThresholdConfig(confidence=0),
        "balance": BalanceNoneConfig(),
        "target": "hard",
        "allow_collapse": True,
    }
    return SelectionConfig(**settings | changes)


def corpus_of(lab) -> Corpus:
    shards = [Shard(stem, f"{i:x}" * 64, len(ROWS[stem]), 9) for i, stem in enumerate(ROWS, 1)]
    corpus = Corpus.of(shards, lab.class_names)
    save_corpus(lab.store, corpus, {stem: f"/nowhere/{stem}.tar" for stem in ROWS})
    return corpus


def plant_top_k(lab, k, *, sums=None, temperature=TEMPERATURE):
    """The rows cut to k classes, with the exact sums of the whole ones unless others are given."""
    corpus = corpus_of(lab)
    for shard in corpus.shards:
        whole = lab.predictions_of(ROWS[shard.stem])
        ids = np.argsort(-whole.log_probs, axis=1, kind="stable")
        every = TopKProbs.normalized(
            ids, np.take_along_axis(whole.log_probs, ids, axis=1), np.zeros(len(ids)), 3
        )
        rest = np.exp(every.log_probs[:, k:]).sum(axis=1).astype(np.float32)
        cut = replace(
            whole,
            log_probs=np.take_along_axis(whole.log_probs, ids[:, :k], axis=1),
            listed=Listed(ids[:, :k].astype(np.uint32), rest, 3),
        )
        facts = {"bad_samples": {}, "temperature": temperature}
        exact = exact_sum(every.dense_probs()) if sums is None else sums
        write_predictions(lab.store, TOP, shard.digest, cut, facts, prob_sums=exact)
    specification = labeling.specify(labeler=TOP, corpus=corpus.digest)
    return labeling.finish(lab.store, specification, seconds=0.0)


def stored(lab, manifest):
    return {
        stem: from_parquet(
            read_stored(lab.store, manifest.object(f"{i:x}" * 64)), num_samples=len(ROWS[stem])
        )
        for i, stem in enumerate(ROWS, start=1)
    }


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"threshold": FixedThresholdConfig(confidence=0.6), "balance": TopKConfig(k=2)},
        {"threshold": PercentileThresholdConfig(step=60), "balance": CapMinConfig()},
        {"threshold": FreeMatchConfig(), "weighting": ConfidenceWeightConfig()},
        {"debias": DistributionAlignmentConfig(target="uniform"), "balance": TopKConfig(k=2)},
        {"debias": LogitAdjustConfig(tau=2), "threshold": FreeMatchConfig(), "target": "soft"},
        {"weighting": SoftMatchConfig()},
        {"target": "soft"},
    ],
)
def test_listing_every_class_selects_as_the_full_form_does(lab, rules):
    full = lab.plant_labeling(lab.store, corpus_of(lab), ROWS, labeler=FULL)
    expected = stored(lab, lab.select(full, None, config(calibration="none", **rules)))
    found = stored(lab, lab.select(plant_top_k(lab, 3), None, config(**rules)))
    for stem, one in found.items():
        assert one.reason.tolist() == expected[stem].reason.tolist()
        assert one.copies.tolist() == expected[stem].copies.tolist()
        assert one.label.tolist() == expected[stem].label.tolist()
        assert one.weight == pytest.approx(expected[stem].weight, rel=1e-3)
        np.testing.assert_allclose(one.dense_targets(3), expected[stem].dense_targets(3), rtol=2e-3)


def test_soft_targets_of_cut_predictions_stay_sparse(lab):
    manifest = lab.select(plant_top_k(lab, 1), None, config(target="soft"))
    chosen = stored(lab, manifest)["a"]
    assert chosen.target_ids.tolist() == [0, 0, 1, 2]
    assert np.exp(chosen.target_log_probs) == pytest.approx([0.9375, 0.5, 0.75, 0.4375], rel=1e-3)
    assert chosen.rest_mass == pytest.approx([0.0625, 0.5, 0.25, 0.5625], rel=1e-3)
    # The rest mass is shared by the two classes that are not listed.
    assert chosen.dense_targets(3)[0] == pytest.approx([0.9375, 0.03125, 0.03125], rel=1e-3)


def test_debiasing_reads_the_sums_of_the_whole_distributions(lab):
    # Means 1/2, 1/4, 1/4 in all: uniform over them is 2/3, 4/3, 4/3.
    sums = {4: np.array([[2], [1], [1]]), 3: np.array([[1.5], [0.75], [0.75]])}
    corpus = corpus_of(lab)
    for shard in corpus.shards:
        n = shard.num_samples
        whole = lab.predictions_of(ROWS[shard.stem])
        rest = (1 - whole.confidence).astype(np.float32)
        listed = Listed(whole.label[:, None], rest, 3)
        rows = np.arange(n)
        cut = replace(whole, log_probs=whole.log_probs[rows, whole.label][:, None], listed=listed)
        exact = (sums[n] * 2.0**32).astype(np.int64).T
        words = np.concatenate([exact, np.zeros_like(exact)])
        facts = {"bad_samples": {}, "temperature": 1.0}
        write_predictions(lab.store, TOP, shard.digest, cut, facts, prob_sums=words)
    labels = labeling.finish(
        lab.store, labeling.specify(labeler=TOP, corpus=corpus.digest), seconds=0.0
    )
    debias = DistributionAlignmentConfig(target="uniform")
    summary = read_summary(lab.store, lab.select(labels, None, config(debias=debias)))
    assert summary["debias"]["mean_probs"] == pytest.approx([0.5, 0.25, 0.25])
    assert summary["debias"]["offsets"] == pytest.approx(np.log([2 / 3, 4 / 3, 4 / 3]))


def test_the_temperature_of_the_labelling_is_reported_and_not_applied_again(lab):
    manifest = lab.select(plant_top_k(lab, 2), None, config(weighting=ConfidenceWeightConfig()))
    summary = read_summary(lab.store, manifest)
    assert summary["temperature"] == TEMPERATURE
    assert summary["is_temperature_of_labeler"] is True
    assert stored(lab, manifest)["a"].weight.tolist() == [0.9375, 0.5, 0.75, 0.4375]


@pytest.mark.parametrize("calibration", ["vector", "none"])
def test_another_calibration_of_cut_predictions_is_refused(lab, calibration):
    with pytest.raises(ValueError, match=f"calibration={calibration} with predictions of the top_"):
        lab.select(plant_top_k(lab, 2), None, config(calibration=calibration))


def test_damage_that_planning_does_not_read_is_found_before_anything_is_committed(lab):
    # The list of log-probabilities is not read by a threshold, but the file is not what its record
    # names.
    labels = plant_top_k(lab, 2)
    record = read_record(lab.store, TOP, "1" * 64)
    assert record is not None
    path = Path(lab.store.url) / record["object"]["path"]
    data = bytearray(path.read_bytes())
    position = len(data) // 2
    data[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(CorruptObject):
        lab.select(labels, None, config())
    written = lab.store.list("selections")
    assert not [path for path in written if "1" * 64 in path or path.endswith("manifest.json")]


@pytest.mark.parametrize(
    ("gate", "threshold"),
    [
        # Calibrated by T = 2, dev's (1/2, 1/4, 1/4) and (16/18, 1/18, 1/18) have square roots in
        # the ratios sqrt(2) : 1 : 1 and 4 : 1 : 1. Half of dev reaches the larger confidence.
        (MaxProbConfig(keep_dev_fraction=0.5), 4 / 6),
        (EntropyConfig(keep_dev_fraction=0.5), -(math.log(6) - 4 / 6 * math.log(4))),
        (MaxProbConfig(keep_dev_fraction=1), math.sqrt(2) / (math.sqrt(2) + 2)),
    ],
    ids=["confidence", "entropy", "all"],
)
@pytest.mark.parametrize("is_labeled", [False, True], ids=["validated", "labelled"])
def test_gates_compare_cut_predictions_with_dev_calibrated_alike(lab, gate, threshold, is_labeled):
    dev_rows = [("x", 0, 0.5, 0), ("y", 0, 16 / 18, 0)]
    if is_labeled:
        dev = Corpus.of([Shard("dev-0", "d" * 64, 2, 9)], lab.class_names)
        save_corpus(lab.store, dev, {"dev-0": "/nowhere/dev-0.tar"})
        validation = lab.plant_labeling(lab.store, dev, {"dev-0": dev_rows}, labeler="c" * 64)
    else:
        validation = lab.plant_validation(lab.store, lab.predictions_of(dev_rows))
    labels = plant_top_k(lab, 1, temperature=2.0)
    manifest = lab.select(labels, validation, config(out_of_domain=gate))
    facts = read_summary(lab.store, manifest)["out_of_domain"]
    assert facts["threshold"] == pytest.approx(threshold, rel=2e-3)
    assert facts["kept_of_dev"] == gate.keep_dev_fraction
    # The corpus's own are stored calibrated, and judged as they are.
    if isinstance(gate, MaxProbConfig):
        for stem, one in stored(lab, manifest).items():
            confidences = np.array([row[2] for row in ROWS[stem]])
            assert (one.reason != Reason.OUT_OF_DOMAIN).tolist() == (
                confidences >= facts["threshold"]
            ).tolist()


def test_a_positive_unlabelled_gate_reads_cut_predictions(lab):
    dev = lab.predictions_of([(str(i), 0, 0.8 + i / 100, 0) for i in range(10)])
    validation = lab.plant_validation(lab.store, dev)
    chosen = config(out_of_domain=PuConfig(prior=0.5))
    summary = read_summary(lab.store, lab.select(plant_top_k(lab, 1), validation, chosen))
    assert summary["out_of_domain"]["sampled"] == sum(map(len, ROWS.values()))
    assert summary["out_of_domain"]["kept_of_dev"] == 1.0
    assert summary["reasons"]["out_of_domain"] > 0
