"""The first step of a selection: close the gates, before anything is calibrated or counted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain import (
    FinishedGate,
    OutOfDomainConfig,
    OutOfDomainNoneConfig,
    Outputs,
    finish_gate,
    is_in_domain,
    reads_corpus,
    reads_dev,
)
from models.top_k_probs import cut_to_top_k
from storage.corpus import load_corpus
from storage.manifest import Manifest
from storage.prediction_columns import PredictionColumns, PredictionReference
from storage.predictions import prediction_record
from storage.store import Store
from tasks.evaluation import read_evaluation_predictions
from tasks.guarding import read_leaks
from tasks.selection_config import SelectionConfig
from tasks.selection_gates import Gates, outputs_of
from tasks.selection_passes import Mapped, sample_outputs
from tasks.selection_rows import SelectionInputs

_SAMPLED_ROWS = 20_000
"""Rows of the corpus that a gate is fitted on, about."""


def close_gates(
    store: Store,
    inputs: SelectionInputs,
    config: SelectionConfig,
    validation: Manifest | None,
    guard: Manifest | None,
    mapped: Mapped,
) -> tuple[SelectionInputs, dict[str, Any]]:
    """Take what was leaked, and learn what is out of domain; return it with facts.

    Args:
        store: of the selection.
        inputs: of no step yet.
        config: the rules.
        validation: of the teacher on dev, where a gate reads it.
        guard: the finished leak guard, where there is one.
        mapped: runs a pass over the shards.
    """
    inputs = replace(inputs, gates=Gates(_leaked_keys(store, guard)))

    def sample(share: float) -> Outputs:
        parts = [part for group in mapped(sample_outputs, inputs, config, share) for part in group]
        return Outputs.of_table(
            np.concatenate([table for _, table in sorted(parts, key=lambda part: part[0])])
        )

    num_samples = sum(reference.num_samples for reference in inputs.shards.values())
    gate, facts = _out_of_domain(
        store,
        config.out_of_domain,
        validation,
        sample,
        num_samples=num_samples,
        temperature=_labelers_temperature(store, inputs),
    )
    return inputs.after("gate", gates=Gates(inputs.gates.leaked, gate)), facts


def _leaked_keys(store: Store, guard: Manifest | None) -> dict[str, frozenset[str]]:
    """Return what a finished guard found, by stem; nothing where there is no guard."""
    if guard is None:
        return {}
    found = read_leaks(store, guard)
    return {stem: frozenset(leak.key for leak in leaks) for stem, leaks in found.items()}


def _out_of_domain(
    store: Store,
    config: OutOfDomainConfig,
    validation: Manifest | None,
    sample: Callable[[float], Outputs],
    *,
    num_samples: int,
    temperature: float | None,
) -> tuple[FinishedGate | None, dict[str, Any]]:
    """Learn the out-of-domain gate; return it with the facts for the summary.

    Args:
        store: of the selection.
        config: the rule.
        validation: of the teacher on dev, where the rule reads it.
        sample: returns the outputs of a share of the corpus.
        num_samples: of the corpus.
        temperature: that its predictions were calibrated by when they were stored; None in the full
            form, which is stored uncalibrated.
    """
    if isinstance(config, OutOfDomainNoneConfig):
        return None, {}
    dev = None
    if reads_dev(config):
        assert validation is not None, "an input of the selection"
        dev = _dev_outputs(store, validation, temperature)
    rows = sample(min(1.0, _SAMPLED_ROWS / num_samples)) if reads_corpus(config) else None
    gate = finish_gate(config, dev=dev, sample=rows)
    facts: dict[str, Any] = {"kind": config.kind, "threshold": gate.threshold}
    if dev is not None:
        facts["kept_of_dev"] = float(is_in_domain(gate, dev).mean())
    if rows is not None:
        facts["sampled"] = len(rows.confidence)
    return gate, {"out_of_domain": facts}


def _labelers_temperature(store: Store, inputs: SelectionInputs) -> float | None:
    """Return what calibrated the stored predictions; None where nothing did."""
    first = next(iter(inputs.shards.values()))
    return prediction_record(store, inputs.labeler, first.shard)["facts"].get("temperature")


def _dev_outputs(store: Store, manifest: Manifest, temperature: float | None) -> Outputs:
    """Return the outputs for dev, of a validation or a labelling of it, as the corpus's are.

    Dev is stored in the full form, uncalibrated. Where the corpus's predictions were calibrated
    before they were cut to the top_k form, dev's are calibrated here, by the same function.
    """
    if manifest.kind != "label":
        known = read_evaluation_predictions(store, manifest)
        if temperature is not None:
            return _calibrated(known.log_probs, known.logsumexp, temperature)
        return Outputs(known.confidence, known.margin, known.entropy, known.logsumexp)
    labeler, corpus = (manifest.inputs[name].fingerprint for name in ("labeler", "corpus"))

    def of_shard(digest: str) -> Outputs:
        record = prediction_record(store, labeler, digest)
        columns = PredictionColumns(store, PredictionReference.of(record), verify=True)
        if temperature is None:
            return outputs_of(columns)
        log_probs, _ = columns.probabilities()
        return _calibrated(log_probs, columns.read(["logsumexp"])["logsumexp"], temperature)

    shards = load_corpus(store, corpus).shards
    tables = [of_shard(shard.digest).table() for shard in shards]
    return Outputs.of_table(np.concatenate(tables))


def _calibrated(
    log_probs: NDArray[np.floating], logsumexp: NDArray[np.floating], temperature: float
) -> Outputs:
    """Return the outputs of (N, C) whole distributions as the top_k form stores them."""
    rows = cut_to_top_k(log_probs, temperature=temperature, k=1)
    return Outputs(rows.confidences, rows.margins, rows.entropies, logsumexp)
