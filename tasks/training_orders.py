"""What a training is asked to do: its specification, and how a worker finds it in the store."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from models.durations import Duration
from models.objectives import build_objective, calls_teacher, labels_only
from models.optimization import peak_learning_rate
from models.optimization.schedules import StaircaseConfig
from models.training import TrainingConfig
from storage.addresses import model_folder, settings_of
from storage.manifest import ManifestMismatch, read_record, sealed
from storage.store import Store
from tasks.images import CONVERSION
from tasks.loading import PLAIN_LOADING, LoadingConfig
from tasks.specifications import Specification

VERSION = 1

FollowerRole = Literal["finetune", "resolution_fix"]
Role = Literal["teacher", "student", "baseline"] | FollowerRole


@dataclass(frozen=True)
class Needs:
    """What a training reads beside the labelled corpus.

    Attributes:
        selection: pseudo-labels that were selected beforehand.
        unlabeled: the unlabelled corpus itself, whose targets are made while training.
        teacher: the round's teacher as a network, called while training.
    """

    selection: bool
    unlabeled: bool
    teacher: bool

    @property
    def reads_pseudo_labels(self) -> bool:
        """Whether anything of the unlabelled corpus is read, in either form."""
        return self.selection or self.unlabeled


def needs_of(config: TrainingConfig) -> Needs:
    """Return what a training reads: its objective's streams and models say so."""
    objective = build_objective(config.objective)
    streams = objective.streams(config)
    return Needs(
        selection=any(stream.with_selection for stream in streams),
        unlabeled=any(stream.role == "unlabeled" for stream in streams),
        teacher=calls_teacher(config.objective),
    )


@dataclass(frozen=True)
class ImagesPerStep:
    """How many images a step reads, each counted once whatever views are made of it."""

    labeled: int
    unlabeled: int

    @property
    def all(self) -> int:
        """Of both kinds."""
        return self.labeled + self.unlabeled


def images_per_step(config: TrainingConfig) -> ImagesPerStep:
    """Return what a step reads of the labelled and of the unlabelled corpus."""
    streams = build_objective(config.objective).streams(config)
    labeled = sum(stream.samples_per_step for stream in streams if stream.role == "labeled")
    return ImagesPerStep(labeled, sum(stream.samples_per_step for stream in streams) - labeled)


def specify(
    config: TrainingConfig,
    *,
    seed: int,
    round_index: int,
    role: Role,
    class_names: tuple[str, ...],
    labeled: str,
    selection: str | None = None,
    unlabeled: str | None = None,
    teacher: str | None = None,
    init: Mapping[str, str] | None = None,
    frozen_fraction: float = 0.0,
) -> Specification:
    """Return the specification of one training.

    Args:
        config: its objective says which of selection, unlabeled and teacher it reads.
        seed: of the run.
        round_index: 0 for the teacher.
        role: enters the random streams, so that a student and the baseline differ.
        class_names: label space, output i is class_names[i].
        labeled: digest of the labelled corpus; its size is the length of a labelled epoch.
        selection: fingerprint of the pseudo-labels.
        unlabeled: digest of the unlabelled corpus, for objectives that label while they train.
        teacher: fingerprint of the model that the objective calls.
        init: where the first weights come from: `{"init": fingerprint of a model}`,
            `{"init_weights": sha256 of stored weights}`, or nothing for fresh ones.
        frozen_fraction: of the network's blocks that keep the weights they start from.
    Raises: ValueError if what is given is not what the objective reads.
    """
    needs = needs_of(config)
    given = {"selection": selection, "unlabeled": unlabeled, "teacher": teacher}
    for name, value in given.items():
        if getattr(needs, name) != (value is not None):
            raise ValueError(
                f"{role}: objective {config.objective.kind!r} with"
                f" unlabeled_ratio={config.unlabeled_ratio} reads"
                f" {'a' if getattr(needs, name) else 'no'} {name}, but"
                f" {'none' if value is None else 'one'} is given"
            )
    if frozen_fraction and not init:
        raise ValueError(
            f"{role}: frozen_fraction={frozen_fraction} of fresh, random weights would be frozen;"
            " it needs weights to start from"
        )
    settings = {
        "training": settings_of(config),
        "seed": seed,
        "round_index": round_index,
        "role": role,
        "class_names": list(class_names),
        "conversion": CONVERSION,
    } | ({"frozen_fraction": frozen_fraction} if frozen_fraction else {})
    inputs = {name: value for name, value in given.items() if value is not None}
    return Specification(
        "train", VERSION, settings, {"labeled": labeled} | inputs | dict(init or {})
    )


def pretraining_config(student: TrainingConfig) -> TrainingConfig:
    """Return the student's training on pseudo-labels alone: its steps, without its labels.

    Durations in labelled epochs still count batch_size labelled images a step, so that steps and
    schedule are those of the joint training.
    """
    objective = student.objective.model_copy(update={"labeled_images": False})
    return student.model_copy(update={"objective": objective})


def baseline_config(student: TrainingConfig) -> TrainingConfig:
    """Return the student's training on labels alone: its steps, as many images a step.

    The labelled batch grows to what the student reads of both kinds: B_l * (1 + r) beside labels,
    B_l * r where it pre-trains on pseudo-labels alone. Durations grow with it, and the peak
    learning rate stays the one of the student's labelled batch, so that steps and schedule are the
    student's.
    """
    factor = images_per_step(student).all // student.batch_size

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
            "objective": labels_only(student.objective),
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
        loading: how images are read.
    """

    specification: Specification
    config: TrainingConfig
    max_bad_samples: int
    loading: LoadingConfig = PLAIN_LOADING


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
        "loading": order.loading.model_dump(mode="json"),
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
    loading = LoadingConfig.model_validate(body.get("loading", {}))
    return TrainingOrder(specification, config, body["max_bad_samples"], loading)
