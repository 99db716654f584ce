"""A tiny world for the tests of tasks and flows: 8-pixel images of three classes, in shards.

Class k is an image whose channel k is bright, under noise, so that a network of a few hundred
weights learns it in twenty steps. Everything is made from seeds; no test needs the network.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

# One thread a process, workers included: tests run side by side, and threads that wait for a busy
# core by spinning slow each other down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from flows.graph import ModelRef, RunGraph, Training, model_of
from models.architectures import SmallCnnConfig
from models.balancing import BalanceNoneConfig
from models.durations import Duration
from models.noise import AffineConfig, NoiseConfig
from models.optimization import AdamWConfig, EmaConfig
from models.thresholds import FixedThresholdConfig
from models.training import TrainingConfig
from storage.corpus import Corpus, Shard, load_corpus, save_corpus
from storage.indexing import corpus_from_index, index_shards
from storage.manifest import InputReference, Manifest, commit_manifest, put_object, read_stored
from storage.patterns import expand_shards
from storage.predictions import Predictions, write_predictions
from storage.predictions import to_parquet as predictions_to_parquet
from storage.selections import Selection, from_parquet
from storage.store import Store, open_store
from tasks import evaluation, labeling, selection, selection_writing
from tasks.classifiers import StoredClassifier, load_classifier
from tasks.ensembles import Ensemble
from tasks.gating import close_gates
from tasks.selection import SelectionConfig
from tasks.selection_passes import plan_selection
from tasks.selection_processes import SelectionProcesses, SelectionThreads
from tasks.specifications import Specification
from tasks.training import run_training
from tasks.training_orders import Role, TrainingOrder, specify

CLASS_NAMES = ("red", "green", "blue")
CPU = torch.device("cpu")
GOLDEN_FOLDER = Path(__file__).parent / "golden"

ShardContent = Sequence[tuple[str, bytes, int | None]]
"""Samples of a shard: key in the shard, image file, label or None."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/*.json anew instead of comparing with them",
    )


@pytest.hookimpl(trylast=True)  # when the tests that were not asked for are out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: a long one at the end would leave a core idle.

    Long are those whose tests have a long time limit, then those of flows and of tasks, which start
    processes. xdist hands files out in this order (--no-loadscope-reorder).
    """
    limits: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0), 0 if mark is None else mark.args[0])
    packages = ("flows", "tasks")

    def rank(item: pytest.Item) -> tuple[float, int]:
        package = item.path.parent.name
        return -limits[item.path], packages.index(package) if package in packages else 2

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    # Tiny tensors gain nothing from more, and threads that spin starve the other test processes.
    torch.set_num_threads(1)


def png(label: int, number: int, *, size: int = 8, hardness: float = 0.0) -> bytes:
    """An image of a class; hardness 1 hides the class in the noise."""
    noise = np.random.default_rng([label, number]).uniform(-60, 60, (size, size, 3))
    color = np.full(3, 80.0)
    color[label] += 90 * (1 - hardness)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: ShardContent) -> None:
    """Write a shard; the same samples give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            members = [(f"{key}.png", image)]
            if label is not None:
                members.append((f"{key}.cls", str(label).encode()))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_split(
    folder: Path,
    shards: Mapping[str, ShardContent],
    class_names: Sequence[str] | None = CLASS_NAMES,
) -> Path:
    """Write shards by stem with classes.json beside them."""
    for stem, samples in shards.items():
        write_shard(folder / f"{stem}.tar", samples)
    if class_names is not None:
        body = {"schema": 1, "class_names": list(class_names)}
        (folder / "classes.json").write_text(json.dumps(body))
    return folder


def index_into(store: Store, folder: Path) -> Corpus:
    """Index a folder of shards and make it known to a store."""
    corpus, locations = corpus_from_index(index_shards(expand_shards(str(folder))))
    save_corpus(store, corpus, locations)
    return corpus


def images_of(
    prefix: str, count: int, *, start: int, hardness: float = 0.0, labeled: bool = True
) -> list[tuple[str, bytes, int | None]]:
    """Samples of the classes in turn; `start` keeps the images of splits different."""
    return [
        (
            f"{prefix}{i:03d}",
            png(i % 3, start + i, hardness=hardness * (i % 5) / 4),
            i % 3 if labeled else None,
        )
        for i in range(count)
    ]


def training_config(**changes: Any) -> TrainingConfig:
    """Twenty steps of a tiny network under dropout and affine noise, with a moving average."""
    settings: dict[str, Any] = {
        "architecture": SmallCnnConfig(width=4, depth=1),
        "image_size": 8,
        "batch_size": 6,
        "unlabeled_ratio": 0,
        "duration": Duration(steps=20),
        "optimizer": AdamWConfig(lr=0.02, weight_decay=0.01),
        "warmup": Duration(steps=2),
        "ema": EmaConfig(decay=0.6),
        "noise": NoiseConfig(
            affine=AffineConfig(degrees=15, translate=0.1), dropout=0.2, horizontal_flip=True
        ),
        "checkpoint_every_seconds": None,
    }
    return TrainingConfig(**settings | changes)


def predictions_of(rows: Sequence[Sequence[Any]], *, num_classes: int = 3) -> Predictions:
    """Predictions from (key, label, confidence[, true label]); other classes share the rest."""
    labels = np.array([row[1] for row in rows], np.uint32)
    confidence = np.array([row[2] for row in rows], np.float32)
    rest = (1 - confidence.astype(np.float64)) / (num_classes - 1)
    probs = np.repeat(rest[:, None], num_classes, axis=1)
    probs[np.arange(len(rows)), labels] = confidence
    log_probs = np.log(np.maximum(probs, 1e-6))
    return Predictions(
        keys=tuple(row[0] for row in rows),
        label=labels,
        confidence=confidence,
        margin=np.maximum(confidence - rest, 0).astype(np.float32),
        entropy=np.maximum(-(probs * log_probs).sum(axis=1), 0).astype(np.float32),
        log_probs=log_probs.astype(np.float16),
        logsumexp=np.zeros(len(rows), np.float32),
        true_label=np.array([row[3] if len(row) > 3 else -1 for row in rows], np.int32),
    )


def plant_labeling(
    store: Store,
    corpus: Corpus,
    rows: Mapping[str, Sequence[Sequence[Any]] | Predictions],
    *,
    labeler: str = "f" * 64,
    num_classes: int = 3,
) -> Manifest:
    """A finished labelling whose predictions were made up, by stem."""
    for shard in corpus.shards:
        predictions = rows[shard.stem]
        if not isinstance(predictions, Predictions):
            predictions = predictions_of(predictions, num_classes=num_classes)
        write_predictions(store, labeler, shard.digest, predictions, {"bad_samples": {}})
    specification = labeling.specify(labeler=labeler, corpus=corpus.digest)
    return labeling.finish(store, specification, seconds=0.0)


def plant_validation(store: Store, predictions: Predictions) -> Manifest:
    """A finished validation whose predictions were made up."""
    specification = evaluation.specify(
        "validate", model="a" * 64, corpus="b" * 64, view={}, class_names=CLASS_NAMES
    )
    stored = put_object(
        store, specification.folder, "predictions", predictions_to_parquet(predictions), "parquet"
    )
    manifest = Manifest(
        kind="validate",
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs={name: InputReference(fp, fp) for name, fp in specification.inputs.items()},
        objects=(stored,),
        counts={"samples": predictions.num_samples, "classes": predictions.num_classes},
    )
    return commit_manifest(store, specification.folder, manifest)


def never() -> bool:
    return False


def run_selection(
    store: Store,
    labels: Manifest,
    validation: Manifest | None,
    config: SelectionConfig,
    *,
    class_names: Sequence[str],
    seed: int = 0,
    round_index: int = 1,
    labeled: str | None = None,
    guard: Manifest | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    only_write: Sequence[Sequence[str]] | None = None,
    workers: SelectionProcesses | None = None,
    scratch: IO[bytes] | None = None,
) -> Manifest:
    """What flows/selection.py does, without Prefect, over any grouping of the shards.

    With `only_write` it is cut off after these groups.
    """
    run = SelectionThreads().run if workers is None else workers.run
    specification = selection.specify(
        config,
        labeling=labels.fingerprint,
        validation="none" if validation is None else validation.fingerprint,
        labeled=labeled,
        leaks=None if guard is None else guard.fingerprint,
        seed=seed,
        round_index=round_index,
    )
    if groups is None:
        groups = [list(labels.counts["shards"])]

    def mapped(one_pass: Any, inputs: Any, config: SelectionConfig, *more: Any) -> list[Any]:
        return [
            run(one_pass, store, inputs.of_shards(group), group, config, *more) for group in groups
        ]

    corpus = load_corpus(store, labels.inputs["corpus"].fingerprint)
    inputs = selection.begin(store, specification, labels, corpus)
    if scratch is not None:
        inputs = inputs.keeping_ranked(scratch.fileno(), config.balance)
    inputs, gated = close_gates(store, inputs, config, validation, guard, mapped)
    inputs, calibrated = selection.calibrate(
        store, specification, inputs, validation, class_names=class_names
    )
    planned = plan_selection(inputs, config, mapped)
    for group in groups if only_write is None else only_write:
        of_group = planned.inputs.of_shards(group)
        write = selection_writing.write_selections
        run(write, store, specification, of_group, group, config, planned.plan)
    return selection.finish(
        store,
        specification,
        labels,
        validation,
        config,
        corpus=corpus,
        groups=groups,
        guard=guard,
        facts=gated | calibrated | planned.facts,
        class_names=class_names,
        seconds=0.0,
    )


@dataclass(frozen=True)
class Lab:
    """A store that knows four corpora, and the stages without Prefect."""

    store: Store
    folder: Path
    labeled: Corpus
    dev: Corpus
    test: Corpus
    unlabeled: Corpus
    class_names: tuple[str, ...] = CLASS_NAMES

    keep_all = SelectionConfig(
        calibration="none",
        threshold=FixedThresholdConfig(confidence=0),
        balance=BalanceNoneConfig(),
        allow_collapse=True,
    )

    # What tests make worlds of their own with; fixtures are all that tests can import from here.
    png = staticmethod(png)
    write_shard = staticmethod(write_shard)
    write_split = staticmethod(write_split)
    index_into = staticmethod(index_into)
    images_of = staticmethod(images_of)
    config = staticmethod(training_config)
    predictions_of = staticmethod(predictions_of)
    plant_labeling = staticmethod(plant_labeling)
    plant_validation = staticmethod(plant_validation)
    run_selection = staticmethod(run_selection)

    def in_store(self, path: Path) -> "Lab":
        """The same corpora in a new, empty store."""
        return make_lab(path, self.folder)

    def in_empty_store(self, path: Path) -> "Lab":
        """A new store that knows nothing."""
        return replace(self, store=open_store(str(path)))

    def with_corpora(self, **corpora: Corpus) -> "Lab":
        return replace(self, **corpora)

    def planted_corpus(self, rows: Mapping[str, Sequence[Any]]) -> Corpus:
        """A corpus of shards that are nowhere, by stem with as many samples as rows."""
        shards = [
            Shard(stem, f"{i:x}" * 64, len(rows[stem]), 1024) for i, stem in enumerate(rows, 1)
        ]
        corpus = Corpus.of(shards, self.class_names)
        save_corpus(self.store, corpus, {stem: f"/nowhere/{stem}.tar" for stem in rows})
        return corpus

    def stored_selections(
        self, manifest: Manifest, rows: Mapping[str, Sequence[Any]]
    ) -> dict[str, Selection]:
        """What was selected from a planted corpus, by stem."""
        return {
            stem: from_parquet(
                read_stored(self.store, manifest.object(f"{i:x}" * 64)), num_samples=len(rows[stem])
            )
            for i, stem in enumerate(rows, 1)
        }

    def order(
        self,
        config: TrainingConfig | None = None,
        *,
        role: Role = "teacher",
        round_index: int = 0,
        selection: str | None = None,
        seed: int = 0,
        max_bad_samples: int = 0,
    ) -> TrainingOrder:
        config = config or training_config()
        specification = specify(
            config,
            seed=seed,
            round_index=round_index,
            role=role,
            class_names=self.class_names,
            labeled=self.labeled.digest,
            selection=selection,
        )
        return TrainingOrder(specification, config, max_bad_samples)

    def train(
        self,
        order: TrainingOrder | None = None,
        *,
        should_stop: Callable[[], bool] = never,
    ) -> Manifest:
        return run_training(
            self.store,
            order or self.order(),
            device=CPU,
            on_report=lambda report, total: None,
            should_stop=should_stop,
        )

    def classifier(self, model: str, class_names: Sequence[str] | None = None) -> StoredClassifier:
        return load_classifier(
            self.store, model, device=CPU, class_names=class_names or self.class_names
        )

    def specify_evaluation(self, kind: Any, model: str) -> Specification:
        corpus = self.dev if kind == "validate" else self.test
        return evaluation.specify(
            kind,
            model=model,
            corpus=corpus.digest,
            view={"image_size": 8, "crop_padding": 0, "interpolation": "bilinear"},
            class_names=self.class_names,
        )

    def evaluate(self, kind: Any, model: str, *, max_bad_samples: int = 0) -> Manifest:
        return evaluation.evaluate(
            self.store,
            self.specify_evaluation(kind, model),
            self.classifier(model),
            max_bad_samples=max_bad_samples,
        )

    def labeler(self, model: str) -> str:
        return labeling.labeler_fingerprint(
            labeling.LabelingConfig(),
            teacher=model,
            view={"image_size": 8, "crop_padding": 0, "interpolation": "bilinear"},
            class_names=self.class_names,
        )

    def label(
        self, model: str, *, stems: Sequence[str] | None = None, max_bad_samples: int = 0
    ) -> Manifest:
        labeler = self.labeler(model)
        done = labeling.label_shards(
            self.store,
            self.unlabeled.digest,
            list(stems or [shard.stem for shard in self.unlabeled.shards]),
            Ensemble((self.classifier(model),)),
            labeler=labeler,
            batch_size=16,
            max_bad_samples=max_bad_samples,
        )
        assert sum(done) > 0
        specification = labeling.specify(labeler=labeler, corpus=self.unlabeled.digest)
        return labeling.finish(self.store, specification, seconds=0.0)

    def select(
        self, labels: Manifest, validation: Manifest | None, config: SelectionConfig, **more: Any
    ) -> Manifest:
        return run_selection(
            self.store, labels, validation, config, class_names=self.class_names, **more
        )


def make_lab(store_path: Path, folder: Path) -> Lab:
    store = open_store(str(store_path))
    return Lab(
        store=store,
        folder=folder,
        labeled=index_into(store, folder / "labeled"),
        dev=index_into(store, folder / "dev"),
        test=index_into(store, folder / "test"),
        unlabeled=index_into(store, folder / "unlabeled"),
    )


@pytest.fixture(scope="session")
def corpora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 labels in 3 shards, 15 dev, 15 test, 50 unlabelled in 5 shards, half with truth."""
    folder = tmp_path_factory.mktemp("corpora")
    labeled = images_of("l", 24, start=0)
    write_split(folder / "labeled", {f"labeled-{i}": labeled[8 * i : 8 * i + 8] for i in range(3)})
    write_split(folder / "dev", {"dev-0": images_of("d", 15, start=1000, hardness=0.7)})
    write_split(folder / "test", {"test-0": images_of("t", 15, start=2000, hardness=0.7)})
    truth = images_of("u", 25, start=3000, hardness=0.8)
    plain = images_of("v", 25, start=4000, hardness=0.8, labeled=False)
    unlabeled = truth + plain
    write_split(
        folder / "unlabeled", {f"unlabeled-{i}": unlabeled[10 * i : 10 * i + 10] for i in range(5)}
    )
    return folder


@pytest.fixture
def lab(corpora_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The corpora in a store of this test's own, which no power cut will threaten."""
    # Most of the time of these tests was fsync; what it is for is tested in tests/storage.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return make_lab(tmp_path / "store", corpora_folder)


@dataclass(frozen=True)
class Pipeline:
    """One whole round, computed once; tests only read it."""

    lab: Lab
    teacher: Manifest
    validation: Manifest
    tested: Manifest
    labels: Manifest
    selection_config: SelectionConfig
    selection: Manifest
    student: Manifest
    student_validation: Manifest

    def student_order(self, **changes: Any) -> TrainingOrder:
        return student_order(self.lab, self.selection.fingerprint, **changes)


def student_order(lab: Lab, selection: str, **changes: Any) -> TrainingOrder:
    config = training_config(**{"unlabeled_ratio": 2} | changes)
    return lab.order(config, role="student", round_index=1, selection=selection)


@pytest.fixture(scope="session")
def pipeline(corpora_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    lab = make_lab(tmp_path_factory.mktemp("pipeline") / "store", corpora_folder)
    teacher = lab.train()
    validation = lab.evaluate("validate", teacher.fingerprint)
    tested = lab.evaluate("test", teacher.fingerprint)
    labels = lab.label(teacher.fingerprint)
    config = SelectionConfig(threshold=FixedThresholdConfig(confidence=0.9))
    chosen = lab.select(labels, validation, config)
    student = lab.train(student_order(lab, chosen.fingerprint))
    return Pipeline(
        lab=lab,
        teacher=teacher,
        validation=validation,
        tested=tested,
        labels=labels,
        selection_config=config,
        selection=chosen,
        student=student,
        student_validation=lab.evaluate("validate", student.fingerprint),
    )


@pytest.fixture
def taught(pipeline: Pipeline, lab: Lab) -> Lab:
    """This test's store with the pipeline's teacher in it."""
    model = f"models/{pipeline.teacher.fingerprint}"
    shutil.copytree(Path(pipeline.lab.store.url) / model, Path(lab.store.url) / model)
    return lab


@pytest.fixture(scope="session")
def fingerprints_of() -> Callable[[RunGraph], dict[str, str]]:
    """Return a function: the fingerprint of every stage of a run whose students all are promoted.

    Names are "<round> <stage>", so that a golden file of them reads like the run.
    """

    def listed(graph: RunGraph) -> dict[str, str]:
        stages: dict[str, str] = {}

        def evaluated(name: str, model: ModelRef) -> None:
            stages[f"{name} validate"] = graph.evaluate("validate", model).fingerprint
            if graph.pins.test is not None:
                stages[f"{name} test"] = graph.evaluate("test", model).fingerprint

        def trained(name: str, trainings: Sequence[Training]) -> ModelRef:
            """List a chain; its first training is called `name`, the others by their roles."""
            for number, training in enumerate(trainings):
                round_or_baseline = name.split()[0]
                full = name if number == 0 else f"{round_or_baseline} {training.role}"
                stages[full] = training.specification.fingerprint
            return model_of(trainings)

        guard = graph.guard() if graph.config.rounds and graph.needs(1).selection else None
        if guard is not None:
            stages["1 guard"] = guard.fingerprint
        model = graph.first_model()
        stages["0 teacher"] = model.fingerprint
        if graph.teacher():
            trained("0 teacher", graph.teacher())
        evaluated("0", model)
        for i in range(1, graph.config.rounds + 1):
            if graph.needs(i).selection:
                stages[f"{i} labeler"] = graph.labeler(model)
                stages[f"{i} label"] = graph.label(model).fingerprint
                stages[f"{i} select"] = graph.select(model, i).fingerprint
            trained(f"{i} student", graph.student(model, i))
            student = graph.student_model(model, i)
            evaluated(str(i), student)
            stages[f"{i} promote"] = graph.promote(model, student).fingerprint
            model = student
        if graph.config.baseline:
            last = trained("baseline train", graph.baseline(graph.config.rounds))
            evaluated("baseline", last)
        return stages

    return listed


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], Any]:
    """Return the stored value of a golden file; with --update-golden, write it first."""

    def stored(name: str, current: Any) -> Any:
        path = GOLDEN_FOLDER / f"{name}.json"
        if request.config.getoption("--update-golden"):
            text = json.dumps(current, indent=1, sort_keys=True) + "\n"
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(text)
            temporary.replace(path)
        return json.loads(path.read_text())

    return stored
