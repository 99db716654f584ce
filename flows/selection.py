"""Select pseudo-labels from a labelling: three passes over groups of shards."""

import time
from functools import reduce
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from models.balancing import (
    NoBalancePlan,
    finish_plan,
    merge_candidates,
    merge_histograms,
    needs_candidates,
    plan_balance,
)
from storage.addresses import evaluation_folder, labeling_folder
from storage.corpus import load_corpus
from storage.manifest import Manifest, read_manifest
from storage.store import Store, open_store
from tasks import selection
from tasks.progress import Progress, report
from tasks.selection import SelectionConfig
from tasks.stages import TASK_OPTIONS, Reference, reference, reused

_SHARDS_PER_TASK = 32
_MAX_TASKS_PER_PASS = 100

count_confidences = task(name="count-confidences", **TASK_OPTIONS)(selection.count_confidences)
collect_candidates = task(name="collect-candidates", **TASK_OPTIONS)(selection.collect_candidates)
write_selections = task(name="write-selections", **TASK_OPTIONS)(selection.write_selections)

# Any, because Prefect declares its own task runners as no subtype of what `flow` takes (3.8.8).
_TWO_THREADS: Any = ThreadPoolTaskRunner(max_workers=2)


@flow(name="select", task_runner=_TWO_THREADS, persist_result=False)
def select_pseudo_labels(
    store: str,
    labeling: str,
    validation: str,
    class_names: list[str],
    config: SelectionConfig | None = None,
    seed: int = 0,
    round_index: int = 1,
    label: str = "select",
) -> Reference | State:
    """Calibrate, threshold and balance the predictions of one labelling.

    Args:
        store: URL of the store.
        labeling: fingerprint of the labelling.
        validation: fingerprint of the same model's validation on dev, for the temperature.
        class_names: label space.
        config: the rules.
        seed: of the draws that round copies.
        round_index: part of the draws' stream.
        label: name of the stage in progress reports.
    """
    started = time.monotonic()
    opened = open_store(store)
    config = config or SelectionConfig()
    specification = selection.specify(
        config, labeling=labeling, validation=validation, seed=seed, round_index=round_index
    )
    there = reused(opened, specification)
    if there is not None:
        return there
    labels = _finished(opened, labeling_folder(labeling), labeling)
    dev = None
    if config.calibration == "temperature":
        dev = _finished(opened, evaluation_folder(validation), validation)
    inputs, facts = selection.calibrate(opened, specification, labels, dev)
    corpus = load_corpus(opened, inputs.corpus)
    stems = [shard.stem for shard in corpus.shards]
    size = max(_SHARDS_PER_TASK, -(-len(stems) // _MAX_TASKS_PER_PASS))
    groups = [stems[start : start + size] for start in range(0, len(stems), size)]

    counted = [count_confidences.submit(opened, inputs, group, config) for group in groups]
    histogram = reduce(merge_histograms, [future.result() for future in counted])
    plan = plan_balance(config.balance, histogram)
    candidates = None
    if needs_candidates(plan):
        collected = [
            collect_candidates.submit(opened, inputs, group, config, plan) for group in groups
        ]
        found = [one for future in collected for one in future.result()]
        candidates = reduce(merge_candidates, found)
    finished_plan = finish_plan(plan, candidates)
    writing = [
        write_selections.submit(opened, specification, inputs, group, config, finished_plan)
        for group in groups
    ]
    for number, future in enumerate(writing, start=1):
        future.result()
        report(Progress(label, number, len(groups), "groups of shards"))
    floor = config.threshold.confidence
    if not isinstance(finished_plan, NoBalancePlan):
        facts["class_thresholds"] = finished_plan.thresholds(floor).tolist()
        facts["quota"] = finished_plan.quota
    manifest = selection.finish(
        opened,
        specification,
        labels,
        dev,
        config,
        facts=facts,
        class_names=class_names,
        seconds=time.monotonic() - started,
    )
    return reference(manifest)


def _finished(store: Store, folder: str, fingerprint: str) -> Manifest:
    manifest = read_manifest(store, folder, expect_fingerprint=fingerprint)
    if manifest is None:
        raise ValueError(f"{store.url_of(folder)} is not finished: run that stage first")
    return manifest
