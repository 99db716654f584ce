"""Open a run: resolve what its config names, pin it in the store, and read the pins on resume."""

import logging
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from flows.config import (
    CONFIG_SCHEMA,
    DigitsData,
    GivenTeacher,
    SelfTrainingConfig,
    ShardsData,
    TrainedTeacher,
)
from models.training import TrainingConfig
from storage.addresses import canonical_json, sha256_hex
from storage.corpus import Corpus, EmptyCorpus, load_corpus, save_corpus
from storage.indexing import ShardIndex, corpus_from_index, index_shards, read_index, write_index
from storage.manifest import UnknownSchema
from storage.patterns import below_root, expand_shards
from storage.runs import RunExists, UnknownRun, create_run, read_run_config
from storage.store import Store
from tasks.classifiers import ClassesMismatch, class_order, model_manifest, read_description
from tasks.digits import prepare_digits
from tasks.progress import Progress, report

_log = logging.getLogger(__name__)

PINS_SCHEMA = 1


@dataclass(frozen=True)
class Pins:
    """The inputs of a run by content; `resume` obeys these and not what URLs hold today.

    Attributes:
        labeled: digest of the labelled corpus.
        dev: digest of the dev split.
        test: digest of the test split, None without one.
        unlabeled: digest of the corpus to label.
        class_names: label space: output i of every model is class_names[i].
        given_teacher: fingerprint of the teacher, None where round 0 is trained.
    """

    labeled: str
    dev: str
    test: str | None
    unlabeled: str
    class_names: tuple[str, ...]
    given_teacher: str | None = None


@dataclass(frozen=True)
class OpenRun:
    """A run whose inputs are pinned.

    Attributes:
        store: where everything is.
        name: of the run.
        config: as pinned; it may differ from the file that it came from.
        pins: its inputs.
        num_labeled: images of the labelled corpus.
    """

    store: Store
    name: str
    config: SelfTrainingConfig
    pins: Pins
    num_labeled: int


def open_run(store: Store, config: SelfTrainingConfig) -> OpenRun:
    """Pin a new run, or go on with the run of this name if its config is the same.

    Raises: RunExists, naming the keys that differ; and whatever is wrong with the data: no shard,
        a missing or damaged one, a class without label, a split with other classes.
    """
    try:
        return check_same(reopen_run(store, config.name), config)
    except UnknownRun:
        pins = resolve_inputs(store, config)
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


def resolve_inputs(store: Store, config: SelfTrainingConfig) -> Pins:
    """Index the corpora that a config names, check that they fit, and return their digests."""
    data = _as_shards(store, config)
    labeled = _corpus(store, data, "labeled", data.labeled)
    if labeled.class_names is None:
        raise ValueError(
            f"data.labeled = {data.labeled!r}: no classes.json beside the shards, so class numbers"
            ' have no names. Write {"schema": 1, "class_names": [...]} there'
        )
    _check_labels(labeled, "data.labeled", every_class=True)
    _check_lengths(config, labeled.num_samples)
    dev = _corpus(store, data, "dev", data.dev)
    test = None if data.test is None else _corpus(store, data, "test", data.test)
    for name, split in (("dev", dev), ("test", test)):
        if split is None:
            continue
        _check_labels(split, f"data.{name}", every_class=False)
        if split.class_names is None:
            raise ValueError(
                f"data.{name}: no classes.json beside the shards, so class numbers have no names."
                " Copy that of the labelled shards if the numbers mean the same"
            )
        try:
            class_order(labeled.class_names, split.class_names, model="data.labeled")
        except ClassesMismatch as error:
            raise ClassesMismatch(f"data.{name}: {error}") from None
    unlabeled = _corpus(store, data, "unlabeled", data.unlabeled)
    _check_disjoint({"labeled": labeled, "dev": dev, "test": test, "unlabeled": unlabeled})
    return Pins(
        labeled=labeled.digest,
        dev=dev.digest,
        test=None if test is None else test.digest,
        unlabeled=unlabeled.digest,
        class_names=labeled.class_names,
        given_teacher=_given_teacher(store, config, labeled.class_names),
    )


def _stored_config(config: SelfTrainingConfig) -> dict[str, Any]:
    """Return the config without what may differ between machines."""
    stored = config.model_dump(mode="json", by_alias=True)
    del stored["store"]
    return stored


def check_same(run: OpenRun, config: SelfTrainingConfig) -> OpenRun:
    """Return the run if it has this config; raises RunExists, naming the keys that differ."""
    there, wanted = _stored_config(run.config), _stored_config(config)
    if canonical_json(there) != canonical_json(wanted):
        # Let the store name the keys.
        create_run(run.store, run.name, {**read_run_config(run.store, run.name), "config": wanted})
        raise RunExists(f"run {run.name!r} has another config")
    return run


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
    """Index one split; what is unchanged since the last index of this pattern is not read."""
    located = below_root(pattern, data.root)
    if located.endswith(".json"):
        index = read_index(located)
        if index is None:
            raise FileNotFoundError(
                f"data.{split} = {pattern!r}: no index at {located}; make it with"
                " `selftrain data index`"
            )
    else:
        index = _fresh_index(store, split, located)
    try:
        corpus, locations = corpus_from_index(index)
    except EmptyCorpus as error:
        raise EmptyCorpus(f"data.{split} = {pattern!r}: {error}") from None
    save_corpus(store, corpus, locations)
    return corpus


def _fresh_index(store: Store, split: str, located: str) -> ShardIndex:
    try:
        urls = expand_shards(located)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"data.{split}: {error}") from error
    index_url = store.url_of(f"corpora/index-{sha256_hex(located.encode())[:16]}.json")
    index = index_shards(
        urls,
        previous=read_index(index_url),
        progress=lambda done, total: report(Progress(f"index {split}", done, total, "shards")),
        save=lambda partial: write_index(index_url, partial),
    )
    write_index(index_url, index)
    return index


def _check_labels(corpus: Corpus, key: str, *, every_class: bool) -> None:
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


def _check_lengths(config: SelfTrainingConfig, num_labeled: int) -> None:
    """Refuse a warm-up as long as its training now, and not after hours of other stages."""
    trainings: dict[str, TrainingConfig] = {"student": config.student}
    if isinstance(config.teacher, TrainedTeacher):
        trainings["teacher"] = config.teacher
    for name, training in trainings.items():
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


def _check_disjoint(splits: dict[str, Corpus | None]) -> None:
    """Refuse a shard that serves two splits: accuracies would be measured on training data."""
    seen: dict[str, str] = {}
    for name, corpus in splits.items():
        for shard in corpus.shards if corpus else ():
            if shard.digest in seen and seen[shard.digest] != name:
                raise ValueError(
                    f"shard {shard.stem} is in data.{seen[shard.digest]} and in data.{name}:"
                    " splits must not share images"
                )
            seen[shard.digest] = name


def _given_teacher(
    store: Store, config: SelfTrainingConfig, class_names: tuple[str, ...]
) -> str | None:
    if not isinstance(config.teacher, GivenTeacher):
        return None
    url = config.teacher.model.rstrip("/")
    fingerprint = url.rpartition("/")[2]
    if ("://" in url or url.startswith("/")) and url != store.url_of(f"models/{fingerprint}"):
        raise ValueError(
            f"teacher.model = {url} lies outside the run's store {store.url}; import it there:"
            f" selftrain import ... --store {store.url}"
        )
    model_manifest(store, fingerprint)
    theirs = read_description(store, fingerprint).class_names
    class_order(theirs, class_names, model=f"teacher.model = {url}")
    return fingerprint
