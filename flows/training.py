"""Train one model as a flow of its own, on the pool whose machines have the accelerators."""

from prefect import flow
from prefect.client.schemas.objects import State

from storage.store import open_store
from tasks import stages
from tasks.devices import DeviceChoice
from tasks.specifications import read_result
from tasks.stages import Reference, reused
from tasks.training_orders import read_order


@flow(name="train", persist_result=False)
def train_model(store: str, fingerprint: str, device: DeviceChoice = "auto") -> Reference | State:
    """Train what a run has ordered in the store and not finished.

    It goes on from the newest checkpoint, whichever machine wrote it; the run that ordered it finds
    the model when it is resumed. A model that is finished ends as `Reused`.

    Args:
        store: URL of the store.
        fingerprint: of the training, as `selftrain status RUN --json` lists it; the run orders it
            in the store when it gets there.
        device: where to train.

    Raises: ValueError if the store holds no such order.
    """
    opened = open_store(store)
    order = read_order(opened, fingerprint)
    there = reused(opened, order.specification)
    if there is not None:
        return there
    role = order.specification.settings["role"]
    stages.train.with_options(task_run_name=f"{role} {fingerprint[:12]}")(
        opened,
        order,
        device=device,
        label=f"train {fingerprint[:12]}",
        artifact=f"progress-{fingerprint[:12]}",
        return_state=True,
    ).result()
    manifest = read_result(opened, "train", fingerprint)
    assert manifest is not None, "the training ended well without a manifest"
    return stages.reference(manifest)
