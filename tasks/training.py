"""Train a teacher, a student or the baseline: read, one trainer, checkpoints, commit."""

import math
import time
from collections import ChainMap
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from models.architectures import architecture_name
from models.description import ModelDescription, main_head, weights_to_bytes
from models.randomness import derive_seed
from models.training import (
    NonFiniteTraining,
    StepReport,
    TrainingConfig,
    TrainingState,
    finish,
    initial_state,
    train,
)
from storage.addresses import labeling_folder, selection_folder
from storage.checkpoints import delete_checkpoints
from storage.corpus import Corpus, load_corpus
from storage.manifest import (
    Manifest,
    commit_manifest,
    put_object,
    read_manifest,
    read_stored,
)
from storage.parquet_files import column_names, read_table, write_table
from storage.store import Store
from tasks import provenance
from tasks.batches import TrainingBatches
from tasks.checkpointing import CheckpointKeeper
from tasks.classifiers import put_model
from tasks.materializing import find_compact
from tasks.process_group import ALONE, ProcessGroup
from tasks.specifications import Specification
from tasks.training_inputs import frozen_teacher, prior_of_classes, references, start_from
from tasks.training_orders import TrainingOrder, images_per_step

# The learning curve has about this many points, whatever the length of the training.
_CURVE_POINTS = 200
_CURVE_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("labeled_loss", pa.float64()),
        ("labeled_accuracy", pa.float64()),
        ("pseudo_loss", pa.float64()),
        ("pseudo_accuracy", pa.float64()),
    ]
)


class TrainingStopped(Exception):
    """Training was asked to stop, wrote a checkpoint, and can go on from it."""


class TrainingDiverged(RuntimeError):
    """Loss or weights became infinite or NaN; nothing of it was saved."""


def run_training(
    store: Store,
    order: TrainingOrder,
    *,
    device: torch.device,
    on_report: Callable[[StepReport, int], None],
    should_stop: Callable[[], bool],
    group: ProcessGroup = ALONE,
) -> Manifest:
    """Train from the newest checkpoint of any attempt, or from scratch, and commit the model.

    Several processes train together by calling this alike. Rank 0 alone chooses the checkpoint and
    writes to the store; the others get its state, read their own parts of every batch, and return
    its manifest.

    Args:
        store: where inputs, checkpoints and the model lie.
        order: what to train.
        device: where.
        on_report: called with each report and the total number of steps.
        should_stop: asked at each report; True on any rank writes a checkpoint and raises
            TrainingStopped on all of them.
        group: this process among those that train this model.
    Raises: TrainingStopped; TrainingDiverged; VersionsChanged; TooManyBadSamples.
    """
    started = time.monotonic()
    specification, config = order.specification, order.config
    settings = specification.settings
    stream = derive_seed(settings["seed"], settings["round_index"], settings["role"])
    class_names = tuple(settings["class_names"])
    labeled = load_corpus(store, specification.inputs["labeled"])
    total_steps = config.duration.to_steps(config.batch_size, labeled.num_samples)
    selection, labeling = _selection_manifests(store, specification)
    state = initial_state(
        config,
        len(class_names),
        seed=derive_seed(stream, "weights"),
        device=device,
        prepare=partial(start_from, store, specification),
    )
    keeper = CheckpointKeeper(store, specification.fingerprint, config)
    curve = keeper.resume(state) if group.is_first else []
    group.share_state(state)
    first_step = state.step
    # Often enough to stop and to save in time, rarely enough not to hold up an accelerator.
    report_every = max(1, min(10, total_steps // 50))
    curve_every = report_every * math.ceil(total_steps / (report_every * _CURVE_POINTS))
    batches = TrainingBatches(
        store,
        config,
        labeled=labeled.digest,
        class_names=class_names,
        selection=selection,
        labeling=labeling,
        unlabeled=specification.inputs.get("unlabeled"),
        stage_stream=stream,
        device=device,
        max_bad_samples=order.max_bad_samples,
        loader_threads=order.loading.loader_threads,
        cache=order.loading.cache,
        compact=None if selection is None else find_compact(store, selection.fingerprint),
    )
    try:
        for report in train(
            state,
            config,
            batches.batch,
            total_steps=total_steps,
            num_labeled=labeled.num_samples,
            layer_seed=derive_seed(stream, "layer-noise"),
            report_every=report_every,
            forward_model=group.wrap(
                state, accumulation_steps=config.accumulation_steps, device=device
            ),
            teacher=frozen_teacher(store, specification, config, device=device),
            class_prior=prior_of_classes(store, config, labeling),
            ranks=group.ranks,
        ):
            if report.step % curve_every == 0 or report.step == total_steps:
                rate = report.learning_rate
                point = {"step": report.step, "loss": report.loss, "learning_rate": rate}
                curve.append(point | report.logs)
            on_report(report, total_steps)
            if report.step == total_steps:
                # What is left to do can be killed, too, and must not cost the training.
                if group.is_first:
                    keeper.save(state, curve)
                continue
            if group.any(should_stop()):
                if group.is_first:
                    keeper.save(state, curve)
                # Together: what started the ranks ends all of them once one has ended.
                group.wait()
                raise TrainingStopped(
                    f"stopped at step {report.step} of {total_steps}, checkpoint written"
                )
            if group.is_first:
                keeper.save_if_due(state, curve)
        finish(state, config, batches.batch, total_steps=total_steps, ranks=group.ranks)
    except NonFiniteTraining as error:
        raise TrainingDiverged(f"{error}. {keeper.last_good()}") from error
    finally:
        batches.close()
        keeper.close()
    # Each rank has read other images.
    bad_samples = dict(ChainMap(*group.gather(batches.bad_samples())))
    committed: Manifest | None = None
    if group.is_first:
        manifest = _put_model(
            store, specification, config, state, curve, labeled, selection, total_steps
        )
        # Before the manifest: a kill between the two loses neither.
        provenance.record(
            store,
            specification.folder,
            seconds=time.monotonic() - started,
            device=device,
            processes=group.ranks.world_size,
            resumed_at_step=first_step,
            steps=total_steps - first_step,
            bad_samples=dict(sorted(bad_samples.items())),
            fallbacks=state.fallbacks,
        )
        committed = commit_manifest(store, specification.folder, manifest)
        delete_checkpoints(store, specification.fingerprint)
    committed = group.share(committed)
    assert committed is not None, "rank 0 has committed it"
    return committed


def read_curve(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the learning curve of a finished training, one row a report."""
    stored = manifest.object("metrics")
    data, where = read_stored(store, stored), store.url_of(stored.path)
    table = read_table(
        data,
        schema=_curve_schema(column_names(data, where=where)),
        num_rows=manifest.counts["curve_points"],
        where=where,
    )
    return table.to_pylist()


def _curve_schema(names: Iterable[str]) -> pa.Schema:
    """Return the columns that every curve has, and behind them what else the objective logs."""
    further = sorted(set(names) - set(_CURVE_SCHEMA.names))
    return pa.schema([*_CURVE_SCHEMA, *((name, pa.float64()) for name in further)])


def _selection_manifests(
    store: Store, specification: Specification
) -> tuple[Manifest | None, Manifest | None]:
    fingerprint = specification.inputs.get("selection")
    if fingerprint is None:
        return None, None
    selection = read_manifest(store, selection_folder(fingerprint), expect_fingerprint=fingerprint)
    if selection is None:
        raise ValueError(f"selection {fingerprint[:12]} is not finished: run the selection first")
    labeling_fingerprint = selection.inputs["labeling"].fingerprint
    labeling = read_manifest(
        store, labeling_folder(labeling_fingerprint), expect_fingerprint=labeling_fingerprint
    )
    if labeling is None:
        raise ValueError(f"labelling {labeling_fingerprint[:12]} of the selection is gone")
    return selection, labeling


def _put_model(
    store: Store,
    specification: Specification,
    config: TrainingConfig,
    state: TrainingState,
    curve: list[dict[str, Any]],
    labeled: Corpus,
    selection: Manifest | None,
    total_steps: int,
) -> Manifest:
    settings, seen = specification.settings, images_per_step(config)
    description = ModelDescription(
        architecture=config.architecture,
        heads=main_head(tuple(settings["class_names"])),
        image_size=config.image_size,
        crop_padding=config.crop_padding,
        interpolation=config.interpolation,
        normalization=config.normalization,
        lineage={
            "fingerprint": specification.fingerprint,
            "role": settings["role"],
            "round_index": settings["round_index"],
            "inputs": dict(specification.inputs),
            "weights": config.used_weights,
        },
    )
    folder = specification.folder
    weights = weights_to_bytes(state.final_model)
    model_objects = put_model(
        store, specification.fingerprint, weights, description, kind=specification.kind
    )
    names = {name for point in curve for name in point}
    table = pa.Table.from_pylist(curve, schema=_curve_schema(names))
    metrics = put_object(store, folder, "metrics", write_table(table), "parquet")
    return Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=settings,
        inputs=references(store, specification, selection),
        objects=(*model_objects, metrics),
        counts={
            "steps": total_steps,
            "curve_points": len(curve),
            "labeled_samples": labeled.num_samples,
            "labeled_images_seen": total_steps * seen.labeled,
            "pseudo_images_seen": total_steps * seen.unlabeled,
            "parameters": sum(p.numel() for p in state.final_model.parameters()),
            "architecture": architecture_name(config.architecture),
        },
    )
