"""The first step of a selection: close the gates, before anything is calibrated or counted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain import (
    EnergyConfig,
    FinishedGate,
    OutOfDomainConfig,
    OutOfDomainNoneConfig,
    Outputs,
    finish_gate,
    is_in_domain,
    reads_corpus,
    reads_dev,
)
from models.randomness import Block, uniforms
from storage.corpus import load_corpus
from storage.manifest import Manifest
from storage.prediction_columns import PredictionColumns, PredictionReference
from storage.predictions import prediction_record
from storage.store import Store
from tasks.evaluation import read_evaluation_predictions
from tasks.selection_config import SelectionConfig
from tasks.selection_gates import Gates, leaked_keys, outputs_of
from tasks.selection_passes import Mapped
from tasks.selection_rows import Rows, SelectionInputs

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
    for reference in inputs.shards.values():
        _check_form(config.out_of_domain, reference.form)
    inputs = replace(inputs, gates=Gates(leaked_keys(store, guard)))

    def sample(share: float) -> Outputs:
        parts = [part for group in mapped(sample_outputs, inputs, config, share) for part in group]
        return Outputs.of_table(
            np.concatenate([table for _, table in sorted(parts, key=lambda part: part[0])])
        )

    num_samples = sum(reference.num_samples for reference in inputs.shards.values())
    gate, facts = _out_of_domain(
        store, config.out_of_domain, validation, sample, num_samples=num_samples
    )
    return inputs.after("gate", gates=Gates(inputs.gates.leaked, gate)), facts


def sample_outputs(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    share: float,
) -> list[tuple[str, NDArray[np.float64]]]:
    """Map: the outputs of a share of each shard's rows, as tables (M, 4) by stem."""
    inputs.assert_next("gate")
    found: list[tuple[str, NDArray[np.float64]]] = []
    for stem in stems:
        rows = Rows.read(store, inputs, stem, with_keys=True)
        numbers = np.arange(rows.num_samples)[rows.admitted]
        drawn = uniforms(inputs.stream, rows.key_hashes(numbers), block=Block.OUT_OF_DOMAIN)
        found.append((stem, outputs_of(rows.columns).table()[numbers[drawn < share]]))
    return found


def _out_of_domain(
    store: Store,
    config: OutOfDomainConfig,
    validation: Manifest | None,
    sample: Callable[[float], Outputs],
    *,
    num_samples: int,
) -> tuple[FinishedGate | None, dict[str, Any]]:
    """Learn the out-of-domain gate; return it with the facts for the summary.

    Args:
        store: of the selection.
        config: the rule.
        validation: of the teacher on dev, where the rule reads it.
        sample: returns the outputs of a share of the corpus.
        num_samples: of the corpus.
    """
    if isinstance(config, OutOfDomainNoneConfig):
        return None, {}
    dev = None
    if reads_dev(config):
        assert validation is not None, "an input of the selection"
        dev = _dev_outputs(store, validation)
    rows = sample(min(1.0, _SAMPLED_ROWS / num_samples)) if reads_corpus(config) else None
    gate = finish_gate(config, dev=dev, sample=rows)
    facts: dict[str, Any] = {"kind": config.kind, "threshold": gate.threshold}
    if dev is not None:
        facts["kept_of_dev"] = float(is_in_domain(gate, dev).mean())
    if rows is not None:
        facts["sampled"] = len(rows.confidence)
    return gate, {"out_of_domain": facts}


def _dev_outputs(store: Store, manifest: Manifest) -> Outputs:
    """Return the outputs for dev, of a validation or a labelling of it."""
    if manifest.kind != "label":
        known = read_evaluation_predictions(store, manifest)
        return Outputs(known.confidence, known.margin, known.entropy, known.logsumexp)
    labeler, corpus = (manifest.inputs[name].fingerprint for name in ("labeler", "corpus"))
    shards = load_corpus(store, corpus).shards
    references = (
        PredictionReference.of(prediction_record(store, labeler, shard.digest)) for shard in shards
    )
    columns = [PredictionColumns(store, reference, verify=True) for reference in references]
    return Outputs.of_table(np.concatenate([outputs_of(one).table() for one in columns]))


def _check_form(config: OutOfDomainConfig, form: str) -> None:
    """Refuse a gate that would compare calibrated confidences with uncalibrated ones of dev.

    Raises: ValueError.
    """
    if form == "full" or isinstance(config, (OutOfDomainNoneConfig, EnergyConfig)):
        return
    raise ValueError(
        f"selection.out_of_domain.kind={config.kind} with labeling.form={form}: confidence, margin"
        " and entropy are calibrated in that form, those of the dev split are not. Use"
        " kind: energy, or form: full"
    )
