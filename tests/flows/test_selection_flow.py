"""The selection's flow: the passes as Prefect tasks give what they give in a plain loop."""

from typing import Literal

import numpy as np
import pytest

from flows.engine_config import LocalEngine
from flows.run_status import read_status
from flows.selection import select_pseudo_labels
from flows.self_training import self_training
from models.balancing import CrestConfig, TopKConfig
from models.debiasing import DistributionAlignmentConfig
from models.thresholds import PercentileThresholdConfig, PerClassQuantileConfig
from models.weighting import SoftMatchConfig
from storage.addresses import selection_folder
from storage.manifest import read_manifest
from storage.store import open_store
from tasks.selection import SelectionConfig, read_summary
from tasks.specifications import read_result


@pytest.mark.parametrize(
    "config",
    [
        SelectionConfig(
            calibration="none",
            debias=DistributionAlignmentConfig(),
            threshold=PerClassQuantileConfig(keep_fraction=0.7),
            balance=CrestConfig(),
            allow_collapse=True,
        ),
        SelectionConfig(
            calibration="none",
            threshold=PercentileThresholdConfig(),
            weighting=SoftMatchConfig(),
            balance=TopKConfig(),
            allow_collapse=True,
        ),
    ],
    ids=["crest", "curriculum"],
)
@pytest.mark.parametrize("processes", ["auto", 2])
def test_every_pass_runs_as_a_task_and_gives_the_bytes_of_a_plain_loop(
    lab, prefect_api, tmp_path, monkeypatch, config, processes: Literal["auto"] | int
):
    monkeypatch.setattr("tasks.selection_processes._SHARDS_OF_A_GROUP", 2)
    rng = np.random.default_rng(2)
    rows = {
        shard.stem: [(str(i), int(rng.integers(3)), float(rng.uniform(0.4, 1))) for i in range(20)]
        for shard in lab.unlabeled.shards
    }
    manifests = []
    for one in (lab, lab.in_store(tmp_path / "other")):
        labels = one.plant_labeling(one.store, one.unlabeled, rows)
        if one is lab:
            found = select_pseudo_labels(
                store=lab.store.url,
                labeling=labels.fingerprint,
                validation="none",
                labeled=lab.labeled.digest,
                class_names=list(lab.class_names),
                config=config,
                round_index=2,
                engine=LocalEngine(processes=processes),
            )
            assert isinstance(found, dict)
            folder = selection_folder(found["fingerprint"])
            manifests.append(read_manifest(lab.store, folder))
        else:
            manifests.append(
                one.select(labels, None, config, labeled=one.labeled.digest, round_index=2)
            )
    in_flow, in_loop = manifests
    assert in_flow is not None
    assert in_flow.fingerprint == in_loop.fingerprint
    assert in_flow.sha256 == in_loop.sha256
    assert 0 < in_flow.counts["unique"] < 100


def test_a_run_gives_its_labelled_corpus_to_rules_on_the_labels_shares(
    tmp_path, prefect_api, trained_here, tiny_config, monkeypatch
):
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    config = tiny_config(
        tmp_path / "store",
        "rounds=1",
        "baseline=false",
        "selection={debias: {kind: progressive_da}, threshold: {kind: percentile, step: 60},"
        " weighting: {kind: confidence}, balance: {kind: crest}, calibration: vector,"
        " allow_collapse: true}",
    )
    self_training(config)
    store = open_store(str(tmp_path / "store"))
    stages = {stage["kind"]: stage for stage in read_status(store, "tiny").rounds[1].stages}
    manifest = read_result(store, "select", stages["select"]["fingerprint"])
    assert manifest is not None
    assert set(manifest.inputs) == {"labeling", "validation", "labeled"}
    summary = read_summary(store, manifest)
    assert summary["labeled_counts"] == [8, 8, 8]
    # 60 % of 50 in round 1, and what ties with the last of them; labels are balanced, so that
    # CReST keeps all of it.
    assert 30 <= summary["unique"] < 50
    assert summary["reasons"]["over_quota"] == 0
    assert len(set(summary["class_thresholds"])) == 1
