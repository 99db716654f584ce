"""Gates of a selection: what they turn down counts nowhere, and it is said why."""

import numpy as np
import pytest
from pydantic import ValidationError

from models.balancing import BalanceNoneConfig, TopKConfig
from models.debiasing import DistributionAlignmentConfig
from models.leak_guard_config import NearDuplicatesConfig
from models.out_of_domain import EnergyConfig, MaxProbConfig, PuConfig
from models.thresholds import FixedThresholdConfig, PercentileThresholdConfig
from storage.addresses import canonical_json
from storage.corpus import Corpus, Shard, save_corpus
from storage.manifest import InputReference, Manifest, commit_manifest, put_object, read_stored
from storage.predictions import write_predictions
from storage.selections import Reason, from_parquet
from tasks import guarding, labeling, selection
from tasks.explaining import explain_round
from tasks.selection import SelectionConfig, read_summary

ROWS = {
    "a": [("0", 0, 0.9375), ("1", 0, 0.5), ("2", 1, 0.75), ("3", 2, 0.4375)],
    "b": [("0", 0, 0.875), ("1", 0, 0.8125), ("2", 2, 0.75), ("3", 1, 0.625)],
    "c": [("0", 0, 0.875), ("1", 1, 0.5625), ("2", 0, 0.53125)],
}
LEAKS = {"a": ["0"], "b": ["1", "2"]}


def config(**changes):
    settings = {
        "calibration": "none",
        "threshold": FixedThresholdConfig(confidence=0.5),
        "balance": BalanceNoneConfig(),
        "target": "hard",
        "allow_collapse": True,
        "leak_guard": NearDuplicatesConfig(),
    }
    return SelectionConfig(**settings | changes)


def plant_guard(lab, leaks, corpus):
    """A finished guard that found what it is told."""
    specification = guarding.specify(
        NearDuplicatesConfig(), corpus=corpus.digest, dev="d" * 64, test=None
    )
    found = {
        stem: [{"key": key, "split": "dev", "of": "dev-0/x", "similarity": 1.0} for key in keys]
        for stem, keys in leaks.items()
    }
    body = canonical_json({"schema": 1, "leaks": found})
    manifest = Manifest(
        kind="guard",
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs={role: InputReference(fp, fp) for role, fp in specification.inputs.items()},
        objects=(put_object(lab.store, specification.folder, "leaks", body, "json"),),
        counts={"leaked": sum(len(keys) for keys in leaks.values())},
    )
    return commit_manifest(lab.store, specification.folder, manifest)


def select(lab, chosen, rows=ROWS, *, leaks=None, **more):
    corpus = lab.planted_corpus(rows)
    labels = lab.plant_labeling(lab.store, corpus, rows)
    guard = None if leaks is None else plant_guard(lab, leaks, corpus)
    return lab.select(labels, None, chosen, guard=guard, **more)


def kept(lab, manifest, rows=ROWS):
    """Copies and reasons of all samples, by key."""
    copies, reasons = {}, {}
    for stem, chosen in lab.stored_selections(manifest, rows).items():
        for key, n, reason in zip(chosen.keys, chosen.copies, chosen.reason, strict=True):
            copies[f"{stem}/{key}"] = int(n)
            reasons[f"{stem}/{key}"] = Reason(reason).name
    return copies, reasons


def without(leaks):
    return {
        stem: [row for row in rows if row[0] not in leaks.get(stem, ())]
        for stem, rows in ROWS.items()
    }


def test_leaked_samples_are_never_kept_and_their_reason_is_stored(lab):
    manifest = select(lab, config(), leaks=LEAKS)
    copies, reasons = kept(lab, manifest)
    assert [key for key, reason in reasons.items() if reason == "LEAKED"] == ["a/0", "b/1", "b/2"]
    assert copies["a/0"] == copies["b/1"] == copies["b/2"] == 0
    # a/3 is below the threshold; the seven others stay.
    assert sum(copies.values()) == 7
    summary = read_summary(lab.store, manifest)
    assert summary["reasons"]["leaked"] == 3
    assert summary["samples"] == 11
    assert set(manifest.inputs) == {"labeling", "leaks"}


def test_a_leaked_sample_is_explained_by_what_it_is_a_copy_of(lab):
    corpus = lab.planted_corpus(ROWS)
    labels = lab.plant_labeling(lab.store, corpus, ROWS)
    manifest = lab.select(labels, None, config(), guard=plant_guard(lab, LEAKS, corpus))
    verdicts = {}
    for key in ("0", "1"):
        found = explain_round(
            lab.store,
            corpus.shard("a"),
            key,
            labeling=labels,
            selection=manifest,
            class_names=lab.class_names,
        )
        assert found is not None
        verdicts[key] = found.judgement.reason_in_words
    assert verdicts == {"0": "leaked: a copy of dev-0/x of dev, similarity 1.000", "1": "kept"}


@pytest.mark.parametrize(
    "rules",
    [
        {"balance": TopKConfig(k=2)},
        {"debias": DistributionAlignmentConfig(target="uniform")},
        {"threshold": PercentileThresholdConfig(step=50)},
    ],
    ids=["quota", "alignment", "threshold"],
)
def test_what_leaked_counts_no_more_than_if_it_were_not_there(lab, tmp_path, rules):
    guarded, _ = kept(lab, select(lab, config(**rules), leaks=LEAKS))
    fresh = lab.in_empty_store(tmp_path / "fresh")
    rows = without(LEAKS)
    plain = config(**rules).model_copy(update={"leak_guard": SelectionConfig().leak_guard})
    alone, _ = kept(fresh, select(fresh, plain, rows), rows)
    assert {key: n for key, n in guarded.items() if key in alone} == alone
    # Were they counted, the rule would come out differently.
    counted = lab.in_empty_store(tmp_path / "counted")
    unguarded, _ = kept(counted, select(counted, plain))
    assert {key: n for key, n in unguarded.items() if key in alone} != alone


def test_groups_of_shards_change_nothing(lab, tmp_path):
    found = []
    for number, groups in enumerate(([["a", "b", "c"]], [["c"], ["a"], ["b"]])):
        fresh = lab.in_empty_store(tmp_path / str(number))
        chosen = config(balance=TopKConfig(k=2))
        found.append(select(fresh, chosen, leaks=LEAKS, groups=groups).objects)
    assert found[0] == found[1]


def test_a_selection_with_a_guard_needs_what_it_found():
    specify = {"labeling": "a" * 64, "validation": "b" * 64, "seed": 0, "round_index": 1}
    with pytest.raises(ValueError, match="no guard is given"):
        selection.specify(config(), **specify)
    first, second = (selection.specify(config(), **specify, leaks=fp * 64) for fp in "cd")
    assert first.fingerprint != second.fingerprint
    plain = SelectionConfig(calibration="none")
    assert selection.specify(plain, **specify, leaks="c" * 64).inputs == {"labeling": "a" * 64}


def test_dev_is_an_input_where_a_gate_learns_from_it():
    specify = {"labeling": "a" * 64, "validation": "b" * 64, "seed": 0, "round_index": 1}
    for gate, is_read in (
        (EnergyConfig(keep_dev_fraction=0.9), True),
        (PuConfig(prior=0.5), True),
        (EnergyConfig(max_energy=-1.0), False),
    ):
        chosen = SelectionConfig(calibration="none", out_of_domain=gate)
        assert ("validation" in selection.specify(chosen, **specify).inputs) == is_read


# ------------------------------------------------------------------------------ out of domain


def logits(count, *, seed, strength):
    """Logits of three classes, one of which is raised by about `strength`."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.5, (count, 3))
    values[np.arange(count), np.arange(count) % 3] += rng.normal(strength, 1, count)
    return values


def predictions_of_logits(lab, values):
    log_sums = np.log(np.exp(values).sum(axis=1))
    log_probs = values - log_sums[:, None]
    probs = np.exp(log_probs)
    rows = [(f"{i:04d}", i % 3, 0.5, i % 3) for i in range(len(values))]
    made = lab.predictions_of(rows)
    top = np.sort(probs, axis=1)
    fields = {
        "label": log_probs.argmax(axis=1).astype(np.uint32),
        "confidence": top[:, -1].astype(np.float32),
        "margin": (top[:, -1] - top[:, -2]).astype(np.float32),
        "entropy": -(probs * log_probs).sum(axis=1).astype(np.float32),
        "log_probs": log_probs.astype(np.float16),
        "logsumexp": log_sums.astype(np.float32),
    }
    return type(made)(**{name: getattr(made, name) for name in made.__slots__} | fields)


@pytest.mark.parametrize(
    "gate",
    [
        MaxProbConfig(keep_dev_fraction=0.95),
        EnergyConfig(keep_dev_fraction=0.95),
        PuConfig(prior=0.7),
    ],
    ids=lambda gate: gate.kind,
)
def test_a_gate_lowers_the_kept_share_of_planted_strangers(lab, gate):
    # 30 % of every shard excites no class: at threshold 0 all of it would be kept.
    corpus = Corpus.of(
        [Shard(stem, digit * 64, 300, 1024) for stem, digit in (("a", "1"), ("b", "2"))],
        lab.class_names,
    )
    save_corpus(lab.store, corpus, {"a": "/nowhere/a", "b": "/nowhere/b"})
    is_strange = np.arange(300) % 10 < 3
    for number, shard in enumerate(corpus.shards):
        values = logits(300, seed=number, strength=6)
        values[is_strange] = logits(int(is_strange.sum()), seed=10 + number, strength=0)
        predictions = predictions_of_logits(lab, values)
        write_predictions(lab.store, "f" * 64, shard.digest, predictions, {"bad_samples": {}})
    specification = labeling.specify(labeler="f" * 64, corpus=corpus.digest)
    labels = labeling.finish(lab.store, specification, seconds=0.0)
    dev = predictions_of_logits(lab, logits(200, seed=20, strength=6))
    validation = lab.plant_validation(lab.store, dev)
    chosen = config(
        leak_guard=SelectionConfig().leak_guard,
        threshold=FixedThresholdConfig(confidence=0),
        out_of_domain=gate,
    )
    manifest = lab.select(labels, validation, chosen)
    again = lab.select(labels, validation, chosen, groups=[["b"], ["a"]])
    assert again == manifest
    for shard in corpus.shards:
        found = from_parquet(read_stored(lab.store, manifest.object(shard.digest)), num_samples=300)
        assert found.kept[~is_strange].mean() > 0.85
        assert found.kept[is_strange].mean() < 0.3
        assert set(found.reason[~found.kept]) == {Reason.OUT_OF_DOMAIN}
    summary = read_summary(lab.store, manifest)
    assert summary["out_of_domain"]["kind"] == gate.kind
    assert summary["out_of_domain"]["kept_of_dev"] > 0.85
    assert summary["reasons"]["out_of_domain"] == 600 - summary["kept"]


def test_both_gates_are_named_and_a_leak_comes_first(lab):
    rows = {"a": [("0", 0, 0.9), ("1", 0, 0.6), ("2", 1, 0.6), ("3", 2, 0.95)]}
    chosen = config(out_of_domain=MaxProbConfig(min_confidence=0.8))
    _, reasons = kept(lab, select(lab, chosen, rows, leaks={"a": ["0", "1"]}), rows)
    assert list(reasons.values()) == ["LEAKED", "LEAKED", "OUT_OF_DOMAIN", "KEPT"]


def test_unknown_gates_are_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match="'none', 'max_prob', 'energy', 'entropy', 'pu'"):
        SelectionConfig.model_validate({"out_of_domain": {"kind": "mahalanobis"}})
