"""Select pseudo-labels from a labelling: passes over groups of shards."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.engine_config import LOCAL_ENGINE, EngineConfig, LocalEngine
from storage.corpus import load_corpus
from storage.store import open_store
from tasks import selection, selection_passes, selection_writing
from tasks.calibrating import finished_calibration
from tasks.gating import close_gates
from tasks.progress import Progress, report
from tasks.selection_config import SelectionConfig
from tasks.selection_passes import plan_selection
from tasks.selection_processes import selection_groups, selection_workers
from tasks.selection_rows import SelectionInputs
from tasks.specifications import finished_result
from tasks.stages import TASK_OPTIONS, Reference, reference, reused

_NAMES: dict[Callable[..., Any], str] = {
    selection_passes.sample_outputs: "sample-outputs",
    selection_passes.sum_probabilities: "sum-probabilities",
    selection_passes.count_thresholds: "count-for-thresholds",
    selection_passes.sum_moments: "sum-for-weights",
    selection_passes.count_confidences: "count-confidences",
    selection_passes.collect_candidates: "collect-candidates",
    selection_writing.write_selections: "write-selections",
}

_ArgumentsOf = Callable[[Sequence[str]], tuple[Any, ...]]


def _carry_out(work: Callable[[], Any]) -> Any:
    """Do the work of a group; Prefect does not look into a function for what it must wait for."""
    return work()


_TASKS = {name: task(name=name, **TASK_OPTIONS)(_carry_out) for name in _NAMES.values()}


@flow(name="select", persist_result=False)
def select_pseudo_labels(
    store: str,
    labeling: str,
    validation: str,
    class_names: list[str],
    config: SelectionConfig | None = None,
    seed: int = 0,
    round_index: int = 1,
    label: str = "select",
    labeled: str | None = None,
    leaks: str | None = None,
    engine: EngineConfig = LOCAL_ENGINE,
) -> Reference | State:
    """Gate, calibrate, debias, threshold, weight and balance the predictions of one labelling.

    Args:
        store: URL of the store.
        labeling: fingerprint of the labelling.
        validation: fingerprint of the same model's validation on dev, for the calibration and the
            out-of-domain gate; where labels come from several predictions, of dev's labelling by
            the same labeler.
        class_names: label space.
        config: the rules.
        seed: of the draws that round copies.
        round_index: part of the draws' stream; rules that change by round go by it.
        label: name of the stage in progress reports.
        labeled: digest of the labelled corpus, for rules that read its class counts.
        leaks: fingerprint of the leak guard, where the rules have one.
        engine: of the run; where it is local, its `processes` are those of a selection, too, and
            `auto` is one for each core.
    """
    started = time.monotonic()
    opened = open_store(store)
    config = config or SelectionConfig()
    specification = selection.specify(
        config,
        labeling=labeling,
        validation=validation,
        labeled=labeled,
        leaks=leaks,
        seed=seed,
        round_index=round_index,
    )
    there = reused(opened, specification)
    if there is not None:
        return there
    labels = finished_result(opened, "label", labeling)
    dev = guard = None
    if config.reads_validation:
        dev = finished_calibration(opened, validation)
    if config.guards:
        assert leaks is not None, "checked by specify"
        guard = finished_result(opened, "guard", leaks)
    corpus = load_corpus(opened, labels.inputs["corpus"].fingerprint)
    stems = [shard.stem for shard in corpus.shards]
    groups = selection_groups(stems, num_rows=corpus.num_samples)
    processes = engine.processes if isinstance(engine, LocalEngine) else "auto"
    scratch = TemporaryFile(prefix="selftrain-selection-")  # noqa: SIM115 - closed with the workers
    workers = selection_workers(
        processes,
        num_rows=corpus.num_samples,
        groups=groups,
        descriptors=[scratch.fileno()],
    )
    runner = ThreadPoolTaskRunner(max_workers=workers.num_workers)
    # Workers are closed first where this is interrupted: the runner waits for its threads.
    with scratch, runner, closing(workers):
        inputs = selection.begin(opened, specification, labels, corpus)  # while processes start
        inputs = inputs.keeping_ranked(scratch.fileno(), config.balance)

        def submitted(
            run: Callable[..., Any], function: Callable[..., Any], arguments: _ArgumentsOf
        ) -> deque[Any]:
            name = _NAMES[function]
            return deque(
                runner.submit(
                    _TASKS[name].with_options(task_run_name=f"{name} · {_group_name(group)}"),
                    {"work": partial(run, function, *arguments(group))},
                )
                for group in groups
            )

        def mapped(
            one_pass: Any, inputs: SelectionInputs, config: SelectionConfig, *more: Any
        ) -> Iterator[Any]:
            futures = submitted(
                workers.run_at_once,
                one_pass,
                lambda group: (opened, inputs.of_shards(group), group, config, *more),
            )
            while futures:  # what was merged is not kept: a histogram may be of megabytes
                yield futures.popleft().result()

        inputs, gated = close_gates(opened, inputs, config, dev, guard, mapped)
        inputs, calibrated = selection.calibrate(
            opened, specification, inputs, dev, class_names=class_names
        )
        planned = plan_selection(inputs, config, mapped)
        writing = submitted(
            workers.run,
            selection_writing.write_selections,
            lambda group: (
                *(opened, specification, planned.inputs.of_shards(group)),
                *(group, config, planned.plan),
            ),
        )
        for number, future in enumerate(writing, start=1):
            future.result()
            report(Progress(label, number, len(groups), "groups of shards"))
    manifest = selection.finish(
        opened,
        specification,
        labels,
        dev,
        config,
        corpus=corpus,
        groups=groups,
        guard=guard,
        facts=gated | calibrated | planned.facts,
        class_names=class_names,
        seconds=time.monotonic() - started,
    )
    return reference(manifest)


def _group_name(stems: list[str]) -> str:
    return f"{stems[0]} + {len(stems) - 1}"
