"""`tasks.label_worker`, with a clock: writes down how long it worked and its peak of memory.

Work is what is done to a shard: reading, decoding, forward pass, writing object and record. Reading
the corpus, loading the model and waiting are not.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks import label_jobs, labeling
from tasks.label_worker import main

_seconds = {"inside": 0.0, "corpus": 0.0}


def _timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            _seconds[name] += time.perf_counter() - started

    return call


def _timed_shards(label_shards: Callable[..., Iterator[int]]) -> Callable[..., Iterator[int]]:
    def label(*args: Any, **options: Any) -> Iterator[int]:
        shards = label_shards(*args, **options)
        following = _timed(lambda: next(shards, None), "inside")
        while (num_samples := following()) is not None:
            yield num_samples

    return label


if __name__ == "__main__":
    labeling.cached_corpus = _timed(labeling.cached_corpus, "corpus")
    labeling.load_locations = _timed(labeling.load_locations, "corpus")
    label_jobs.labeling.label_shards = _timed_shards(labeling.label_shards)
    code = main()
    facts = {
        "work_seconds": _seconds["inside"] - _seconds["corpus"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    Path(os.environ["TIMED_LABEL_WORKERS"], f"{os.getpid()}.json").write_text(json.dumps(facts))
    sys.exit(code)
