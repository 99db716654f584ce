"""Out-of-domain gates: thresholds and scores by hand; planted strangers are turned down."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from models.out_of_domain import (
    EnergyConfig,
    EntropyConfig,
    MaxProbConfig,
    OutOfDomainConfig,
    OutOfDomainNoneConfig,
    Outputs,
    PuConfig,
    finish_gate,
    is_in_domain,
    reads_corpus,
    reads_dev,
)
from models.out_of_domain.pu import fit_pu, nnpu_risk

GATES = [
    MaxProbConfig(keep_dev_fraction=0.95),
    EnergyConfig(keep_dev_fraction=0.95),
    EntropyConfig(keep_dev_fraction=0.95),
    PuConfig(prior=0.7),
]


def outputs_of_logits(logits):
    """The four outputs of (N, C) logits."""
    log_sums = np.log(np.exp(logits).sum(axis=1))
    log_probs = logits - log_sums[:, None]
    probs = np.exp(log_probs)
    top = np.sort(probs, axis=1)
    return Outputs(top[:, -1], top[:, -1] - top[:, -2], -(probs * log_probs).sum(axis=1), log_sums)


def images(count, *, seed, strength):
    """Logits of ten classes: one is raised by about `strength`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (count, 10))
    logits[np.arange(count), rng.integers(10, size=count)] += rng.normal(strength, 1.5, count)
    return outputs_of_logits(logits)


def rows(outputs, chosen):
    return Outputs.of_table(outputs.table()[chosen])


def test_scores_and_given_thresholds_match_values_worked_by_hand():
    # z = (2, 1, 0): sum exp = 7.389056 + 2.718282 + 1 = 11.107338, log = 2.407606.
    # p = (.665241, .244728, .090031); entropy .832395. z = 0: p = 1/3, log 3 = 1.098612 twice.
    outputs = outputs_of_logits(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert outputs.confidence == pytest.approx([0.665241, 1 / 3], abs=1e-6)
    assert outputs.logsumexp == pytest.approx([2.407606, 1.098612], abs=1e-6)
    assert outputs.entropy == pytest.approx([0.832395, 1.098612], abs=1e-6)
    for config, kept in (
        (MaxProbConfig(min_confidence=0.6), [True, False]),
        (MaxProbConfig(min_confidence=0.7), [False, False]),
        (MaxProbConfig(min_confidence=0.0), [True, True]),
        (EnergyConfig(max_energy=-2.4), [True, False]),  # energies -2.41 and -1.10
        (EnergyConfig(max_energy=-1.0), [True, True]),
        (EntropyConfig(max_entropy=0.9), [True, False]),
        (EntropyConfig(max_entropy=0.8), [False, False]),
        (OutOfDomainNoneConfig(), [True, True]),
    ):
        assert not reads_dev(config)
        assert is_in_domain(finish_gate(config), outputs).tolist() == kept


def test_the_threshold_is_what_the_share_of_dev_reaches():
    # Twenty dev images of energies -1 .. -20: 19 of them are 0.95, so up to -2 is kept.
    log_sums = np.arange(1.0, 21.0)
    zeros = np.zeros(20)
    dev = Outputs(zeros, zeros, zeros, log_sums)
    gate = finish_gate(EnergyConfig(keep_dev_fraction=0.95), dev=dev)
    assert gate.threshold == 2.0
    assert is_in_domain(gate, dev).sum() == 19
    assert finish_gate(EnergyConfig(keep_dev_fraction=1), dev=dev).threshold == 1.0
    assert finish_gate(EnergyConfig(keep_dev_fraction=0.951), dev=dev).threshold == 1.0


def test_nnpu_risk_matches_values_worked_by_hand():
    def risk(positive, unlabeled, prior):
        return float(
            nnpu_risk(torch.tensor(positive), torch.tensor(unlabeled), prior=prior).double()
        )

    # All scores 0, loss log 2: .7 log 2 + (log 2 - .7 log 2) = log 2.
    assert risk([0.0, 0.0], [0.0], 0.7) == pytest.approx(math.log(2), abs=1e-6)
    # g_p = 2, g_u = -2, prior .5: softplus(-2) = .126928, softplus(2) = 2.126928.
    # .5 * .126928 + max(0, .126928 - .5 * 2.126928 = -.936536) = .063464.
    assert risk([2.0], [-2.0], 0.5) == pytest.approx(0.063464, abs=1e-6)
    # g_p = 2, g_u = (2, -2), prior .3: .038078 + (2.253856 / 2 - .638078) = .526928.
    assert risk([2.0], [2.0, -2.0], 0.3) == pytest.approx(0.038078 + 0.488850, abs=1e-5)


@pytest.mark.parametrize("config", GATES, ids=lambda c: c.kind)
def test_planted_strangers_are_turned_down_and_most_others_kept(config):
    # 30 % of the corpus excites no class.
    dev = images(300, seed=1, strength=7)
    familiar, strange = images(1400, seed=2, strength=7), images(600, seed=3, strength=0)
    corpus = Outputs.of_table(np.concatenate([familiar.table(), strange.table()]))
    gate = finish_gate(config, dev=dev, sample=corpus if reads_corpus(config) else None)
    assert is_in_domain(gate, familiar).mean() > 0.88
    assert is_in_domain(gate, strange).mean() < 0.4


@pytest.mark.parametrize("config", GATES, ids=lambda c: c.kind)
def test_each_row_is_judged_by_itself(config):
    dev, corpus = images(100, seed=1, strength=6), images(200, seed=2, strength=3)
    gate = finish_gate(config, dev=dev, sample=corpus if reads_corpus(config) else None)
    whole = is_in_domain(gate, corpus)
    order = np.random.default_rng(0).permutation(200)
    assert (is_in_domain(gate, rows(corpus, order)) == whole[order]).all()
    assert (is_in_domain(gate, rows(corpus, slice(0, 7))) == whole[:7]).all()


@pytest.mark.parametrize("config", GATES[:3], ids=lambda c: c.kind)
def test_keeping_more_of_dev_never_drops_what_was_kept(config):
    dev, corpus = images(100, seed=1, strength=6), images(200, seed=2, strength=3)
    kept = np.zeros(200, np.bool_)
    for fraction in (0.5, 0.8, 0.95, 1.0):
        gate = finish_gate(config.model_copy(update={"keep_dev_fraction": fraction}), dev=dev)
        now = is_in_domain(gate, corpus)
        assert (now | ~kept).all()
        kept = now


def test_a_classifier_that_forgets_the_prior_would_turn_down_the_familiar():
    # With the corpus taken for negative altogether, dev-like rows of it are negatives as well.
    dev = images(300, seed=1, strength=7)
    familiar, strange = images(1400, seed=2, strength=7), images(600, seed=3, strength=0)
    corpus = Outputs.of_table(np.concatenate([familiar.table(), strange.table()]))
    kept = {
        prior: (fit_pu(dev, corpus, prior=prior).scores(familiar) >= 0).mean()
        for prior in (0.05, 0.7)
    }
    assert kept[0.05] < 0.5 < 0.88 < kept[0.7]


def test_the_same_rows_give_the_same_classifier_bit_for_bit():
    dev, corpus = images(50, seed=1, strength=6), images(80, seed=2, strength=3)
    first, second = (fit_pu(dev, corpus, prior=0.6) for _ in range(2))
    assert first.weights.tolist() == second.weights.tolist()
    assert first.bias == second.bias


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "energy"},
        {"kind": "energy", "max_energy": -3, "keep_dev_fraction": 0.9},
        {"kind": "max_prob"},
        {"kind": "entropy", "max_entropy": 1, "keep_dev_fraction": 0.9},
    ],
)
def test_exactly_one_threshold_is_given(settings):
    with pytest.raises(ValidationError, match="exactly one of"):
        TypeAdapter(OutOfDomainConfig).validate_python(settings)


def test_a_prior_must_be_given():
    with pytest.raises(ValidationError, match="prior"):
        TypeAdapter(OutOfDomainConfig).validate_python({"kind": "pu"})
