"""Open a run: resolve what its config names, pin it in the store, and read the pins on resume."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from flows.config import CONFIG_SCHEMA, SelfTrainingConfig
from flows.corpora import index_corpus
from flows.data_config import DigitsData, ShardsData
from flows.input_checks import (
    check_disjoint,
    check_form_of_predictions,
    check_labels,
    check_lengths,
)
from flows.latest_teachers import FinishedRun, newest_finished, series_of
from flows.loading import ConfigError, override_config
from flows.starting_weights import ModelInit, TeacherInit, model_in_store, pin_init
from flows.trained_models import (
    GivenTeacher,
    LatestTeacher,
    TrainedTeacher,
    trained_teacher,
)
from storage.addresses import canonical_json, sha256_hex
from storage.corpus import Corpus, load_corpus
from storage.manifest import UnknownSchema
from storage.runs import RunExists, UnknownRun, create_run, list_runs, read_run_config
from storage.store import Store
from tasks.classifiers import ClassesMismatch, class_order, read_description
from tasks.digits import prepare_digits
from tasks.ensembles import check_teacher
from tasks.launching import LocalLaunch
from tasks.stream_sources import refuse_cache_without_room

PINS_SCHEMA = 1

MACHINE_SETTINGS = (
    *("device", "cache", "loader_threads", "materialize", "launch", "engine"),
    "trackers",
)
"""Keys that say where and how a run computes, and whom it tells. They are in no fingerprint, and
each attempt at a run may have its own."""

_OF_AN_ATTEMPT = ("name", *MACHINE_SETTINGS)

OPERATING_SECTIONS = ("schedule", "restart", "alert")
"""Keys that say when and by whom runs are started. They are of the deployment and not of a run."""


@dataclass(frozen=True)
class Pins:
    """The inputs of a run by content; `resume` obeys these and not what URLs hold today.

    Attributes:
        labeled: digest of the labelled corpus.
        dev: digest of the dev split.
        test: digest of the test split, None without one.
        unlabeled: digest of the corpus to label; None only in a run without rounds.
        class_names: label space: output i of every model is class_names[i].
        given_teacher: fingerprint of the teacher, None where round 0 is trained; of a latest one
            that which was the newest when the run was opened.
        teacher_init: of the weights that the teacher starts from: a model's fingerprint or the
            sha256 of stored weights, as `teacher.init.kind` says; None: fresh ones.
        student_init: likewise; None also where students start from their teachers.
        extra_teachers: fingerprints of the models that label beside every round's teacher.
    """

    labeled: str
    dev: str
    test: str | None
    unlabeled: str | None
    class_names: tuple[str, ...]
    given_teacher: str | None = None
    teacher_init: str | None = None
    student_init: str | None = None
    extra_teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenRun:
    """A run whose inputs are pinned.

    Attributes:
        store: where everything is.
        name: of the run.
        config: as pinned, it may differ from the file that it came from; its machine settings are
            those of this attempt.
        pins: its inputs.
        num_labeled: images of the labelled corpus.
    """

    store: Store
    name: str
    config: SelfTrainingConfig
    pins: Pins
    num_labeled: int


def open_run(store: Store, config: SelfTrainingConfig) -> OpenRun:
    """Pin a new run, or go on with the run of this name if its config computes the same.

    Raises: RunExists, naming the keys that differ; and whatever is wrong with the data: no shard,
        a missing or damaged one, a class without label, a split with other classes; CacheTooSmall.
    """
    try:
        return check_same(reopen_run(store, config.name), config)
    except UnknownRun:
        pins = resolve_inputs(store, config)
    refuse_without_room(store, config, pins)
    body = {
        "schema": PINS_SCHEMA,
        "config": _stored_config(config),
        "pins": TypeAdapter(Pins).dump_python(pins, mode="json"),
    }
    create_run(store, config.name, body)
    return reopen_run(store, config.name)


def reopen_run(store: Store, name: str) -> OpenRun:
    """Read a pinned run; raises UnknownRun, listing the known ones."""
    body = read_run_config(store, name)
    if body["schema"] > PINS_SCHEMA or body["config"]["schema"] > CONFIG_SCHEMA:
        raise UnknownSchema(f"run {name!r} was written by a newer selftrain: upgrade to read it")
    config = SelfTrainingConfig.model_validate(body["config"])
    pins = TypeAdapter(Pins).validate_python(body["pins"])
    num_labeled = load_corpus(store, pins.labeled).num_samples
    return OpenRun(store, name, config, pins, num_labeled)


def reopened_config(store: Store, name: str, overrides: Sequence[str]) -> SelfTrainingConfig:
    """Return the config to go on with a run: the pinned one, under other machine settings.

    Args:
        store: that holds the run.
        name: of the run.
        overrides: `dotted.key=value` of machine settings, for this attempt.
    Raises: UnknownRun; ConfigError for a key that belongs to the run, or a value that does not fit.
    """
    pinned = reopen_run(store, name).config
    for override in overrides:
        key = override.partition("=")[0].split(".")[0]
        if key not in MACHINE_SETTINGS:
            raise ConfigError(
                f"--set {override}: a run keeps its config; only {', '.join(MACHINE_SETTINGS)} may"
                " change when it is resumed. Run the changed config under another --name: finished"
                " stages that it shares are found"
            )
    return override_config(pinned, overrides, where=f"run {name}")


def resolve_inputs(store: Store, config: SelfTrainingConfig) -> Pins:
    """Index the corpora that a config names, check that they fit, and return their digests."""
    data = _as_shards(store, config)
    labeled = _corpus(store, data, "labeled", data.labeled)
    if labeled.class_names is None:
        raise ValueError(
            f"data.labeled = {data.labeled!r}: no classes.json beside the shards, so class numbers"
            ' have no names. Write {"schema": 1, "class_names": [...]} there'
        )
    check_labels(labeled, "data.labeled", every_class=True)
    check_lengths(config, labeled.num_samples)
    check_form_of_predictions(config, len(labeled.class_names))
    dev = _corpus(store, data, "dev", data.dev)
    test = None if data.test is None else _corpus(store, data, "test", data.test)
    for name, split in (("dev", dev), ("test", test)):
        if split is None:
            continue
        check_labels(split, f"data.{name}", every_class=False)
        if split.class_names is None:
            raise ValueError(
                f"data.{name}: no classes.json beside the shards, so class numbers have no names."
                " Copy that of the labelled shards if the numbers mean the same"
            )
        try:
            class_order(labeled.class_names, split.class_names, model="data.labeled")
        except ClassesMismatch as error:
            raise ClassesMismatch(f"data.{name}: {error}") from None
    unlabeled = None
    if config.rounds > 0 and data.unlabeled is not None:
        unlabeled = _corpus(store, data, "unlabeled", data.unlabeled)
    check_disjoint({"labeled": labeled, "dev": dev, "test": test, "unlabeled": unlabeled})
    pins = Pins(
        labeled=labeled.digest,
        dev=dev.digest,
        test=None if test is None else test.digest,
        unlabeled=None if unlabeled is None else unlabeled.digest,
        class_names=labeled.class_names,
        extra_teachers=_extra_teachers(store, config, labeled.class_names),
    )
    return _with_models(store, config, pins)


def refuse_without_room(store: Store, config: SelfTrainingConfig, pins: Pins) -> None:
    """Refuse a cache of which this machine's trainings have no use; raises CacheTooSmall."""
    if config.cache is not None and isinstance(config.launch, LocalLaunch):
        digests = [pins.labeled, *([] if pins.unlabeled is None else [pins.unlabeled])]
        corpora = [load_corpus(store, digest) for digest in digests]
        sizes = [[shard.num_bytes for shard in corpus.shards] for corpus in corpora]
        refuse_cache_without_room(config.cache, sizes)


def _stored_config(config: SelfTrainingConfig) -> dict[str, Any]:
    """Return the config without what is not of the run: where its store lies, who starts it."""
    stored = config.model_dump(mode="json", by_alias=True)
    for key in ("store", *OPERATING_SECTIONS):
        del stored[key]
    return stored


def check_same(run: OpenRun, config: SelfTrainingConfig) -> OpenRun:
    """Return the run under the machine settings of a config that is else the same.

    Raises: RunExists, naming the keys that differ.
    """
    own = {key: getattr(config, key) for key in MACHINE_SETTINGS}
    here = replace(run, config=run.config.model_copy(update=own))
    there, wanted = _stored_config(here.config), _stored_config(config)
    if canonical_json(there) != canonical_json(wanted):
        # Let the store name the keys.
        body = read_run_config(run.store, run.name)
        pinned: dict[str, Any] = body["config"]
        results = {key: value for key, value in wanted.items() if key not in MACHINE_SETTINGS}
        kept = {key: pinned[key] for key in MACHINE_SETTINGS if key in pinned}
        create_run(run.store, run.name, {**body, "config": results | kept})
        raise RunExists(f"run {run.name!r} has another config")
    return here


def _as_shards(store: Store, config: SelfTrainingConfig) -> ShardsData:
    data = config.data
    if isinstance(data, ShardsData):
        return data
    assert isinstance(data, DigitsData)
    settings = data.model_dump(mode="json", exclude={"kind"})
    settings["seed"] = config.seed if data.seed is None else data.seed
    root = store.url_of(f"data/digits-{sha256_hex(canonical_json(settings))[:12]}")
    prepare_digits(root, **settings)
    return ShardsData(root=root, labeled="labeled", dev="dev", test="test", unlabeled="unlabeled")


def _corpus(store: Store, data: ShardsData, split: str, pattern: str) -> Corpus:
    return index_corpus(store, pattern, named=f"data.{split}", root=data.root, exclude=data.exclude)


def _with_models(store: Store, config: SelfTrainingConfig, pins: Pins) -> Pins:
    """Return the pins of the corpora with those of the models that the run starts from."""
    if isinstance(config.teacher, LatestTeacher):
        found = newest_finished(store, config.teacher.of)
        if found is not None:
            before = _same_night(store, config, pins, found)
            if before is not None:
                return before
            model, key = f"models/{found.model}", f"teacher.of, run {found.name}"
        else:
            model, key = _otherwise(store, config.teacher)
    else:
        model, key = _named_model(config.teacher, "teacher")
    given = None if model is None else _checked_teacher(store, pins, model, key=key)
    trained = None if given is not None else trained_teacher(config.teacher)
    init = None
    if trained is not None:
        key, section = trained
        init = pin_init(store, section.init, section.architecture, key=key)
    return replace(
        pins,
        given_teacher=given,
        teacher_init=init,
        student_init=_student_init(store, config, given),
    )


def _named_model(teacher: TrainedTeacher | GivenTeacher, key: str) -> tuple[str | None, str]:
    """Return the model that a section gives, None where it is trained, and the key of it."""
    return (teacher.model if isinstance(teacher, GivenTeacher) else None), f"{key}.model"


def _otherwise(store: Store, teacher: LatestTeacher) -> tuple[str | None, str]:
    """Return what the teacher is while there is no finished run.

    Raises: UnknownRun if the config does not say it.
    """
    if teacher.otherwise is None:
        known = ", ".join(list_runs(store)) or "none"
        raise UnknownRun(
            f"teacher.of = {teacher.of!r}: no run of this name, nor a scheduled one"
            f" ({teacher.of}-<UTC start>), has come to its end in {store.url}; runs there: {known}."
            " Finish one, or say in teacher.otherwise how the first teacher is made"
        )
    return _named_model(teacher.otherwise, "teacher.otherwise")


def _same_night(
    store: Store, config: SelfTrainingConfig, pins: Pins, found: FinishedRun
) -> Pins | None:
    """Return the pins of the run before in a series that refers to itself, if nothing has changed.

    Without this rule a series would train student after student on the same data, night by night.
    """
    assert isinstance(config.teacher, LatestTeacher)
    if config.teacher.of != series_of(config.name):
        return None
    before = reopen_run(store, found.name)
    ours, theirs = (
        {key: value for key, value in _stored_config(one).items() if key not in _OF_AN_ATTEMPT}
        for one in (config, before.config)
    )
    models = ("given_teacher", "teacher_init", "student_init")
    corpora = replace(before.pins, **dict.fromkeys(models))
    return before.pins if (ours, corpora) == (theirs, pins) else None


def _checked_teacher(store: Store, pins: Pins, model: str, *, key: str) -> str:
    fingerprint = model_in_store(store, model, key=key)
    theirs = read_description(store, fingerprint).class_names
    class_order(theirs, pins.class_names, model=f"{key} = {model}")
    return fingerprint


def _extra_teachers(
    store: Store, config: SelfTrainingConfig, class_names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the fingerprints of the extra teachers, each of which can label as is asked for."""
    found: list[str] = []
    for model in config.extra_teachers.models:
        named = f"extra_teachers.models: {model}"
        fingerprint = model_in_store(store, model, key="extra_teachers.models")
        description = read_description(store, fingerprint)
        class_order(description.class_names, class_names, model=named)
        try:
            check_teacher(store, fingerprint, config.labeling)
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from None
        found.append(fingerprint)
    return tuple(dict.fromkeys(found))


def _student_init(store: Store, config: SelfTrainingConfig, given: str | None) -> str | None:
    student = config.student
    if student is None:
        return None
    architecture = student.for_round(1).architecture
    if isinstance(student.init, TeacherInit) and given is not None:
        # The one teacher whose network the config does not tell.
        model_init = ModelInit(model=f"models/{given}")
        pin_init(store, model_init, architecture, key="student")
    return pin_init(store, student.init, architecture, key="student")
