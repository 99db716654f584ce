"""Debiasing, learned thresholds, weights and class-wise balancing, through the whole stage."""

import itertools
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.balancing import BalanceNoneConfig, CapMinConfig, CrestConfig, NsBinnedConfig
from models.debiasing import (
    DistributionAlignmentConfig,
    LogitAdjustConfig,
    ProgressiveAlignmentConfig,
)
from models.thresholds import (
    ClassAdaptiveFlexConfig,
    FixedThresholdConfig,
    FreeMatchConfig,
    HistogramValleyConfig,
    PercentileThresholdConfig,
    PerClassQuantileConfig,
)
from models.weighting import ConfidenceWeightConfig, SoftMatchConfig
from storage.corpus import Corpus, Shard, load_corpus, save_corpus
from storage.selections import Reason
from tasks import selection, selection_passes, selection_writing
from tasks.distributions import Calibration
from tasks.selection import SelectionConfig, read_summary
from tasks.selection_rows import STEPS
from tasks.selection_summary import EmptySelection

# (key, label, confidence, truth) of three classes; the two others share the rest.
ROWS = {
    "a": [("0", 0, 0.9375, 0), ("1", 0, 0.5, 1), ("2", 1, 0.75, 1), ("3", 2, 0.4375, 2)],
    "b": [("0", 0, 0.875, 0), ("1", 0, 0.8125, -1), ("2", 2, 0.75, 2), ("3", 1, 0.625, 0)],
    "c": [("0", 0, 0.875, 0), ("1", 1, 0.5625, -1), ("2", 0, 0.53125, 2)],
}


def config(**changes: Any) -> SelectionConfig:
    settings: dict[str, Any] = {
        "calibration": "none",
        "threshold": FixedThresholdConfig(confidence=0),
        "balance": BalanceNoneConfig(),
        "target": "hard",
        "allow_collapse": True,
    }
    return SelectionConfig(**settings | changes)


def plant(lab, rows=None):
    rows = ROWS if rows is None else rows
    return lab.plant_labeling(lab.store, lab.planted_corpus(rows), rows)


def plant_labels(lab, counts):
    """The digest of a labelled corpus with these class counts; its classes are green, blue, red."""
    by_number = {(number - 1) % 3: count for number, count in enumerate(counts)}
    shard = Shard("labels", "9" * 64, sum(counts), 1024, by_number)
    corpus = Corpus.of([shard], ("green", "blue", "red"))
    save_corpus(lab.store, corpus, {"labels": "/nowhere/labels.tar"})
    return corpus.digest


def validation_of(lab):
    """Dev predictions that claim .9 and are right 3 times of 4; wrong ones are the next class."""
    rows = [(str(i), i % 3, 0.9, i % 3 if i % 4 < 3 else (i + 1) % 3) for i in range(48)]
    return lab.plant_validation(lab.store, lab.predictions_of(rows))


def select(lab, chosen, rows=None, *, validation=None, **more):
    return lab.select(plant(lab, rows), validation, chosen, **more)


def stored(lab, manifest, rows=None):
    rows = ROWS if rows is None else rows
    return lab.stored_selections(manifest, rows)


def kept(lab, manifest, rows=None):
    return {
        f"{stem}/{key}"
        for stem, chosen in stored(lab, manifest, rows).items()
        for key, is_kept in zip(chosen.keys, chosen.kept, strict=True)
        if is_kept
    }


# ------------------------------------------------------------------------------- debiasing


def planted_bias():
    """Balanced truth; a teacher that takes a third of class 2 and half of class 1 for class 0."""
    rng = np.random.default_rng(1)
    rows: dict[str, list[tuple[str, int, float, int]]] = {"a": [], "b": []}
    for i in range(600):
        truth = i % 3
        is_taken = rng.random() < (0, 1 / 2, 1 / 3)[truth]
        label = 0 if is_taken else truth
        confidence = rng.uniform(0.34, 0.42) if is_taken else rng.uniform(0.6, 0.95)
        rows["ab"[i % 2]].append((f"{i:03d}", label, float(confidence), truth))
    return rows


def test_a_planted_bias_is_reproduced_without_debiasing_and_shrinks_with_it(lab):
    # KL from the balanced prior of what is selected. Fails where debiasing moves confidences only,
    # for the classes would stay.
    rows = planted_bias()

    def divergence(chosen):
        summary = read_summary(lab.store, select(lab, chosen, rows))
        counts = np.array([one["copies"] for one in summary["classes"]])
        assert counts.tolist() == [one["predicted"] for one in summary["classes"]]
        shares = counts / counts.sum()
        return counts.tolist(), float((shares * np.log(3 * shares)).sum())

    teachers = [sum(row[1] == c for shard in rows.values() for row in shard) for c in range(3)]
    plain, plain_divergence = divergence(config())
    assert plain == teachers
    assert plain[0] > 1.5 * plain[1]
    for debias in (
        LogitAdjustConfig(),
        LogitAdjustConfig(tau=1),
        DistributionAlignmentConfig(target="uniform"),
    ):
        _, divergence_after = divergence(config(debias=debias))
        assert divergence_after < 0.9 * plain_divergence


def test_label_confidence_and_soft_target_are_of_the_debiased_prediction(lab):
    # One row (.5, .3, .2)-like: (.4, .3, .3), nine of (.8, .1, .1): mean (.76, .12, .12). To the
    # uniform target: .4 / .76 = .526, .3 / .12 = 2.5: (.0952, .4524, .4524), so class 1; the nine:
    # 1.0526, .8333, .8333: (.3871, .3065, .3065), still class 0.
    rows = {"a": [("0", 0, 0.4)] + [(str(i), 0, 0.8) for i in range(1, 10)]}
    chosen = config(
        debias=DistributionAlignmentConfig(target="uniform"),
        threshold=FixedThresholdConfig(confidence=0.4),
        target="soft",
    )
    manifest = select(lab, chosen, rows)
    found = stored(lab, manifest, rows)["a"]
    assert found.label.tolist() == [1] + [0] * 9
    # The threshold counts after debiasing: .4524 reaches .4, .3871 does not, though it was .8.
    assert kept(lab, manifest, rows) == {"a/0"}
    targets = np.exp(found.target_log_probs.astype(np.float64))
    assert targets == pytest.approx([0.0952, 0.4524, 0.4524], abs=1e-3)
    assert targets[found.label[0]] == targets.max()
    facts = read_summary(lab.store, manifest)["debias"]
    assert facts["mean_probs"] == pytest.approx([0.76, 0.12, 0.12], abs=1e-3)


def test_calibrated_predictions_are_what_is_debiased(lab):
    # Dev asks for T = 1.67: the mean of calibrated predictions is nearer to uniform than the raw.
    plain = select(lab, config(debias=LogitAdjustConfig()))
    scaled = select(
        lab,
        config(debias=LogitAdjustConfig(), calibration="temperature"),
        validation=validation_of(lab),
    )
    largest = [max(read_summary(lab.store, one)["debias"]["mean_probs"]) for one in (plain, scaled)]
    assert largest[1] < largest[0] - 0.02


@pytest.mark.parametrize(
    ("debias", "round_index", "target"),
    [
        # 16, 4 and 4 labelled: shares 2/3, 1/6, 1/6
        (DistributionAlignmentConfig(), 1, [2 / 3, 1 / 6, 1 / 6]),
        (ProgressiveAlignmentConfig(generations=2), 1, [2 / 3, 1 / 6, 1 / 6]),
        # Square roots 4, 2, 2
        (ProgressiveAlignmentConfig(generations=2), 2, [1 / 2, 1 / 4, 1 / 4]),
    ],
)
def test_alignment_takes_the_labels_shares_by_class_name(lab, debias, round_index, target):
    # red 16, green 4, blue 4, in a corpus that numbers its classes green, blue, red.
    labeled = plant_labels(lab, [16, 4, 4])
    manifest = select(lab, config(debias=debias), labeled=labeled, round_index=round_index)
    summary = read_summary(lab.store, manifest)
    assert summary["labeled_counts"] == [16, 4, 4]
    facts = summary["debias"]
    powered = np.exp(facts["offsets"]) * np.array(facts["mean_probs"])
    assert powered == pytest.approx(target)
    assert manifest.inputs["labeled"].fingerprint == labeled


# ------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(("round_index", "count"), [(1, 3), (2, 6), (3, 7), (4, 9), (5, 11)])
def test_the_curriculum_keeps_more_in_each_round(lab, round_index, count):
    # Ascending: .4375 .5 .53125 .5625 .625 .75 .75 .8125 .875 .875 .9375. The percentiles 80, 60,
    # 40, 20, 0 of 11 lie at places 8, 6, 4, 2, 0: .875 (3 reach it), .75 (6), .625, .53125, .4375.
    manifest = select(lab, config(threshold=PercentileThresholdConfig()), round_index=round_index)
    assert len(kept(lab, manifest)) == count


def test_class_quantiles_are_of_the_predicted_class(lab):
    manifest = select(lab, config(threshold=PerClassQuantileConfig(keep_fraction=0.5)))
    # Class 0 has .9375 .875 .875 .8125 .53125 .5: median .84375, 3 above. Class 1 has .75 .625
    # .5625: median .625. Class 2 has .75 .4375: .59375.
    assert kept(lab, manifest) == {"a/0", "b/0", "c/0", "a/2", "b/3", "b/2"}
    summary = read_summary(lab.store, manifest)
    assert summary["class_thresholds"] == [0.84375, 0.625, 0.59375]
    assert [Reason(r).name for r in stored(lab, manifest)["c"].reason] == [
        "KEPT",
        "BELOW_THRESHOLD",
        "BELOW_THRESHOLD",
    ]


def test_learned_thresholds_are_the_floor_of_a_quota(lab):
    chosen = config(
        threshold=PerClassQuantileConfig(keep_fraction=0.5), balance=NsBinnedConfig(k=100)
    )
    summary = read_summary(lab.store, select(lab, chosen))
    assert summary["class_thresholds"] == [0.84375, 0.625, 0.59375]
    assert summary["quota"] == 100


def test_an_empty_selection_names_the_rule_that_chose(lab):
    rows = {"a": [("0", 0, 0.6), ("1", 1, 0.6)]}
    valley = HistogramValleyConfig(low=0.9, bins=2, min_per_bin=0)
    with pytest.raises(EmptySelection, match="than histogram_valley, or look at"):
        select(lab, config(threshold=valley), rows)


# ------------------------------------------------------------------------------- weights


def test_confidence_weights_are_the_calibrated_confidences(lab):
    manifest = select(lab, config(weighting=ConfidenceWeightConfig()))
    for stem, found in stored(lab, manifest).items():
        assert found.weight.tolist() == [row[2] for row in ROWS[stem]]


def test_softmatch_weights_every_row_and_leaves_labels_and_targets_alone(lab):
    rows = planted_bias()
    chosen = config(weighting=SoftMatchConfig(), target="soft")
    manifest = select(lab, chosen, rows)
    summary = read_summary(lab.store, manifest)
    assert summary["unique"] == 600
    weights = {}
    for stem, found in stored(lab, manifest, rows).items():
        planted = lab.predictions_of(rows[stem])
        assert found.label.tolist() == planted.label.tolist()
        np.testing.assert_array_equal(found.target_log_probs.reshape(-1, 3), planted.log_probs)
        for row, weight in zip(rows[stem], found.weight.tolist(), strict=True):
            weights[row[0]] = (row[1], row[2], weight)
    values = np.array([weight for _, _, weight in weights.values()])
    assert values.min() > 0
    assert values.max() == 1
    # The favoured class 0 weighs less than class 1 at the same confidence.
    low, high = 0.65, 0.7
    means = [
        np.mean([w for label, c, w in weights.values() if label == wanted and low < c < high])
        for wanted in (0, 1)
    ]
    assert means[0] < means[1]
    # Of the aligned confidences themselves, worked out here without passes or shards.
    log_probs = np.concatenate(
        [lab.predictions_of(shard).log_probs for shard in rows.values()]
    ).astype(np.float64)
    probs = np.exp(log_probs) / np.exp(log_probs).sum(axis=1, keepdims=True)
    aligned = probs / probs.mean(axis=0)
    confidences = (aligned / aligned.sum(axis=1, keepdims=True)).max(axis=1)
    assert summary["softmatch"]["mean"] == pytest.approx(confidences.mean(), abs=1e-9)
    assert summary["softmatch"]["variance"] == pytest.approx(confidences.var(), abs=1e-9)


# ------------------------------------------------------------------------------- balance


def test_crest_keeps_all_of_the_rarest_class_and_least_of_the_most_frequent(lab):
    # red 8, green 4, blue 1 labelled: rates (1/8, 4/8, 1) ** 1/3 = (.5, .794, 1) of 6, 3 and 2
    # pseudo-labels: 3, 2.38 -> 2, and 2.
    manifest = select(lab, config(balance=CrestConfig()), labeled=plant_labels(lab, [8, 4, 1]))
    assert kept(lab, manifest) == {"a/0", "b/0", "c/0", "a/2", "b/3", "b/2", "a/3"}
    assert read_summary(lab.store, manifest)["quotas"] == [3, 2, 2]


def test_cap_min_cuts_to_the_smallest_class(lab):
    manifest = select(lab, config(balance=CapMinConfig(floor=1)))
    # Class 2 has two; of class 0's tie at .875 the smaller key stays.
    assert kept(lab, manifest) == {"a/0", "b/0", "a/2", "b/3", "b/2", "a/3"}
    assert read_summary(lab.store, manifest)["quota"] == 2


# ------------------------------------------------------------------------------- calibration


def test_vector_scaling_reports_ece_before_and_after_and_reads_dev(lab):
    validation = validation_of(lab)
    manifest = select(lab, config(calibration="vector"), validation=validation)
    summary = read_summary(lab.store, manifest)
    assert summary["ece_before"] == pytest.approx(0.15, abs=2e-3)
    assert summary["ece_after"] < 0.05
    assert len(summary["vector"]["weights"]) == len(summary["vector"]["biases"]) == 3
    assert "temperature" not in summary
    assert manifest.inputs["validation"].fingerprint == validation.fingerprint


def test_vector_scaling_may_move_the_class_and_the_target_with_it(lab):
    # On dev, whatever is claimed to be class 0 at .6 is class 1 in two of three cases.
    dev = [(str(i), 0, 0.6, 0 if i % 3 == 0 else 1) for i in range(90)]
    dev += [(str(i), 1 + i % 2, 0.6, 1 + i % 2) for i in range(90, 150)]
    validation = lab.plant_validation(lab.store, lab.predictions_of(dev))
    rows = {"a": [("0", 0, 0.6), ("1", 2, 0.9)]}
    chosen = config(calibration="vector", target="soft")
    found = stored(lab, select(lab, chosen, rows, validation=validation), rows)["a"]
    assert found.label.tolist() == [1, 2]
    targets = found.target_log_probs.reshape(2, 3)
    assert targets.argmax(axis=1).tolist() == [1, 2]


# ------------------------------------------------------------------------------- properties

RULES = {
    "adjust": config(debias=LogitAdjustConfig(), balance=NsBinnedConfig(k=3), target="soft"),
    "align": config(
        debias=DistributionAlignmentConfig(), calibration="temperature", balance=CrestConfig()
    ),
    "percentile": config(threshold=PercentileThresholdConfig(step=60), calibration="temperature"),
    "quantile": config(threshold=PerClassQuantileConfig(keep_fraction=0.6)),
    "flex": config(threshold=ClassAdaptiveFlexConfig(confidence=0.7), debias=LogitAdjustConfig()),
    "freematch": config(threshold=FreeMatchConfig(), calibration="vector"),
    "valley": config(threshold=HistogramValleyConfig(bins=4, min_per_bin=0, scope="per_class")),
    "softmatch": config(weighting=SoftMatchConfig(), calibration="temperature"),
    "cap": config(balance=CapMinConfig(floor=1), weighting=ConfidenceWeightConfig()),
}


@pytest.mark.parametrize("name", RULES)
def test_order_and_grouping_of_shards_change_no_byte(lab, tmp_path, name):
    stems = list(ROWS)
    groupings = [[stems], *([[x, y], [z]] for x, y, z in itertools.permutations(stems))]
    found = set()
    for number, groups in enumerate(groupings):
        fresh = lab.in_empty_store(tmp_path / str(number))
        validation = validation_of(fresh) if RULES[name].calibration != "none" else None
        labeled = plant_labels(fresh, [8, 4, 1])
        manifest = select(fresh, RULES[name], validation=validation, labeled=labeled, groups=groups)
        found.add((manifest.fingerprint, manifest.sha256))
    assert len(found) == 1


@pytest.mark.parametrize("name", RULES)
def test_truth_never_steers(lab, tmp_path, name):
    lies = {
        stem: [(key, label, c, (label + 1) % 3) for key, label, c, _ in rows]
        for stem, rows in ROWS.items()
    }
    found = []
    for number, rows in enumerate((ROWS, lies)):
        fresh = lab.in_empty_store(tmp_path / str(number))
        validation = validation_of(fresh) if RULES[name].calibration != "none" else None
        labeled = plant_labels(fresh, [8, 4, 1])
        manifest = select(fresh, RULES[name], rows, validation=validation, labeled=labeled)
        found.append({o.name: o.sha256 for o in manifest.objects if o.name != "summary"})
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_steps_out_of_order_are_refused(lab):
    labels = plant(lab)
    chosen = config()
    specification = selection.specify(
        chosen, labeling=labels.fingerprint, validation="none", seed=0, round_index=1
    )
    corpus = load_corpus(lab.store, labels.inputs["corpus"].fingerprint)
    begun = selection.begin(lab.store, specification, labels, corpus)
    with pytest.raises(AssertionError, match="calibrate comes after"):
        selection.calibrate(lab.store, specification, begun, None, class_names=lab.class_names)
    inputs, _ = selection.calibrate(
        lab.store, specification, begun.after("gate"), None, class_names=lab.class_names
    )
    assert inputs.done == ("gate", "calibrate")
    with pytest.raises(AssertionError, match="balance comes after"):
        selection_passes.count_confidences(lab.store, inputs, ["a"], chosen)
    with pytest.raises(AssertionError, match="threshold comes after"):
        inputs.after("threshold", thresholds=chosen.threshold)
    with pytest.raises(AssertionError, match="debias comes after"):
        inputs.after("debias").after("debias")
    with pytest.raises(AssertionError, match="write comes after"):
        selection_writing.write_selections(lab.store, specification, inputs, ["a"], chosen, None)  # pyright: ignore[reportArgumentType]
    assert STEPS == ("gate", "calibrate", "debias", "threshold", "weight", "balance", "write")


# ------------------------------------------------------------------------------- fingerprints

SPECIFY: dict[str, Any] = {
    "labeling": "a" * 64,
    "validation": "b" * 64,
    "seed": 0,
    "round_index": 1,
}


def test_the_new_sections_are_absent_from_old_fingerprints():
    settings = selection.specify(config(), **SPECIFY, labeled="c" * 64)
    assert set(settings.settings["selection"]) == {
        "calibration",
        "threshold",
        "balance",
        "target",
    }
    assert set(settings.inputs) == {"labeling"}


def test_every_rule_has_a_fingerprint_of_its_own():
    found = {
        selection.specify(chosen, **SPECIFY, labeled="c" * 64).fingerprint
        for chosen in [config(), *RULES.values()]
    }
    assert len(found) == 1 + len(RULES)


def test_the_labelled_corpus_is_an_input_exactly_where_its_counts_are_read():
    reading = config(debias=DistributionAlignmentConfig())
    first, second = (
        selection.specify(reading, **SPECIFY, labeled=digest * 64) for digest in ("c", "d")
    )
    assert first.fingerprint != second.fingerprint
    assert first.inputs["labeled"] == "c" * 64
    with pytest.raises(ValueError, match="no labelled corpus is given"):
        selection.specify(reading, **SPECIFY)
    uniform = config(debias=DistributionAlignmentConfig(target="uniform"))
    assert "labeled" not in selection.specify(uniform, **SPECIFY, labeled="c" * 64).inputs


def test_softmatch_and_debiasing_together_are_refused():
    with pytest.raises(ValidationError, match="SoftMatch aligns confidences itself"):
        config(weighting=SoftMatchConfig(), debias=LogitAdjustConfig())


def test_a_finished_selection_tells_what_moved_its_labels_and_confidences(lab):
    # The report shows predictions as the threshold saw them.
    chosen = config(
        calibration="vector", debias=LogitAdjustConfig(), weighting=ConfidenceWeightConfig()
    )
    manifest = select(lab, chosen, validation=validation_of(lab))
    calibration = Calibration.of_summary(read_summary(lab.store, manifest))
    assert calibration.temperature is None
    for stem, found in stored(lab, manifest).items():
        planted = lab.predictions_of(ROWS[stem])
        labels, confidences = calibration.seen_by_threshold(planted)
        assert labels.tolist() == found.label.tolist()
        assert confidences.tolist() == found.weight.tolist()
