"""The whole loop on a tiny world: what it computes, reuses, refuses, and why it ends."""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from safetensors.torch import save_file

from flows.config import SelfTrainingConfig
from flows.driving import RunDriver
from flows.evaluation import evaluate_model
from flows.labeling import label_corpus
from flows.run_status import RunStatus, read_status
from flows.self_training import self_training
from flows.server import wait_until_recorded
from flows.training import train_model
from models.description import weights_from_bytes
from storage.corpus import load_corpus
from storage.manifest import read_manifest, read_stored
from storage.predictions import DamagedPredictions, prediction_record
from storage.runs import RunExists, list_runs, read_events, read_run_config
from storage.store import CorruptObject, Store, open_store
from tasks import labeling
from tasks.classifiers import ClassesMismatch, model_manifest
from tasks.evaluation import read_evaluation_predictions
from tasks.importing import import_model
from tasks.labeling import LabelingConfig
from tasks.selection_summary import CollapsedSelection
from tasks.specifications import read_result
from tasks.training_orders import place_order

pytestmark = pytest.mark.usefixtures("prefect_api", "trained_here")

MakeConfig = Callable[..., SelfTrainingConfig]


@dataclass(frozen=True)
class Finished:
    """A run of two rounds, computed once; tests read it or add runs to its store."""

    store: Store
    folder: Path
    config: SelfTrainingConfig

    @property
    def status(self) -> RunStatus:
        return read_status(self.store, self.config.name)

    def fingerprint(self, kind: str, round_index: int) -> str:
        stages = self.status.rounds[round_index].stages
        return next(stage["fingerprint"] for stage in stages if stage["kind"] == kind)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    prefect_api: str,
    trained_here: list[str],
    tiny_config: MakeConfig,
) -> Finished:
    folder = tmp_path_factory.mktemp("finished") / "store"
    config = tiny_config(folder)
    self_training(config)
    return Finished(open_store(str(folder)), folder, config)


@pytest.fixture(autouse=True)
def _without_figures(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finished` has its report; drawing one for every run would take most of the time here."""
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    monkeypatch.setattr("flows.artifacts.show_figures", lambda store, status: None)


@pytest.fixture
def easy_data(tmp_path: Path, lab: Any, corpora_folder: Path) -> Path:
    """The corpora with a dev split that a teacher of 40 steps has all right."""
    folder = tmp_path / "easy"
    shutil.copytree(corpora_folder, folder)
    shutil.rmtree(folder / "dev")
    lab.write_split(folder / "dev", {"dev-0": lab.images_of("d", 30, start=9000)})
    return folder


def test_status_tells_of_every_round_and_the_chain_of_promoted_models(finished: Finished) -> None:
    status = finished.status

    assert (status.state, status.stop_reason) == ("done", "max_rounds")
    assert status.labels == {"labeled": 24, "dev": 15, "sum": 39}
    assert [one.round_index for one in status.rounds] == [0, 1, 2]
    assert [one.promoted for one in status.rounds] == [None, True, True]
    assert [[stage["kind"] for stage in one.stages] for one in status.rounds] == [
        ["train", "validate", "test"],
        ["label", "select", "train", "validate", "test", "promote"],
        ["label", "select", "train", "validate", "test", "promote"],
    ]
    assert {stage["state"] for one in status.rounds for stage in one.stages} == {"done"}
    assert status.model_fingerprint() == status.rounds[2].fingerprint
    dev_accuracies: list[float] = []
    for one in status.rounds:
        assert one.architecture == "small_cnn-4x1"
        assert one.dev_accuracy is not None
        assert one.dev_interval is not None
        dev_accuracies.append(one.dev_accuracy)
        assert 0 <= one.dev_interval[0] <= one.dev_accuracy <= one.dev_interval[1] <= 1
    # A teacher that has learned nothing has one third; 24 labels in 12 steps give more.
    assert dev_accuracies[0] > 0.4
    for one in status.rounds[1:]:
        assert one.pseudo_labels is not None
        assert one.pseudo_labels["unique"] <= one.pseudo_labels["kept"]
    assert status.baseline is not None
    assert [stage["kind"] for stage in status.baseline.stages] == ["train", "validate", "test"]


def test_each_stage_reads_what_the_stage_before_it_made(finished: Finished) -> None:
    store = finished.store
    for round_index, teacher_round in ((1, 0), (2, 1)):
        selection = read_result(store, "select", finished.fingerprint("select", round_index))
        student = read_result(store, "train", finished.fingerprint("train", round_index))
        promotion = read_result(store, "promote", finished.fingerprint("promote", round_index))
        assert selection is not None
        assert student is not None
        assert promotion is not None
        validation = finished.fingerprint("validate", teacher_round)
        assert selection.inputs["validation"].fingerprint == validation
        labels = finished.fingerprint("label", round_index)
        assert selection.inputs["labeling"].fingerprint == labels
        assert student.inputs["selection"].fingerprint == selection.fingerprint
        assert student.inputs["selection"].manifest_sha256 == selection.sha256
        assert promotion.inputs["teacher"].fingerprint == validation
        own = finished.fingerprint("validate", round_index)
        assert promotion.inputs["student"].fingerprint == own


def test_events_refer_to_a_stage_before_it_is_used(finished: Finished) -> None:
    events = read_events(finished.store, "tiny")
    stages = [
        ("train", "teacher", 0),
        ("validate", "teacher", 0),
        ("test", "teacher", 0),
        ("label", "label", 1),
        ("select", "select", 1),
        ("train", "student", 1),
        ("validate", "student", 1),
        ("test", "student", 1),
        ("promote", "promote", 1),
        ("label", "label", 2),
        ("select", "select", 2),
        ("train", "student", 2),
        ("validate", "student", 2),
        ("test", "student", 2),
        ("promote", "promote", 2),
        ("train", "baseline", 2),
        ("validate", "baseline", 2),
        ("test", "baseline", 2),
    ]
    first = events[: 2 * len(stages) + 2]  # other tests run it again

    assert (first[0]["type"], first[-1]["type"]) == ("run_started", "run_done")
    assert first[-1]["model"] == finished.status.rounds[2].fingerprint
    middle = [(e["type"], e["kind"], e["role"], e["round_index"]) for e in first[1:-1]]
    assert middle == [
        (type, *stage) for stage in stages for type in ("stage_referenced", "stage_done")
    ]
    for event in first[2:-1:2]:
        manifest = read_result(finished.store, event["kind"], event["fingerprint"])
        assert manifest is not None
        assert manifest.sha256 == event["manifest_sha256"]


def test_views_of_the_run_are_written(finished: Finished) -> None:
    run = finished.folder / "runs" / "tiny"

    assert json.loads((run / "run.json").read_text()) == finished.status.to_json()
    assert "<html" in (run / "report.html").read_text()
    pinned = read_run_config(finished.store, "tiny")
    assert pinned["pins"]["class_names"] == ["red", "green", "blue"]
    assert "store" not in pinned["config"], "a store may be moved"


def test_second_identical_run_reuses_every_stage_and_writes_nothing(
    finished: Finished, trained_here: list[str]
) -> None:
    before, num_trained = _computed(finished.folder), len(trained_here)

    state = self_training(finished.config, return_state=True)

    assert _computed(finished.folder) == before
    assert len(trained_here) == num_trained
    assert {s["state"] for one in finished.status.rounds for s in one.stages} == {"reused"}
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id is not None
    assert wait_until_recorded(str(flow_run_id), at_least=18)
    with get_client(sync_client=True) as client:
        one_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        names = [run.state_name for run in client.read_task_runs(flow_run_filter=one_run)]
    assert names == ["Reused"] * 18


def test_run_under_another_name_reuses_the_stages(
    finished: Finished, tiny_config: MakeConfig, trained_here: list[str]
) -> None:
    num_trained = len(trained_here)

    self_training(tiny_config(finished.folder, name="same-again"))

    assert len(trained_here) == num_trained
    again = read_status(finished.store, "same-again")
    assert again.model_url == finished.status.model_url
    assert again.state == "done"


def test_grown_corpus_costs_its_new_shard_in_round_1(
    finished: Finished, tiny_config: MakeConfig, corpora_folder: Path, tmp_path: Path, lab: Any
) -> None:
    data = tmp_path / "grown"
    shutil.copytree(corpora_folder, data)
    new = data / "unlabeled" / "unlabeled-new.tar"
    lab.write_shard(new, lab.images_of("n", 10, start=8000, labeled=False))
    before = _computed(finished.folder)

    self_training(
        tiny_config(finished.folder, "rounds=1", "baseline=false", name="grown", data=data)
    )

    after = _computed(finished.folder)
    assert {path: after[path] for path in before} == before
    grown = read_status(finished.store, "grown")
    states = {stage["kind"]: stage["state"] for stage in grown.rounds[0].stages}
    assert states == {"train": "reused", "validate": "reused", "test": "reused"}
    # The teacher's predictions gain one Parquet and one record; its student's have yet to come.
    added = sorted(path for path in after.keys() - before.keys() if path.startswith("predictions/"))
    pins = read_run_config(finished.store, "grown")["pins"]
    corpus = load_corpus(finished.store, pins["unlabeled"])
    digest = corpus.shard("unlabeled-new").digest
    assert len(corpus.shards) == 6
    assert [Path(path).name.startswith(digest) for path in added] == [True, True]
    labels = read_result(finished.store, "label", grown.rounds[1].stages[0]["fingerprint"])
    assert labels is not None
    assert labels.counts["samples"] == 60


def test_other_config_under_the_same_name_is_refused_naming_the_keys(
    finished: Finished, tiny_config: MakeConfig
) -> None:
    changed = tiny_config(finished.folder, "rounds=3", "student.noise.dropout=0.5")
    num_events = len(read_events(finished.store, "tiny"))

    with pytest.raises(RunExists) as refused:
        self_training(changed)

    assert "rounds is 2 there, 3 asked for" in str(refused.value)
    assert "student.noise.dropout is 0.2 there, 0.5 asked for" in str(refused.value)
    assert "another --name" in str(refused.value)
    assert len(read_events(finished.store, "tiny")) == num_events


def test_given_teacher_may_have_its_classes_in_another_order(
    finished: Finished, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    store = finished.store
    url = import_model(
        store,
        _reordered_teacher(finished, tmp_path, [2, 0, 1]),
        architecture="{kind: small_cnn, width: 4, depth: 1}",
        class_names=["blue", "red", "green"],
        image_size=8,
    )

    self_training(
        tiny_config(
            finished.folder,
            f"teacher={{kind: given, model: '{url}'}}",
            "rounds=1",
            "baseline=false",
            name="given",
        )
    )

    given = read_status(store, "given")
    assert given.rounds[0].fingerprint == url.rpartition("/")[2]
    assert given.rounds[0].architecture == "small_cnn-4x1"
    assert [stage["kind"] for stage in given.rounds[0].stages] == ["validate", "test"]
    assert given.rounds[0].dev_accuracy == finished.status.rounds[0].dev_accuracy
    ours = _dev_predictions(store, given)
    original = _dev_predictions(store, finished.status)
    assert ours.label.tolist() == original.label.tolist()
    assert ours.log_probs == pytest.approx(original.log_probs, abs=2e-3)
    # The student speaks the run's order again.
    assert given.model_fingerprint() == given.rounds[1].fingerprint


def test_given_teacher_of_other_classes_is_refused_before_anything_is_written(
    finished: Finished, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    url = import_model(
        finished.store,
        _reordered_teacher(finished, tmp_path, [0, 1, 2]),
        architecture="{kind: small_cnn, width: 4, depth: 1}",
        class_names=["red", "green", "cyan"],
        image_size=8,
    )
    config = tiny_config(
        finished.folder, f"teacher={{kind: given, model: '{url}'}}", name="mismatch"
    )

    with pytest.raises(ClassesMismatch, match=r"only in the corpus: blue; only in the model: cyan"):
        self_training(config)

    assert "mismatch" not in list_runs(finished.store)


def test_student_worse_than_its_teacher_ends_the_run_with_the_teacher_as_model(
    tiny_config: MakeConfig, easy_data: Path, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    config = tiny_config(
        tmp_path / "store",
        "teacher.duration.steps=40",
        "student.optimizer.lr=1e-12",  # it stays the random network that it begins as
        "student.ema=null",
        data=easy_data,
    )

    returned = self_training(config)

    status = read_status(store, "tiny")
    assert (status.state, status.stop_reason) == ("done", "no_gain")
    assert [one.promoted for one in status.rounds] == [None, False]
    assert status.model_fingerprint() == status.rounds[0].fingerprint
    assert status.baseline is not None, "the comparison is made all the same"
    assert read_events(store, "tiny")[-1]["round_index"] == 0
    assert returned == status.to_json()


def test_rounds_without_a_gain_in_dev_accuracy_end_the_run(
    finished: Finished, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = iter([0.5, 0.6, 0.6])
    validate = RunDriver.validate

    def planted_accuracy(driver: RunDriver, model: Any) -> float:
        validate(driver, model)
        return next(planted)

    monkeypatch.setattr(RunDriver, "validate", planted_accuracy)

    self_training(
        tiny_config(finished.folder, "rounds=3", "stop.patience_rounds=1", name="patient")
    )

    status = read_status(finished.store, "patient")
    assert (status.state, status.stop_reason) == ("done", "no_dev_gain")
    assert [one.round_index for one in status.rounds] == [0, 1, 2]
    assert status.model_fingerprint() == finished.status.model_fingerprint()


def test_damaged_predictions_of_a_finished_labelling_are_made_again_by_the_run(
    finished: Finished, tiny_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(finished.folder, folder)
    store = open_store(str(folder))
    labels = read_result(store, "label", finished.fingerprint("label", 1))
    assert labels is not None
    labeler, corpus = (labels.inputs[name].fingerprint for name in ("labeler", "corpus"))
    records = [
        prediction_record(store, labeler, shard.digest)
        for shard in load_corpus(store, corpus).shards
    ]
    objects = [folder / record["object"]["path"] for record in records]
    whole = {path: path.read_bytes() for path in objects}
    lost, flipped, *untouched = objects
    times = [path.stat().st_mtime_ns for path in untouched]
    lost.unlink()
    flipped.write_bytes(whole[flipped][:-20] + b"x" + whole[flipped][-19:])
    other_rules = ["rounds=1", "baseline=false", "selection.threshold.confidence=0.5"]

    self_training(tiny_config(folder, *other_rules, name="mended"))

    status = read_status(store, "mended")
    assert status.state == "done"
    stages = {stage["kind"]: stage["state"] for stage in status.rounds[1].stages}
    assert (stages["label"], stages["select"]) == ("reused", "done")
    assert {path: path.read_bytes() for path in objects} == whole
    assert [path.stat().st_mtime_ns for path in untouched] == times, "only what was damaged"
    assert read_result(store, "label", labels.fingerprint) == labels
    assert len([line for line in caplog.messages if "is withdrawn" in line]) == 2
    assert len([line for line in caplog.messages if "are made again" in line]) == 1


def test_damage_that_is_not_of_predictions_is_not_mended(
    finished: Finished, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(finished.folder, folder)
    for path in (folder / "evaluations").glob("*/predictions-*.parquet"):
        path.write_bytes(b"")
    other_rules = ["rounds=1", "baseline=false", "selection.threshold.confidence=0.5"]

    with pytest.raises(CorruptObject, match=r"evaluations/.*predictions-") as refused:
        self_training(tiny_config(folder, *other_rules, name="broken"))

    assert not isinstance(refused.value, DamagedPredictions)


def test_collapsed_selection_fails_the_run_with_its_table_and_goes_on_only_if_allowed(
    tiny_config: MakeConfig, easy_data: Path, tmp_path: Path, lab: Any
) -> None:
    store = open_store(str(tmp_path / "store"))
    shutil.rmtree(easy_data / "unlabeled")
    only_red = [(f"r{i}", lab.png(0, 7000 + i), None) for i in range(20)]
    lab.write_split(easy_data / "unlabeled", {"unlabeled-0": only_red})
    settings = ["rounds=1", "baseline=false", "teacher.duration.steps=40"]
    settings += ["selection.balance={kind: none}"]
    config = tiny_config(tmp_path / "store", *settings, data=easy_data)

    with pytest.raises(CollapsedSelection) as collapsed:
        self_training(config)

    message = str(collapsed.value)
    assert "class 'red' holds 100% of 20 selected items" in message
    assert "selection.allow_collapse=true" in message
    table = [line.split() for line in message.split("\n")[1:]]
    assert table[0] == ["class", "predicted", "unique", "copies"]
    assert table[1] == ["red", "20", "20", "20"]
    status = read_status(store, "tiny")
    assert status.state == "failed"
    assert status.model_fingerprint() == status.rounds[0].fingerprint

    allowed = [*settings, "selection.allow_collapse=true"]
    with pytest.raises(RunExists, match=r"selection\.allow_collapse is false there"):
        self_training(tiny_config(tmp_path / "store", *allowed, data=easy_data))
    self_training(tiny_config(tmp_path / "store", *allowed, name="allowed", data=easy_data))

    states = {
        stage["kind"]: stage["state"]
        for one in read_status(store, "allowed").rounds
        for stage in one.stages
        if one.round_index == 1
    }
    assert states["label"] == "reused"
    assert states["select"] == "done"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is what it is in a terminal, whatever code that ran here before has made of it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_labeling_ends_at_once_and_goes_on_where_it_was(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the main thread only; the threads that label must hear of it."""
    teacher = lab.train()
    label_shards = labeling.label_shards
    labeled: list[str] = []
    main_thread = threading.get_ident()

    def interrupting(store: Store, corpus: str, stems: list[str], *rest: Any, **more: Any) -> Any:
        for stem, num_samples in zip(
            stems, label_shards(store, corpus, stems, *rest, **more), strict=True
        ):
            labeled.append(stem)
            if len(labeled) == 2:
                # Unlike _thread.interrupt_main, this wakes a thread that waits.
                signal.pthread_kill(main_thread, signal.SIGINT)
            yield num_samples

    monkeypatch.setattr(labeling, "label_shards", interrupting)
    arguments: dict[str, Any] = {
        "store": lab.store.url,
        "model": teacher.fingerprint,
        "corpus": lab.unlabeled.digest,
        "config": LabelingConfig(shards_per_task=1),
        "class_names": list(lab.class_names),
    }

    with pytest.raises(KeyboardInterrupt):
        label_corpus(**arguments)

    assert 2 <= len(labeled) < 5
    assert read_result(lab.store, "label", _labeling(lab, teacher.fingerprint)) is None
    label_corpus(**arguments)
    assert labeled == [f"unlabeled-{i}" for i in range(5)], "no shard twice"
    assert read_result(lab.store, "label", _labeling(lab, teacher.fingerprint)) is not None


def test_training_as_a_flow_of_its_own_finishes_what_was_ordered(lab: Any) -> None:
    order = lab.order()
    fingerprint = order.specification.fingerprint
    with pytest.raises(ValueError, match="no training is ordered at"):
        train_model(lab.store.url, fingerprint)
    place_order(lab.store, order)

    reference = train_model(lab.store.url, fingerprint)

    manifest = read_manifest(lab.store, order.specification.folder)
    assert manifest is not None
    assert reference == {
        "kind": "train",
        "fingerprint": fingerprint,
        "manifest_sha256": manifest.sha256,
    }
    again = train_model(lab.store.url, fingerprint, return_state=True)
    assert again.name == "Reused"
    assert again.result() == reference


def test_evaluation_as_a_flow_of_its_own_is_the_stage_of_the_run(finished: Finished) -> None:
    pins = read_run_config(finished.store, "tiny")["pins"]
    model = finished.status.model_fingerprint()

    state = evaluate_model(finished.store.url, model, pins["test"], return_state=True)

    assert state.name == "Reused"
    found: Any = state.result()
    assert found["fingerprint"] == finished.fingerprint("test", 2)
    state = evaluate_model(
        finished.store.url, model, pins["labeled"], kind="validate", return_state=True
    )
    fresh: Any = state.result()
    report = read_result(finished.store, "validate", fresh["fingerprint"])
    assert report is not None
    assert report.counts["samples"] == 24


def test_evaluation_of_a_corpus_without_classes_is_refused(finished: Finished, lab: Any) -> None:
    plain = lab.write_split(
        lab.folder.parent / "plain", {"plain-0": lab.images_of("p", 3, start=1)}, class_names=None
    )
    corpus = lab.index_into(finished.store, plain)

    with pytest.raises(ValueError, match=r"no class names: write classes\.json"):
        evaluate_model(finished.store.url, finished.status.model_fingerprint(), corpus.digest)


def _computed(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of everything in a store but runs and what opening one leaves."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("runs", "probes", "corpora")
    }


def _reordered_teacher(finished: Finished, folder: Path, order: list[int]) -> str:
    """Write the finished run's first teacher with its outputs in another order."""
    manifest = model_manifest(finished.store, finished.fingerprint("train", 0))
    tensors = weights_from_bytes(read_stored(finished.store, manifest.object("model")))
    for name in ("backbone.fc.weight", "backbone.fc.bias"):
        tensors[name] = tensors[name][order].contiguous()
    path = folder / "teacher.safetensors"
    save_file(tensors, path)
    return str(path)


def _dev_predictions(store: Store, status: RunStatus) -> Any:
    stages = status.rounds[0].stages
    fingerprint = next(stage["fingerprint"] for stage in stages if stage["kind"] == "validate")
    manifest = read_result(store, "validate", fingerprint)
    assert manifest is not None
    return read_evaluation_predictions(store, manifest)


def _labeling(lab: Any, model: str) -> str:
    specification = labeling.specify(labeler=lab.labeler(model), corpus=lab.unlabeled.digest)
    return specification.fingerprint
