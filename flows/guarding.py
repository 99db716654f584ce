"""Find copies of dev and test images in a corpus: one task per group of shards."""

import threading
import time
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from models.leak_guard_config import NearDuplicatesConfig
from storage.corpus import load_corpus
from storage.store import Store, open_store
from tasks import guarding
from tasks.guarding import GuardStopped, SplitImages
from tasks.live_progress import LiveProgress
from tasks.shard_groups import group_shards
from tasks.specifications import Specification
from tasks.stages import TASK_OPTIONS, Reference, reference, reused

# Threads do not see SIGTERM or Ctrl-C: the flow's main thread tells them, and they stop between
# shards. One flow of this kind runs in a process at a time.
_stopping = threading.Event()

# One thread, because decoding and the products of matrices have threads of their own. Any, because
# Prefect declares its own task runners as no subtype of what `flow` takes (3.8.8).
_ONE_THREAD: Any = ThreadPoolTaskRunner(max_workers=1)


@flow(name="guard", task_runner=_ONE_THREAD, persist_result=False)
def guard_corpus(
    store: str,
    corpus: str,
    dev: str,
    test: str | None = None,
    config: NearDuplicatesConfig | None = None,
    max_bad_samples: int = 0,
    label: str = "guard",
    artifact: str = "guard",
) -> Reference | State:
    """Search every shard of a corpus for copies of dev and test images.

    Args:
        store: URL of the store.
        corpus: digest of the unlabelled corpus.
        dev: digest of the dev split.
        test: digest of the test split; its images are looked at, its labels are not.
        config: what counts as a copy.
        max_bad_samples: undecodable images that a shard may hold.
        label: name of the stage in progress reports.
        artifact: key of the progress artifact.
    """
    started = time.monotonic()
    opened = open_store(store)
    specification = guarding.specify(
        config or NearDuplicatesConfig(), corpus=corpus, dev=dev, test=test
    )
    there = reused(opened, specification)
    if there is not None:
        return there
    total = load_corpus(opened, corpus).num_samples
    missing = guarding.shards_to_search(opened, specification)
    progress = LiveProgress(label, "images", key=artifact)
    done = total - sum(shard.num_samples for shard in missing)
    progress.update(done, total)
    images = guarding.read_split_images(opened, specification, max_bad_samples=max_bad_samples)
    _stopping.clear()
    futures = []
    for group in group_shards(missing, "auto", num_workers=1):
        futures.append(
            search_group.with_options(task_run_name=f"{group[0].stem} + {len(group) - 1}").submit(
                opened,
                specification,
                [shard.stem for shard in group],
                images,
                max_bad_samples=max_bad_samples,
                progress=progress,
                done_before=done,
                total=total,
            )
        )
        done += sum(shard.num_samples for shard in group)
    try:
        for future in futures:
            future.result()
    except BaseException:
        _stopping.set()
        raise
    return reference(guarding.finish(opened, specification, seconds=time.monotonic() - started))


@task(name="search-shards", **TASK_OPTIONS)
def search_group(
    store: Store,
    specification: Specification,
    stems: list[str],
    images: SplitImages,
    *,
    max_bad_samples: int,
    progress: LiveProgress,
    done_before: int,
    total: int,
) -> int:
    """Search the shards of one group and return the number of images."""
    done = 0
    if _stopping.is_set():
        raise GuardStopped("stopped before this group began")
    for num_samples in guarding.search_shards(
        store, specification, stems, images, max_bad_samples=max_bad_samples
    ):
        done += num_samples
        progress.update(done_before + done, total)
        if _stopping.is_set():
            raise GuardStopped(f"stopped after {done} images of this group")
    return done
