"""Label and, if asked, select as one flow, for pseudo-labels without a run."""

from typing import Any

from prefect import flow, get_run_logger

from flows.engine_config import LOCAL_ENGINE, EngineConfig
from flows.evaluation import evaluate_model
from flows.guarding import guard_corpus
from flows.labeling import label_corpus
from flows.mending import reading_predictions
from flows.selection import select_pseudo_labels
from models.leak_guard_config import NearDuplicatesConfig
from tasks.devices import DeviceChoice
from tasks.labeling import LabelingConfig
from tasks.selection_config import SelectionConfig


@flow(name="pseudo-labels", persist_result=False)
def pseudo_labels(
    store: str,
    models: list[str],
    corpus: str,
    class_names: list[str],
    labeling: LabelingConfig | None = None,
    selection: SelectionConfig | None = None,
    label_dev: str | None = None,
    select_dev: str | None = None,
    labeled: str | None = None,
    seed: int = 0,
    device: DeviceChoice = "auto",
    max_bad_samples: int = 0,
    mend: bool = False,
    engine: EngineConfig = LOCAL_ENGINE,
) -> dict[str, str]:
    """Label what is not labelled yet, and select from it.

    Args:
        store: URL of the store.
        models: fingerprints; several are an ensemble.
        corpus: digest of the corpus.
        class_names: label space.
        labeling: how to label.
        selection: the rules; None: select nothing.
        label_dev: digest of the labelled split that calibrates the top_k form of predictions.
        select_dev: digest of the labelled split that the selection calibrates by, learns a gate
            from, or guards against copies of.
        labeled: digest of the labelled corpus, for rules that read its class counts.
        seed: of the draws that round copies.
        device: where to compute.
        max_bad_samples: undecodable images that a shard may hold.
        mend: look for lost and damaged predictions of what is labelled already. Where labelling
            or selecting meets some, it is done anyway.
        engine: where the corpus is labelled, as in a run.

    Returns: fingerprints by kind of stage: label and, where it was asked for, select.
    """
    labeling = labeling or LabelingConfig()
    first, *others = models

    def label(one: str, config: LabelingConfig, validation: str | None, *, mend: bool) -> str:
        reference: Any = label_corpus(
            store=store,
            model=first,
            more_models=others,
            corpus=one,
            config=config,
            class_names=class_names,
            device=device,
            max_bad_samples=max_bad_samples,
            validation=validation,
            mend=mend,
            engine=engine,
        )
        return reference["fingerprint"]

    def label_dev_split(dev: str, *, mend: bool) -> str:
        return label(dev, labeling.for_dev(), None, mend=mend)

    def label_all(*, mend: bool) -> str:
        validation = None if label_dev is None else calibrations[label_dev]
        return label(corpus, labeling, validation, mend=mend)

    def mend_dev() -> None:
        if not is_clean:
            for dev in calibrations:
                label_dev_split(dev, mend=True)

    def mend_all() -> None:
        mend_dev()
        label_all(mend=True)

    is_clean = labeling.is_clean(len(models))
    log = get_run_logger()
    calibrations: dict[str, str] = {}
    read_by_rules = None
    if selection is not None and selection.reads_validation:
        read_by_rules = select_dev
    for dev in (label_dev, read_by_rules):
        if dev is None or dev in calibrations:
            continue
        if is_clean:
            validated: Any = evaluate_model(
                store=store,
                model=first,
                corpus=dev,
                kind="validate",
                class_names=class_names,
                device=device,
                max_bad_samples=max_bad_samples,
            )
            calibrations[dev] = validated["fingerprint"]
        else:  # what predicts dev is what labels: several views, teachers or passes
            calibrations[dev] = label_dev_split(dev, mend=mend)
    labels = reading_predictions(lambda: label_all(mend=mend), mend_dev, log=log)
    found = {"label": labels}
    if selection is not None:
        leaks = None
        if isinstance(selection.leak_guard, NearDuplicatesConfig):
            assert select_dev is not None, "refused where the rules are checked"
            guarded: Any = guard_corpus(
                store=store,
                corpus=corpus,
                dev=select_dev,
                config=selection.leak_guard,
                max_bad_samples=max_bad_samples,
            )
            leaks = guarded["fingerprint"]
        rules = selection
        selected: Any = reading_predictions(
            lambda: select_pseudo_labels(
                store=store,
                labeling=labels,
                validation="none" if read_by_rules is None else calibrations[read_by_rules],
                class_names=class_names,
                config=rules,
                seed=seed,
                labeled=labeled,
                leaks=leaks,
            ),
            mend_all,
            log=log,
        )
        found["select"] = selected["fingerprint"]
    return found
