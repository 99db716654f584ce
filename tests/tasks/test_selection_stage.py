"""Selection end to end on planted predictions, with kept sets worked out by hand."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.balancing import BalanceNoneConfig, NsBinnedConfig, TopKConfig
from models.thresholds import FixedThresholdConfig
from storage.predictions import DamagedPredictions
from storage.selections import Reason
from tasks import selection
from tasks.selection import SelectionConfig, read_summary
from tasks.selection_summary import CollapsedSelection, EmptySelection

# (key, label, confidence, truth); the shards' stems are a, b, c. Confidences are exact in float32.
ROWS = {
    "a": [
        ("0", 0, 0.9375, 0),
        ("1", 0, 0.5, 1),
        ("2", 1, 0.75, 1),
        ("3", 2, 0.4375, 2),
    ],
    "b": [
        ("0", 0, 0.875, 0),
        ("1", 0, 0.8125, -1),
        ("2", 2, 0.75, 2),
        ("3", 1, 0.625, 0),
    ],
    "c": [
        ("0", 0, 0.875, 0),
        ("1", 1, 0.5625, -1),
        ("2", 0, 0.53125, 2),
    ],
}
STEMS = list(ROWS)


def config(**changes):
    settings = {
        "calibration": "none",
        "threshold": FixedThresholdConfig(confidence=0.5),
        "balance": BalanceNoneConfig(),
        "target": "hard",
        "allow_collapse": True,
    }
    return SelectionConfig(**settings | changes)


def plant(lab, rows=None, **more):
    rows = ROWS if rows is None else rows
    return lab.plant_labeling(lab.store, lab.planted_corpus(rows), rows, **more)


def select(lab, chosen, rows=None, *, labels=None, validation=None, **more):
    return lab.select(labels or plant(lab, rows), validation, chosen, **more)


def stored(lab, manifest, rows=None):
    """Selection by stem."""
    rows = ROWS if rows is None else rows
    return lab.stored_selections(manifest, rows)


def copies(lab, manifest, rows=None):
    """Copies of every selected sample, by key."""
    return {
        f"{stem}/{key}": int(n)
        for stem, chosen in stored(lab, manifest, rows).items()
        for key, n in zip(chosen.keys, chosen.copies, strict=True)
        if n
    }


def parquet_names(manifest):
    """Names of the shards' objects hold the sha256 of their bytes."""
    return {o.name: o.sha256 for o in manifest.objects if o.name != "summary"}


def test_fixed_threshold_keeps_what_reaches_it(lab):
    manifest = select(lab, config())
    # Only a/3 (0.4375) lies below 0.5; a/1 is equal to it and stays.
    assert copies(lab, manifest) == dict.fromkeys(
        ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2", "b/3", "c/0", "c/1", "c/2"], 1
    )
    chosen = stored(lab, manifest)["a"]
    assert [Reason(r).name for r in chosen.reason] == ["KEPT", "KEPT", "KEPT", "BELOW_THRESHOLD"]
    assert chosen.kept.tolist() == [True, True, True, False]
    assert chosen.weight.tolist() == [1, 1, 1, 0]
    assert chosen.label.tolist() == [0, 0, 1, 2]
    assert manifest.counts["kept"] == manifest.counts["unique"] == 10
    assert manifest.counts["samples"] == 11
    assert manifest.counts["items"] == {"a": 3, "b": 4, "c": 3}


def test_a_selection_reads_the_rows_of_its_own_labeler_only(lab):
    # The other teacher turns every class into the next one and every confidence c into 1.25 - c,
    # so it is a/3 (.8125) that stays and a/0, b/0 and c/0 (.3125, .375, .375) that go, with b/1
    # (.4375).
    other_rows = {
        stem: [(key, (label + 1) % 3, 1.25 - c, truth) for key, label, c, truth in rows]
        for stem, rows in ROWS.items()
    }
    labels, other_labels = plant(lab), plant(lab, other_rows, labeler="e" * 64)
    assert labels.inputs["corpus"] == other_labels.inputs["corpus"]
    first, second = (select(lab, config(), labels=one) for one in (labels, other_labels))
    assert set(copies(lab, first)) == {f"{s}/{row[0]}" for s in ROWS for row in ROWS[s]} - {"a/3"}
    assert set(copies(lab, second)) == {"a/1", "a/2", "a/3", "b/2", "b/3", "c/1", "c/2"}
    for stem, rows in ROWS.items():
        of_first = [label for _, label, _, _ in rows]
        assert stored(lab, first)[stem].label.tolist() == of_first
        assert stored(lab, second)[stem].label.tolist() == [(label + 1) % 3 for label in of_first]


def test_top_k_keeps_the_best_of_each_class_and_ties_go_by_key(lab):
    manifest = select(lab, config(balance=TopKConfig(k=2)))
    # Class 0: a/0 .9375, then b/0 and c/0 tie at .875: the smaller key wins. Class 1: a/2, b/3.
    # Class 2 has b/2 alone above the threshold: 2 / 1 = 2 copies.
    assert copies(lab, manifest) == {"a/0": 1, "b/0": 1, "a/2": 1, "b/3": 1, "b/2": 2}
    reasons = {
        f"{stem}/{key}": Reason(r).name
        for stem, chosen in stored(lab, manifest).items()
        for key, r in zip(chosen.keys, chosen.reason, strict=True)
    }
    assert [k for k, r in reasons.items() if r == "OVER_QUOTA"] == [
        "a/1",
        "b/1",
        "c/0",
        "c/1",
        "c/2",
    ]
    assert [k for k, r in reasons.items() if r == "BELOW_THRESHOLD"] == ["a/3"]
    assert manifest.counts["kept"] == 6
    assert manifest.counts["unique"] == 5


def test_ns_binned_cuts_at_a_hundredth_and_duplicates_small_classes(lab):
    manifest = select(lab, config(balance=NsBinnedConfig(k=3)))
    # Class 0 above 0.5: .9375, .875, .875, .8125, .53125, .5. The walk down reaches 3 at bin 87,
    # which a/0, b/0 and c/0 are in or above: 3 / 3 = 1 copy each. Class 1 has 3: all, 1 copy.
    # Class 2 has b/2: 3 copies.
    assert copies(lab, manifest) == {
        "a/0": 1,
        "b/0": 1,
        "c/0": 1,
        "a/2": 1,
        "b/3": 1,
        "c/1": 1,
        "b/2": 3,
    }


def test_the_median_quota_leaves_out_classes_without_anything(lab):
    manifest = select(
        lab, config(balance=TopKConfig(k="median"), threshold=FixedThresholdConfig(confidence=0.8))
    )
    # Only class 0 passes, with 4 (a/0, b/0, c/0, b/1); the median of {4} is 4.
    assert copies(lab, manifest) == {"a/0": 1, "b/0": 1, "c/0": 1, "b/1": 1}


def test_max_copies_and_upsample_bound_what_is_duplicated(lab):
    capped = select(lab, config(balance=TopKConfig(k=9, max_copies=2)))
    # Class 0 has 6 samples for 9, so 1.5 copies; class 1 has 3 and class 2 has 1, both capped.
    found = copies(lab, capped)
    assert {key: found[key] for key in ("a/2", "b/3", "c/1", "b/2")} == dict.fromkeys(
        ("a/2", "b/3", "c/1", "b/2"), 2
    )
    assert {found[key] for key in ("a/0", "a/1", "b/0", "b/1", "c/0", "c/2")} <= {1, 2}
    plain = select(lab, config(balance=TopKConfig(k=9, upsample=False)))
    assert set(copies(lab, plain).values()) == {1}


@pytest.mark.parametrize("balance", [BalanceNoneConfig(), TopKConfig(k=2), NsBinnedConfig(k=2)])
def test_soft_targets_are_the_teachers_distribution_of_kept_rows_only(lab, balance):
    hard = select(lab, config(balance=balance))
    soft = select(lab, config(balance=balance, target="soft"))
    assert copies(lab, hard) == copies(lab, soft)
    planted = {stem: lab.predictions_of(rows) for stem, rows in ROWS.items()}
    for stem, chosen in stored(lab, soft).items():
        kept = np.flatnonzero(chosen.kept)
        np.testing.assert_array_equal(
            chosen.target_log_probs.reshape(-1, 3), planted[stem].log_probs[kept]
        )
        assert chosen.target_ids.tolist() == [0, 1, 2] * len(kept)
        assert np.diff(chosen.target_offsets).tolist() == [3 if k else 0 for k in chosen.kept]
    for chosen in stored(lab, hard).values():
        assert chosen.target_ids.tolist() == []


def validation_of(lab, p=0.9, *, correct=3, total=4):
    """Dev predictions that claim p and are right correct / total of the time."""
    rows = [(str(i), i % 3, p, i % 3 if i % total < correct else (i + 1) % 3) for i in range(48)]
    return lab.plant_validation(lab.store, lab.predictions_of(rows))


def test_temperature_is_fitted_on_dev_and_moves_the_threshold(lab):
    validation = validation_of(lab)
    manifest = select(
        lab,
        config(calibration="temperature", threshold=FixedThresholdConfig(confidence=0.58)),
        validation=validation,
    )
    summary = read_summary(lab.store, manifest)
    # Claims (.9, .05, .05), is right 3 times of 4 and else wrong in one of two others. 48 samples
    # vouch for 49/50 of each label: the claimed class has .75 * .98 + .25 * .01 = .7375 of the
    # mass, each other .13125, so 18^(1/T) = .7375 / .13125 = 5.61905, T = ln 18 / ln 5.61905.
    assert summary["temperature"] == pytest.approx(1.67451, abs=2e-3)
    assert summary["ece_before"] == pytest.approx(0.15, abs=2e-3)
    assert summary["ece_after"] == pytest.approx(0.0125, abs=2e-3)
    # A confidence c with the rest spread evenly has odds 2c / (1 - c), so it is .58 after
    # calibration at odds 2.7619^T = 5.480, c = .7326: 0.75 passes and 0.625 does not.
    assert set(copies(lab, manifest)) == {"a/0", "a/2", "b/0", "b/1", "b/2", "c/0"}
    assert manifest.inputs["validation"].fingerprint == validation.fingerprint


def test_without_calibration_dev_is_not_read_and_is_no_input(lab):
    manifest = select(lab, config())
    assert set(manifest.inputs) == {"labeling"}
    assert "temperature" not in read_summary(lab.store, manifest)


def groupings():
    yield [STEMS]
    yield [[stem] for stem in STEMS]
    yield from ([[a, b], [c]] for a, b, c in itertools.permutations(STEMS))


@pytest.mark.parametrize(
    "balance", [BalanceNoneConfig(), TopKConfig(k=4), NsBinnedConfig(k=4), NsBinnedConfig()]
)
def test_order_and_grouping_of_shards_change_no_byte(lab, tmp_path, balance):
    validation = validation_of(lab)
    found = set()
    for number, groups in enumerate(groupings()):
        fresh = lab.in_empty_store(tmp_path / str(number))
        labels = plant(fresh)
        again = validation_of(fresh)
        assert again.fingerprint == validation.fingerprint
        manifest = select(
            fresh,
            config(balance=balance, calibration="temperature", target="soft"),
            labels=labels,
            validation=again,
            groups=groups,
        )
        found.add((manifest.fingerprint, manifest.sha256))
    assert len(found) == 1


def test_draws_depend_on_seed_and_round_and_key_alone(lab, tmp_path):
    rows = {"a": [(str(i), i % 2, 0.75) for i in range(60)]}

    def chosen(name, **more):
        fresh = lab.in_empty_store(tmp_path / name)
        manifest = select(fresh, config(balance=NsBinnedConfig(k=10)), rows, **more)
        return copies(fresh, manifest, rows)

    same = chosen("first", seed=1)
    assert chosen("second", seed=1) == same
    assert chosen("round", seed=1, round_index=2) != same
    assert len({tuple(chosen(f"seed{s}", seed=s)) for s in range(4)}) == 4
    # 30 of each class thinned to 10: 20 of 60, give or take three standard deviations of 3.7.
    assert 9 <= sum(same.values()) <= 31


def test_truth_never_steers(lab, tmp_path):
    lies = {
        stem: [(key, label, c, (label + 1) % 3) for key, label, c, _ in rows]
        for stem, rows in ROWS.items()
    }
    unknown = {stem: [row[:3] for row in rows] for stem, rows in ROWS.items()}
    found = []
    for name, rows in (("truth", ROWS), ("lies", lies), ("unknown", unknown)):
        fresh = lab.in_empty_store(tmp_path / name)
        manifest = select(fresh, config(balance=NsBinnedConfig(), target="soft"), rows)
        found.append(
            (parquet_names(manifest), read_summary(fresh.store, manifest), manifest.fingerprint)
        )
    (parquet, summary, fingerprint), (lied, of_lies, _), (hidden, of_unknown, _) = found
    assert lied == hidden == parquet
    assert len(parquet) == 3
    assert {fp for _, _, fp in found} == {fingerprint}
    # Diagnosis sees it: b/1 and c/1 are of unknown truth.
    assert of_lies["precision"] == 0
    assert of_unknown["precision"] is None
    assert summary["precision_known"] > 0
    assert summary["kept"] == of_lies["kept"] == of_unknown["kept"]


def test_the_summary_counts_classes_reasons_and_what_is_true(lab):
    summary = read_summary(lab.store, select(lab, config(balance=TopKConfig(k=2))))
    assert summary["classes"] == [
        {"name": "red", "predicted": 6, "unique": 2, "copies": 2},
        {"name": "green", "predicted": 3, "unique": 2, "copies": 2},
        {"name": "blue", "predicted": 2, "unique": 1, "copies": 2},
    ]
    assert summary["reasons"] == {
        "kept": 5,
        "below_threshold": 1,
        "over_quota": 5,
        "leaked": 0,
        "out_of_domain": 0,
        "quarantined": 0,
    }
    assert summary["coverage"] == pytest.approx(5 / 11)
    # Kept: a/0, b/0, a/2, b/2 are right, b/3 is not.
    assert summary["precision"] == pytest.approx(4 / 5)
    assert summary["precision_known"] == 5
    histogram = summary["confidence_histogram"]
    # Bins of 1/20: .9375 in 18, .875 in 17, .75 in 15 (twice), .625 in 12.
    assert {i: n for i, n in enumerate(histogram["kept"]) if n} == {12: 1, 15: 2, 17: 1, 18: 1}
    assert sum(histogram["kept"]) + sum(histogram["rejected"]) == 11
    assert sum(histogram["known"]) == 9
    assert sum(histogram["correct"]) == 6


def test_a_selection_that_keeps_nothing_says_why(lab):
    chosen = config(threshold=FixedThresholdConfig(confidence=0.99))
    with pytest.raises(EmptySelection) as caught:
        select(lab, chosen)
    assert "keeps none of 11 predictions (rejected: below_threshold 11)" in str(caught.value)
    assert "lower selection.threshold.confidence" in str(caught.value)
    assert not list(Path(lab.store.url).glob("selections/*/manifest.json"))


ONE_CLASS = {"a": [("0", 0, 0.9), ("1", 0, 0.9), ("2", 1, 0.9), ("3", 0, 0.9), ("4", 2, 0.2)]}


def test_a_collapsed_selection_shows_the_class_table(lab):
    with pytest.raises(CollapsedSelection) as caught:
        select(lab, config(allow_collapse=False), ONE_CLASS)
    message = str(caught.value)
    assert "class 'red' holds 75% of 4 selected items (limit max_class_share=0.50)" in message
    assert "selection.allow_collapse=true" in message
    assert message.endswith(
        "class  predicted  unique  copies\n"
        "red            3       3       3\n"
        "green          1       1       1\n"
        "blue           1       0       0"
    )
    assert not list(Path(lab.store.url).glob("selections/*/manifest.json"))


def test_most_classes_empty_is_a_collapse_even_if_no_share_is_large(lab):
    rows = {"a": [(str(i), i % 2, 0.9) for i in range(8)]}
    chosen = config(allow_collapse=False, max_class_share=1.0)
    labels = lab.plant_labeling(lab.store, lab.planted_corpus(rows), rows, num_classes=5)
    names = ["a", "b", "c", "d", "e"]
    with pytest.raises(CollapsedSelection, match="3 of 5 classes get nothing"):
        lab.run_selection(lab.store, labels, None, chosen, class_names=names)


def test_a_collapse_may_be_allowed_afterwards_and_the_shards_are_not_written_again(lab):
    with pytest.raises(CollapsedSelection):
        select(lab, config(allow_collapse=False), ONE_CLASS)
    records = {p: p.stat().st_mtime_ns for p in Path(lab.store.url).glob("selections/*/shards/*")}
    assert len(records) == 1
    manifest = select(lab, config(allow_collapse=True), ONE_CLASS)
    assert manifest.counts["kept"] == 4
    assert {p: p.stat().st_mtime_ns for p in records} == records


def test_a_larger_share_may_be_allowed(lab):
    manifest = select(lab, config(allow_collapse=False, max_class_share=0.75), ONE_CLASS)
    assert manifest.counts["kept"] == 4


def test_a_selection_that_was_cut_off_goes_on_and_ends_in_the_same_bytes(lab, tmp_path):
    chosen = config(balance=TopKConfig(k=3), target="soft")
    whole = select(lab, chosen)
    fresh = lab.in_empty_store(tmp_path / "cut")
    labels = plant(fresh)
    groups = [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="shard c has no record; run it again"):
        select(fresh, chosen, labels=labels, groups=groups, only_write=groups[:1])
    written = {
        p: p.stat().st_mtime_ns for p in Path(fresh.store.url).glob("selections/*/*.parquet")
    }
    assert len(written) == 2
    resumed = select(fresh, chosen, labels=labels, groups=groups)
    assert resumed.sha256 == whole.sha256
    assert {p: p.stat().st_mtime_ns for p in written} == written


def test_a_selection_that_goes_on_in_other_groups_ends_in_the_same_bytes(lab, tmp_path):
    chosen = config(balance=TopKConfig(k=3), target="soft")
    whole = select(lab, chosen)
    fresh = lab.in_empty_store(tmp_path / "cut")
    labels = plant(fresh)
    groups = [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="shard c has no record"):
        select(fresh, chosen, labels=labels, groups=groups, only_write=groups[:1])
    resumed = select(fresh, chosen, labels=labels, groups=[["c", "a"], ["b"]])
    assert resumed.sha256 == whole.sha256


def test_a_shard_that_is_in_no_group_is_an_error(lab):
    with pytest.raises(ValueError, match="shard b is in no group"):
        select(lab, config(), groups=[["c"], ["a"]])


def test_shards_of_which_nothing_passes_or_that_are_empty_are_written_too(lab):
    rows = {
        "a": [("0", 0, 0.9), ("1", 1, 0.9), ("2", 2, 0.9)],
        "b": [("0", 0, 0.4), ("1", 1, 0.4)],
        "c": [],
    }
    for balance in (BalanceNoneConfig(), TopKConfig(k=1), NsBinnedConfig()):
        manifest = select(lab, config(balance=balance), rows)
        assert manifest.counts["items"] == {"a": 3, "b": 0, "c": 0}
        assert [s.num_samples for s in stored(lab, manifest, rows).values()] == [3, 2, 0]


def test_a_prediction_that_is_gone_is_an_error_that_names_the_shard(lab):
    labels = plant(lab)
    for path in Path(lab.store.url).glob(f"predictions/*/{'2' * 64}.json"):
        path.unlink()
    with pytest.raises(
        DamagedPredictions, match=f"no prediction of labeler ffffffffffff for shard {'2' * 12}"
    ):
        select(lab, config(), labels=labels)


SPECIFY: dict[str, Any] = {
    "labeling": "a" * 64,
    "validation": "b" * 64,
    "seed": 0,
    "round_index": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"labeling": "c" * 64},
        {"validation": "c" * 64},
        {"seed": 1},
        {"round_index": 2},
        {"config": config(calibration="temperature", target="soft")},
        {"config": config(calibration="temperature", balance=TopKConfig())},
        {
            "config": config(
                calibration="temperature", threshold=FixedThresholdConfig(confidence=0.6)
            )
        },
    ],
)
def test_what_changes_a_selection_changes_its_fingerprint(changes):
    base = {"config": config(calibration="temperature")} | SPECIFY

    def fingerprint(given):
        return selection.specify(given.pop("config"), **given).fingerprint

    assert fingerprint(base | changes) != fingerprint(dict(base))


def test_guards_and_an_unread_dev_split_are_not_in_the_fingerprint():
    plain = selection.specify(config(), **SPECIFY)
    guards = config(allow_collapse=False, max_class_share=0.9)
    assert selection.specify(guards, **SPECIFY).fingerprint == plain.fingerprint
    other_dev: dict[str, Any] = SPECIFY | {"validation": "c" * 64}
    assert selection.specify(config(), **other_dev).fingerprint == plain.fingerprint
