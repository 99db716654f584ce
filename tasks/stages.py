"""The stages as Prefect tasks: ask the store first, compute only what is not there.

Tasks take and return references. A stage whose manifest exists ends at once as `Reused`.
"""

from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from storage.checkpoints import delete_checkpoints
from storage.manifest import Manifest
from storage.store import Store
from tasks import evaluation
from tasks.classifiers import load_classifier
from tasks.devices import DeviceChoice, resolve_device
from tasks.launching import ONE_LOCAL_PROCESS, LaunchConfig, launch_worker
from tasks.live_progress import LiveProgress
from tasks.materializing import materialize_if_useful
from tasks.policies import RETRIES, RETRY_DELAY_SECONDS, worth_retrying
from tasks.specifications import Specification
from tasks.training_orders import TrainingOrder, images_per_step, place_order

Reference = dict[str, Any]

# Of every task, those of the subflows included.
TASK_OPTIONS: dict[str, Any] = {
    "persist_result": False,
    "cache_policy": NO_CACHE,
    "retries": RETRIES,
    "retry_delay_seconds": RETRY_DELAY_SECONDS,
    "retry_condition_fn": worth_retrying,
}


def reference(manifest: Manifest) -> Reference:
    """Return what tasks hand to each other in the place of a result."""
    return {
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "manifest_sha256": manifest.sha256,
    }


def reused(store: Store, specification: Specification) -> State | None:
    """Return the state `Reused` if the stage is finished already, else None."""
    there = specification.result(store)
    if there is None:
        return None
    return Completed(
        name="Reused",
        message=f"found in the store: {specification.folder}",
        data=reference(there),
    )


@task(name="train", **TASK_OPTIONS)
def train(
    store: Store,
    order: TrainingOrder,
    *,
    device: DeviceChoice,
    label: str,
    artifact: str,
    launch: LaunchConfig = ONE_LOCAL_PROCESS,
    note: str = "",
) -> Reference | State:
    """Train in processes of its own, or wait for them; goes on from the newest checkpoint."""
    there = reused(store, order.specification)
    if there is not None:
        delete_checkpoints(store, order.specification.fingerprint)  # of a run killed at its commit
        return there
    materialize_if_useful(store, order)
    place_order(store, order)
    images = images_per_step(order.config).all
    progress = LiveProgress(label, "steps", key=artifact, images_per_unit=images, note=note)
    launch_worker(
        store,
        order.specification.fingerprint,
        device=device,
        on_progress=lambda line: progress.update(
            line["step"], line["total_steps"], loss=line["loss"], lr=line["learning_rate"]
        ),
        launch=launch,
        announce=get_run_logger().info,
    )
    manifest = order.specification.result(store)
    assert manifest is not None, "the worker ended well without a manifest"
    return reference(manifest)


@task(name="evaluate", **TASK_OPTIONS)
def evaluate(
    store: Store, specification: Specification, *, device: DeviceChoice, max_bad_samples: int
) -> Reference | State:
    """Evaluate a model on dev (validate) or test."""
    there = reused(store, specification)
    if there is not None:
        return there
    classifier = load_classifier(
        store,
        specification.inputs["model"],
        device=resolve_device(device),
        class_names=specification.settings["class_names"],
    )
    manifest = evaluation.evaluate(
        store, specification, classifier, max_bad_samples=max_bad_samples
    )
    return reference(manifest)


@task(name="promote", **TASK_OPTIONS)
def promote(
    store: Store, specification: Specification, *, teacher: Specification, student: Specification
) -> Reference | State:
    """Compare the validations of teacher and student."""
    there = reused(store, specification)
    if there is not None:
        return there
    validations = [one.result(store) for one in (teacher, student)]
    assert validations[0] is not None, "the teacher is validated before"
    assert validations[1] is not None, "the student is validated before"
    return reference(evaluation.promote(store, specification, validations[0], validations[1]))
