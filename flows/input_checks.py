"""What is refused of a config and its corpora together, before anything is computed."""

from collections.abc import Iterator

from flows.config import SelfTrainingConfig
from flows.trained_models import StudentConfig, TrainedTeacher, trained_teacher
from models.training import TrainingConfig
from storage.corpus import Corpus
from tasks.labeling_config import resolved_form
from tasks.selection import check_calibration
from tasks.training_orders import needs_of


def check_labels(corpus: Corpus, key: str, *, every_class: bool) -> None:
    """Refuse a labelled split with samples, or (every_class) classes, that have no label."""
    counts = corpus.label_counts()
    without = corpus.num_samples - sum(counts.values())
    if without:
        raise ValueError(
            f"{key}: {without} of {corpus.num_samples} samples have no .cls member; every sample of"
            " this split must be labelled"
        )
    if every_class:
        names = corpus.class_names or ()
        missing = [name for i, name in enumerate(names) if counts.get(i, 0) == 0]
        if missing:
            raise ValueError(
                f"{key}: {len(missing)} of {len(names)} classes have no label: "
                f"{', '.join(missing[:10])}. A teacher cannot learn them: label some images, or"
                " take the classes out of classes.json"
            )


def check_lengths(config: SelfTrainingConfig, num_labeled: int) -> None:
    """Refuse a warm-up as long as its training now, and not after hours of other stages."""
    for name, training in trainings_of(config):
        if training.warmup is None:
            continue
        steps, warmup = (
            length.to_steps(training.batch_size, num_labeled)
            for length in (training.duration, training.warmup)
        )
        if warmup >= steps:
            raise ValueError(
                f"{name}.warmup is {warmup} steps with the {num_labeled} images of data.labeled,"
                f" {name}.duration {steps}: shorten the warm-up or lengthen the training"
            )


def check_form_of_predictions(config: SelfTrainingConfig, num_classes: int) -> None:
    """Refuse a calibration that the form of the predictions leaves no room for."""
    rounds = range(1, config.rounds + 1)
    students = [] if config.student is None else map(config.student.for_round, rounds)
    if any(needs_of(student).selection for student in students):
        form = resolved_form(config.labeling, num_classes)
        check_calibration(config.selection.calibration, form)


def trainings_of(config: SelfTrainingConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """Yield the trainings of a config by their keys, with the stages after them."""
    sections: list[tuple[str, TrainedTeacher | StudentConfig, TrainingConfig]] = []
    if (trained := trained_teacher(config.teacher)) is not None:
        sections.append((*trained, trained[1].training()))
    if config.student is not None:
        sections.append(("student", config.student, config.student.for_round(1)))
    for name, section, training in sections:
        yield name, training
        for role, follower in section.followers():
            yield f"{name}.{role}", follower.training(training)


def check_disjoint(splits: dict[str, Corpus | None]) -> None:
    """Refuse a shard that serves two splits: accuracies would be measured on training data."""
    seen: dict[str, str] = {}
    for name, corpus in splits.items():
        for shard in corpus.shards if corpus else ():
            if shard.tar_digest in seen and seen[shard.tar_digest] != name:
                raise ValueError(
                    f"shard {shard.stem} is in data.{seen[shard.tar_digest]} and in data.{name}:"
                    " splits must not share images"
                )
            seen[shard.tar_digest] = name
