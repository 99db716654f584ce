"""What one round made of one image, against selections worked by hand."""

from typing import Any

import numpy as np
import pytest

from models.balancing import BalanceNoneConfig, NsBinnedConfig, TopKConfig
from models.debiasing import LogitAdjustConfig
from models.thresholds import FixedThresholdConfig, PercentileThresholdConfig
from models.weighting import ConfidenceWeightConfig
from storage.manifest import read_stored
from storage.selections import from_parquet
from tasks import selection
from tasks.explaining import explain_round, read_image
from tasks.selection import SelectionConfig

STEM = "unlabeled-0"
# Of red (0): 0.9, 0.8 and 0.5; of green (1): 0.7; the other shards hold one of blue each.
ROWS = [("a", 0, 0.9, 1), ("b", 0, 0.8), ("c", 0, 0.5), ("d", 1, 0.7)]


@pytest.fixture
def labels(lab):
    rows = {shard.stem: [(f"x{i}", 2, 0.75)] for i, shard in enumerate(lab.unlabeled.shards)}
    return lab.plant_labeling(lab.store, lab.unlabeled, rows | {STEM: ROWS})


def explained(lab, labels, key, config, validation=None) -> Any:
    selected = lab.select(labels, validation, config)
    return explain_round(
        lab.store,
        lab.unlabeled.shard(STEM),
        key,
        labeling=labels,
        selection=selected,
        class_names=lab.class_names,
    )


def rules(**changes):
    plain: dict[str, Any] = {
        "calibration": "none",
        "balance": BalanceNoneConfig(),
        "threshold": FixedThresholdConfig(confidence=0.6),
        "allow_collapse": True,
    }
    return SelectionConfig(**plain | changes)


def test_a_kept_image_has_the_teachers_facts_and_its_soft_target(lab, labels):
    found = explained(lab, labels, "a", rules(weighting=ConfidenceWeightConfig()))
    assert [one.label for one in found.predicted] == ["red", "green", "blue"]
    # The other classes share 0.1, so the margin is 0.9 - 0.05.
    assert [one.probability for one in found.predicted] == pytest.approx([0.9, 0.05, 0.05], 1e-3)
    assert (found.confidence, found.margin) == pytest.approx((0.9, 0.85))
    assert found.truth == "green"
    judged = found.judgement
    assert (judged.label, judged.reason, judged.reason_in_words) == ("red", "kept", "kept")
    assert (judged.copies, judged.weight) == (1, pytest.approx(0.9))
    assert (judged.threshold, judged.kept_from) == (0.6, None)
    assert (judged.calibrated_confidence, judged.debiased_confidence) == (None, None)
    assert judged.target == "soft"
    assert judged.target_top[0].label == "red"
    assert judged.target_top[0].probability == pytest.approx(0.9, rel=1e-3)


def test_an_image_below_the_threshold_says_by_how_much(lab, labels):
    judged = explained(lab, labels, "c", rules()).judgement
    assert judged.reason == "below_threshold"
    assert judged.reason_in_words == "confidence 0.5000 is below 0.6000"
    assert (judged.copies, judged.weight, judged.target, judged.is_kept) == (0, 0.0, None, False)


def test_an_image_over_quota_says_from_where_its_class_was_full(lab, labels):
    config = rules(balance=TopKConfig(k=1, upsample=False), target="hard")
    judged = explained(lab, labels, "b", config).judgement
    assert judged.reason == "over_quota"
    assert judged.reason_in_words == "over quota: its class is full from confidence 0.9000 on"
    assert judged.kept_from == pytest.approx(0.9)
    kept = explained(lab, labels, "a", config).judgement
    assert (kept.target, kept.target_top[0].label) == ("hard", "red")


def test_an_image_thinned_at_random_is_told_from_one_below_the_cut(lab):
    rows = {shard.stem: [(f"x{i}", 2, 0.75)] for i, shard in enumerate(lab.unlabeled.shards)}
    # Twenty of red at 0.9 and one at 0.8 for a quota of ten: the cut is 0.9, and half are drawn.
    rows[STEM] = [*((f"r{i}", 0, 0.9) for i in range(20)), ("low", 0, 0.8)]
    labels = lab.plant_labeling(lab.store, lab.unlabeled, rows)
    config = rules(balance=NsBinnedConfig(k=10, upsample=False))
    low = explained(lab, labels, "low", config).judgement
    assert low.reason_in_words == "over quota: its class is full from confidence 0.9000 on"
    drawn = [explained(lab, labels, f"r{i}", config).judgement for i in range(20)]
    assert {one.reason_in_words for one in drawn} == {
        "kept",
        "over quota: its class is thinned at random, and the draw gave it no copy",
    }


@pytest.mark.parametrize("has_it_stored", [True, False])
def test_a_learned_threshold_is_shown_apart_from_the_quota(lab, labels, monkeypatch, has_it_stored):
    config = rules(threshold=PercentileThresholdConfig(step=50))
    # 50 % of the eight confidences .9 .8 .75 .75 .75 .75 .7 .5: numpy's median is 0.75.
    judged = explained(lab, labels, "d", config).judgement
    assert (judged.threshold, judged.kept_from) == pytest.approx((0.75, 0.75))
    quota = rules(threshold=PercentileThresholdConfig(step=50), balance=TopKConfig(k=1))
    if not has_it_stored:  # as in selections of earlier versions
        whole = selection.read_summary
        monkeypatch.setattr(
            "tasks.explaining.read_summary",
            lambda *args: {k: v for k, v in whole(*args).items() if k != "learned_thresholds"},
        )
    judged = explained(lab, labels, "a", quota).judgement
    assert judged.threshold == (pytest.approx(0.75) if has_it_stored else None)
    assert judged.kept_from > 0.75


def test_calibrated_and_debiased_confidences_are_those_of_the_selection(lab, labels):
    rng = np.random.default_rng(3)
    dev = lab.predictions_of(
        [
            (str(i), int(k), float(rng.uniform(0.4, 0.99)), int(k))
            for i, k in enumerate([0, 1, 2] * 9)
        ]
    )
    validation = lab.plant_validation(lab.store, dev)
    config = rules(calibration="temperature", debias=LogitAdjustConfig(tau=1.0))
    selected = lab.select(labels, validation, config)
    stored = selected.object(lab.unlabeled.shard(STEM).digest)
    chosen = from_parquet(read_stored(lab.store, stored), num_samples=4)
    for row, key in enumerate(chosen.keys):
        found = explained(lab, labels, key, config, validation)
        judged = found.judgement
        assert judged.label == lab.class_names[chosen.label[row]]
        assert judged.calibrated_confidence != pytest.approx(found.confidence, abs=1e-3)
        assert judged.debiased_confidence == judged.confidence
        # Red is predicted most, so debiasing lowers it.
        if judged.label == "red":
            assert judged.debiased_confidence < judged.calibrated_confidence
        assert judged.is_kept == (judged.confidence >= 0.6)


def test_a_key_without_prediction_gives_none(lab, labels):
    assert explained(lab, labels, "z", rules()) is None


def test_the_image_is_read_out_of_its_shard_alone(lab, labels, monkeypatch):
    asked = []

    def reading(corpus, locations, stem):
        asked.append(stem)
        return real(corpus, locations, stem)

    from tasks import explaining

    real = explaining.read_samples
    monkeypatch.setattr(explaining, "read_samples", reading)
    assert read_image(lab.store, lab.unlabeled, STEM, "u003") == lab.png(0, 3003, hardness=0.6)
    assert asked == [STEM]
    with pytest.raises(ValueError, match="unlabeled-0 has no sample 'unlabeled-0/u999'"):
        read_image(lab.store, lab.unlabeled, STEM, "u999")
