"""What a training is asked to do: its specification, and how a worker finds it in the store."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from models.durations import Duration
from models.optimization import peak_learning_rate
from models.optimization.schedules import StaircaseConfig
from models.training import TrainingConfig
from storage.addresses import model_folder, settings_of
from storage.manifest import ManifestMismatch, read_record, sealed
from storage.store import Store
from tasks.images import CONVERSION
from tasks.specifications import Specification

VERSION = 1

Role = Literal["teacher", "student", "baseline"]


def specify(
    config: TrainingConfig,
    *,
    seed: int,
    round_index: int,
    role: Role,
    class_names: tuple[str, ...],
    labeled: str,
    selection: str | None = None,
) -> Specification:
    """Return the specification of one training.

    Args:
        config: with unlabeled_ratio 0 exactly where there is no selection.
        seed: of the run.
        round_index: 0 for the teacher.
        role: enters the random streams, so that a student and the baseline differ.
        class_names: label space, output i is class_names[i].
        labeled: digest of the labelled corpus.
        selection: fingerprint of the pseudo-labels.
    """
    if (selection is None) != (config.unlabeled_ratio == 0):
        raise ValueError(
            f"{role}: unlabeled_ratio={config.unlabeled_ratio}, but"
            f" {'no' if selection is None else 'a'} selection is given; the ratio must be 0 exactly"
            " where there are no pseudo-labels"
        )
    settings = {
        "training": settings_of(config),
        "seed": seed,
        "round_index": round_index,
        "role": role,
        "class_names": list(class_names),
        "conversion": CONVERSION,
    }
    inputs = {"labeled": labeled} | ({} if selection is None else {"selection": selection})
    return Specification("train", VERSION, settings, inputs)


def baseline_config(student: TrainingConfig) -> TrainingConfig:
    """Return the student's training on labels alone: its steps, as many images a step.

    The labelled batch grows to B_l * (1 + r). Durations grow with it, and the peak learning rate
    stays the one of the student's labelled batch, so that steps and schedule are the student's.
    """
    factor = 1 + student.unlabeled_ratio

    def scaled(duration: Duration) -> Duration:
        if duration.labeled_epochs is not None:
            epochs = Decimal(repr(duration.labeled_epochs)) * factor
            return Duration(labeled_epochs=float(epochs))
        if duration.samples_seen is not None:
            return Duration(samples_seen=duration.samples_seen * factor)
        return duration

    schedule = student.schedule
    if isinstance(schedule, StaircaseConfig):
        schedule = schedule.model_copy(update={"decay_every": scaled(schedule.decay_every)})
    peak = peak_learning_rate(student.optimizer, batch_size=student.batch_size)
    return student.model_copy(
        update={
            "batch_size": student.batch_size * factor,
            "unlabeled_ratio": 0,
            "duration": scaled(student.duration),
            "warmup": None if student.warmup is None else scaled(student.warmup),
            "schedule": schedule,
            "optimizer": student.optimizer.model_copy(update={"lr": peak, "lr_scaling": "none"}),
        }
    )


@dataclass(frozen=True)
class TrainingOrder:
    """A specification with what does not affect its result.

    Attributes:
        specification: what to train.
        config: the whole config; its result-affecting part is in the specification.
        max_bad_samples: undecodable images allowed in a shard.
    """

    specification: Specification
    config: TrainingConfig
    max_bad_samples: int


def place_order(store: Store, order: TrainingOrder) -> None:
    """Write the order beside the result to be, where any launcher's worker finds it."""
    specification = order.specification
    body = {
        "schema": 1,
        "kind": specification.kind,
        "version": specification.version,
        "settings": specification.settings,
        "inputs": specification.inputs,
        "config": order.config.model_dump(mode="json"),
        "max_bad_samples": order.max_bad_samples,
    }
    store.replace(f"{specification.folder}/specification.json", sealed(body))


def read_order(store: Store, fingerprint: str) -> TrainingOrder:
    """Read an order and check that it is the one that the fingerprint names."""
    path = f"{model_folder(fingerprint)}/specification.json"
    body = read_record(store, path)
    if body is None:
        raise ValueError(f"no training is ordered at {store.url_of(path)}")
    specification = Specification(body["kind"], body["version"], body["settings"], body["inputs"])
    config = TrainingConfig.model_validate(body["config"])
    if specification.version != VERSION or settings_of(config) != body["settings"]["training"]:
        raise ValueError(
            f"{store.url_of(path)} was written by another version of selftrain (stage version"
            f" {specification.version}, here {VERSION}); run flow and worker of one version"
        )
    if specification.fingerprint != fingerprint:
        raise ManifestMismatch(
            f"{store.url_of(path)} specifies {specification.fingerprint}, not {fingerprint}"
        )
    return TrainingOrder(specification, config, body["max_bad_samples"])
