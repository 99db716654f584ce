"""Label and select as one flow, for pseudo-labels without a run."""

from typing import Any

from prefect import flow

from flows.evaluation import evaluate_model
from flows.labeling import label_corpus
from flows.selection import select_pseudo_labels
from tasks.devices import DeviceChoice
from tasks.labeling import LabelingConfig
from tasks.selection_config import SelectionConfig


@flow(name="pseudo-labels", persist_result=False)
def pseudo_labels(
    store: str,
    model: str,
    corpus: str,
    class_names: list[str],
    labeling: LabelingConfig | None = None,
    selection: SelectionConfig | None = None,
    dev: str | None = None,
    labeled: str | None = None,
    seed: int = 0,
    device: DeviceChoice = "auto",
    max_bad_samples: int = 0,
) -> dict[str, str]:
    """Label what is not labelled yet, and select from it.

    Args:
        store: URL of the store.
        model: fingerprint.
        corpus: digest of the corpus.
        class_names: label space.
        labeling: how to label.
        selection: the rules.
        dev: digest of the labelled split that calibrates; None exactly where nothing does.
        labeled: digest of the labelled corpus, for rules that read its class counts.
        seed: of the draws that round copies.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.

    Returns: fingerprints of labelling and selection.
    """
    labels: Any = label_corpus(
        store=store,
        model=model,
        corpus=corpus,
        config=labeling,
        class_names=class_names,
        device=device,
        max_bad_samples=max_bad_samples,
    )
    validation = "none"
    if dev is not None:
        validated: Any = evaluate_model(
            store=store,
            model=model,
            corpus=dev,
            kind="validate",
            class_names=class_names,
            device=device,
            max_bad_samples=max_bad_samples,
        )
        validation = validated["fingerprint"]
    selected: Any = select_pseudo_labels(
        store=store,
        labeling=labels["fingerprint"],
        validation=validation,
        class_names=class_names,
        config=selection,
        seed=seed,
        labeled=labeled,
    )
    return {"label": labels["fingerprint"], "select": selected["fingerprint"]}
