"""Evaluate one model on one labelled split as a flow of its own."""

from prefect import flow
from prefect.client.schemas.objects import State

from flows.graph import EvaluationKind
from storage.corpus import load_corpus
from storage.store import open_store
from tasks import evaluation, stages
from tasks.classifiers import read_description
from tasks.devices import DeviceChoice
from tasks.stages import Reference, reused
from tasks.teacher_views import Shown


@flow(name="evaluate", persist_result=False)
def evaluate_model(
    store: str,
    model: str,
    corpus: str,
    kind: EvaluationKind = "test",
    class_names: list[str] | None = None,
    device: DeviceChoice = "auto",
    max_bad_samples: int = 0,
) -> Reference | State:
    """Evaluate a finished model on a labelled split, and commit report and predictions.

    Args:
        store: URL of the store.
        model: fingerprint, the last part of the URL that `selftrain status` prints.
        corpus: digest of the split, from `selftrain data index --store`.
        kind: validate for a split that steers choices, test for one that is read by nothing.
        class_names: label space; default: the model's own. In the order of a run, the result is
            the one that the run's own stage makes or finds.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.

    Raises: ValueError if the corpus has no class names.
    """
    opened = open_store(store)
    if load_corpus(opened, corpus).class_names is None:
        raise ValueError(
            f"corpus {corpus[:12]} has no class names: write classes.json beside its shards and"
            " index them again"
        )
    description = read_description(opened, model)
    specification = evaluation.specify(
        kind,
        model=model,
        corpus=corpus,
        view=Shown.of(description).to_json(),
        class_names=tuple(class_names or description.class_names),
    )
    there = reused(opened, specification)
    if there is not None:
        return there
    stages.evaluate.with_options(task_run_name=f"{kind} {model[:12]}")(
        opened,
        specification,
        device=device,
        max_bad_samples=max_bad_samples,
        return_state=True,
    ).result()
    manifest = specification.result(opened)
    assert manifest is not None, "the evaluation ended well without a manifest"
    return stages.reference(manifest)
