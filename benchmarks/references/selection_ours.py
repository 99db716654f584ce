"""The real selection stage on a made-up labelling: `python -m ... FOLDER ROWS SHARDS`.

Prints seconds, the peak of memory with that of all worker processes, and what of it was there
before (Python and imports of this process; the workers are started while the clock runs).
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.references.selection_data import CLASS_NAMES, Problem, labeling_of
from benchmarks.references.selection_process import PeakOfAll, cpu_seconds, set_aside
from storage.corpus import load_corpus
from tasks import selection, selection_writing
from tasks.selection_passes import plan_selection
from tasks.selection_processes import selection_groups, selection_workers
from tasks.specifications import finished_result

VALIDATION = "a" * 64


def select(folder: Path, problem: Problem) -> dict[str, Any]:
    """Run every pass and the writing on the workers of flows/selection.py, without Prefect."""
    store, fingerprint = labeling_of(folder)
    config = problem.config
    specification = selection.specify(
        config, labeling=fingerprint, validation=VALIDATION, seed=0, round_index=1
    )
    set_aside(Path(store.url) / "selections")
    memory = PeakOfAll()
    cpu, started = cpu_seconds(), time.monotonic()
    labels = finished_result(store, "label", fingerprint)
    corpus = load_corpus(store, labels.inputs["corpus"].fingerprint)
    stems = [shard.stem for shard in corpus.shards]
    groups = selection_groups(stems, num_rows=corpus.num_samples)
    scratch = TemporaryFile()  # noqa: SIM115 - closed with the workers
    workers = selection_workers(
        "auto",
        num_rows=corpus.num_samples,
        groups=groups,
        descriptors=[scratch.fileno()],
    )
    with memory, scratch, ThreadPoolExecutor(workers.num_workers) as pool, closing(workers):
        inputs = selection.begin(store, specification, labels, corpus)
        inputs = inputs.keeping_ranked(scratch.fileno(), config.balance)
        inputs, facts = selection.calibrate(
            store, specification, inputs.after("gate"), None, class_names=CLASS_NAMES
        )
        laps = [("calibrate", time.monotonic())]

        def mapped(one_pass: Any, inputs: Any, config: Any, *more: Any) -> Iterator[Any]:
            futures = deque(
                pool.submit(
                    workers.run_at_once, one_pass, store, inputs.of_shards(g), g, config, *more
                )
                for g in groups
            )
            while futures:
                yield futures.popleft().result()
            laps.append((one_pass.__name__, time.monotonic()))

        planned = plan_selection(inputs, config, mapped)
        writing = [
            pool.submit(
                workers.run,
                selection_writing.write_selections,
                store,
                specification,
                planned.inputs.of_shards(group),
                group,
                config,
                planned.plan,
            )
            for group in groups
        ]
        for future in writing:
            future.result()
    laps.append(("write", time.monotonic()))
    manifest = selection.finish(
        store,
        specification,
        labels,
        None,
        config,
        corpus=corpus,
        groups=groups,
        facts=facts | planned.facts,
        class_names=CLASS_NAMES,
        seconds=time.monotonic() - started,
    )
    laps.append(("finish", time.monotonic()))
    starts = [started, *(at for _, at in laps)]
    return {
        "seconds": laps[-1][1] - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_bytes": memory.peak_bytes,
        "bytes_before": memory.bytes_before,
        "worker_processes": memory.num_children,
        "laps": [(name, at - start) for (name, at), start in zip(laps, starts, strict=False)],
        "kept": manifest.counts["unique"],
        "fingerprint": manifest.fingerprint,
    }


if __name__ == "__main__":
    print(json.dumps(select(Path(sys.argv[1]), Problem(int(sys.argv[2]), int(sys.argv[3])))))
