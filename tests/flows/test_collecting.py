"""Garbage collection: what runs need stays whole, and everything else goes."""

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.collecting import collect
from flows.config import SelfTrainingConfig
from flows.graph import RunGraph, model_of
from flows.loading import load_config
from flows.opening import OpenRun, open_run
from flows.planning import plan_run
from flows.run_references import UnreadableRun
from flows.run_status import read_status
from flows.self_training import self_training
from models.architectures import SmallCnnConfig
from models.description import ModelDescription, main_head
from storage.addresses import sha256_hex
from storage.checkpoints import save_checkpoint
from storage.manifest import InputReference, Manifest, commit_manifest, create_record, put_object
from storage.runs import append_event
from storage.store import Store, open_store
from tasks import materializing
from tasks.specifications import Specification
from tasks.teacher_views import Shown

MakeConfig = Callable[..., SelfTrainingConfig]

_TRAINING = (
    "{architecture: {kind: small_cnn, width: 4, depth: 1}, image_size: 8, batch_size: 6,"
    " duration: {steps: 12}}"
)
_UNITS = ("models", "predictions", "labelings", "descriptors", "guards", "selections", "compact")
_PREFIXES = tuple(f"{folder}/" for folder in (*_UNITS, "evaluations", "corpora", "data"))
_SPEC = Specification("train", 1, {"role": "teacher", "round_index": 0}, {"labeled": "1" * 64})


@dataclass(frozen=True)
class Scenario:
    """One run of a store, and how far it came.

    Attributes:
        seed: runs of one seed share stages.
        rounds: of the config.
        ends_after: round whose student is not promoted, if that is before the last.
        share_done: of its stages; 1 finishes it.
        is_guarded: it looks for leaks.
        has_compact: it wrote compact shards of its selections.
        has_given_teacher: the model of the first run's first student, if there is one.
        is_deleted: its folder is deleted afterwards.
    """

    seed: int
    rounds: int
    ends_after: int
    share_done: float
    is_guarded: bool
    has_compact: bool
    has_given_teacher: bool
    is_deleted: bool


SCENARIOS = st.lists(
    st.builds(
        Scenario,
        seed=st.integers(0, 1),
        rounds=st.integers(1, 2),
        ends_after=st.integers(1, 2),
        share_done=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.0]),
        is_guarded=st.booleans(),
        has_compact=st.booleans(),
        has_given_teacher=st.booleans(),
        is_deleted=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


# Without shrinking, which would build stores for minutes.
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(scenarios=SCENARIOS)
def test_every_run_keeps_all_it_needs_and_nothing_else_stays(
    corpora_folder: Path, scenarios: list[Scenario]
) -> None:
    """What is needed is worked out here by walking runs as the method does, not by `stages_of`."""
    store = open_store(f"memory://{uuid.uuid4().hex}/store")
    needed: set[str] = set()
    given_teacher: str | None = None
    for number, scenario in enumerate(scenarios):
        name = f"run-{number}"
        model = given_teacher if scenario.has_given_teacher else None
        run = open_run(store, _config(corpora_folder, name, scenario, model))
        executed = _execute(run, scenario)
        if not scenario.is_deleted:
            is_done = scenario.share_done == 1
            walks = executed if is_done else [s for end in (1, 2) for s in _walk(run, end)]
            for one in walks:
                needed |= _names(one)
            pins = run.pins
            corpora = (pins.labeled, pins.dev, pins.test, pins.unlabeled, pins.given_teacher)
            needed |= {digest for digest in corpora if digest is not None}
        else:
            for path in store.list(f"runs/{name}"):
                store.delete(path)
        students = [s for s in executed if s.kind == "train" and s.settings["role"] == "student"]
        if given_teacher is None and students:
            given_teacher = students[0].fingerprint
    before = _contents(store)

    listed = collect(store, older_than_seconds=0, delete=False)
    assert _contents(store) == before
    deleted = collect(store, older_than_seconds=0, delete=True)

    expected = {path: data for path, data in before.items() if _name_of(path) in needed}
    assert _contents(store) == expected
    assert [unit.path for unit in listed.units] == [unit.path for unit in deleted.units]
    assert deleted.skipped == {}


def test_a_run_that_begins_while_it_deletes_keeps_what_it_uses(corpora_folder: Path) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/store")
    run = open_run(store, _config(corpora_folder, "old", _DONE, None))
    executed = _execute(run, _DONE)
    record = store.read("runs/old/config.json")
    for path in store.list("runs/old"):
        store.delete(path)
    before = _contents(store)

    def begin(done: int, total: int) -> None:
        if done == 1:  # exactly this run again: it will find the stages that are still there
            store.put("runs/new/config.json", record)

    found = collect(store, older_than_seconds=0, delete=True, progress=begin)

    first = found.units[0].path
    left = _contents(store)
    assert {path for path in before if path not in left} == {
        path for path in before if path.startswith(first)
    }
    assert set(found.skipped.values()) == {"a run refers to it now"}
    assert len(found.skipped) == len(found.units) - 1
    assert len(executed) > 5


def test_an_event_that_is_appended_while_it_deletes_counts(corpora_folder: Path) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/store")
    _execute(open_run(store, _config(corpora_folder, "gone", _DONE, None)), _DONE)
    for path in store.list("runs/gone"):
        store.delete(path)
    units = [unit.path for unit in collect(store, older_than_seconds=0, delete=False).units]
    last = next(path for path in reversed(units) if path.startswith("selections/"))

    def refer(done: int, total: int) -> None:
        if done == 1:
            append_event(store, "other", "stage_referenced", fingerprint=last.split("/")[1])

    found = collect(store, older_than_seconds=0, delete=True, progress=refer)

    assert found.skipped[last] == "a run refers to it now"
    assert store.list(last)


def test_what_is_written_again_while_it_deletes_is_kept() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/store")
    for number in (1, 2):
        put_object(store, f"models/{number:064x}", "model", b"weights", "safetensors")

    def write_again(done: int, total: int) -> None:
        if done == 1:
            put_object(store, f"models/{2:064x}", "model", b"weights", "safetensors")

    found = collect(store, older_than_seconds=0, delete=True, progress=write_again)

    assert found.skipped == {f"models/{2:064x}": "it was written to meanwhile"}
    assert not store.list(f"models/{1:064x}")
    assert store.list(f"models/{2:064x}")


def test_what_is_young_is_kept_with_all_that_it_refers_to(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    corpus, model = "c" * 64, _SPEC
    create_record(store, f"corpora/{corpus}.json", {"schema": 1})
    evaluation = Specification("validate", 1, {}, {"model": model.fingerprint, "corpus": corpus})
    lone = Specification("validate", 1, {"lone": True}, {"model": "e" * 64, "corpus": corpus})
    for one in (model, evaluation, lone):
        _commit(store, one)
    _age(store, days=30)
    _age(store, days=0.5, folder=evaluation.folder)

    found = collect(store, older_than_seconds=86_400, delete=True)

    assert [unit.path for unit in found.units] == [lone.folder]
    assert (found.num_referenced, found.num_young) == (2, 1)
    assert store.exists(f"corpora/{corpus}.json")
    assert store.exists(f"{model.folder}/manifest.json")


def test_a_finished_model_does_not_keep_what_it_was_trained_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    selection = Specification("select", 1, {}, {"labeling": "a" * 64})
    trained = Specification("train", 1, {}, {"selection": selection.fingerprint})
    ordered = Specification("train", 1, {"other": 1}, {"selection": "b" * 64})
    for one in (selection, trained):
        _commit(store, one)
    put_object(store, f"selections/{'b' * 64}", "summary", b"{}", "json")
    create_record(store, f"{ordered.folder}/specification.json", {"inputs": dict(ordered.inputs)})
    append_event(store, "nightly", "stage_referenced", fingerprint=trained.fingerprint)
    append_event(store, "nightly", "stage_referenced", fingerprint=ordered.fingerprint)
    _age(store, days=30)

    found = collect(store, older_than_seconds=0, delete=True)

    # The one that is only ordered needs its selection; the finished one's is history.
    assert [unit.path for unit in found.units] == [selection.folder]
    assert store.list(trained.folder)
    assert store.list(f"selections/{'b' * 64}")


def test_digits_that_a_run_made_stay_while_a_corpus_that_is_needed_lies_there(
    tmp_path: Path,
) -> None:
    store = open_store(str(tmp_path / "store"))
    used, unused = (f"data/digits-{12 * letter}" for letter in "ab")
    for folder in (used, unused):
        for name in ("labeled-000000.tar", "prepared.txt"):
            store.put(f"{folder}/{name}", b"x")
    corpus = "c" * 64
    located = {"labeled-000000": store.url_of(f"{used}/labeled-000000.tar")}
    create_record(store, f"corpora/{corpus}.json", {"schema": 1})
    create_record(store, f"corpora/{corpus}.locations.json", {"locations": located})
    append_event(store, "mine", "stage_referenced", fingerprint=corpus)
    _age(store, days=30)

    found = collect(store, older_than_seconds=0, delete=True)

    assert [unit.path for unit in found.units] == [unused]
    assert store.exists(f"{used}/labeled-000000.tar")


def test_imported_models_stay_although_no_run_has_them(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    imported = Specification("import", 1, {}, {})
    for one in (imported, _SPEC):
        _commit(store, one)
    _age(store, days=30)

    assert [unit.path for unit in collect(store, older_than_seconds=0, delete=True).units] == [
        _SPEC.folder
    ]
    assert store.exists(f"{imported.folder}/manifest.json")


def test_what_kills_left_goes_and_the_checkpoints_of_a_begun_training_stay(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    begun = Specification("train", 1, {"begun": True}, {})
    for one in (_SPEC, begun):
        append_event(store, "mine", "stage_referenced", fingerprint=one.fingerprint)
        save_checkpoint(store, one.fingerprint, "attempt", 5, b"tensors", {})
    _commit(store, _SPEC)
    store.put("probes/killed", b"x")
    temporary = tmp_path / "store" / "models" / ".tmp-killed"
    temporary.write_bytes(b"half")
    mine = tmp_path / "store" / "data" / "mine.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"a shard of the user's")
    _age(store, days=30)
    of_a_writer = temporary.with_name(".tmp-written-now")
    of_a_writer.write_bytes(b"ha")

    found = collect(store, older_than_seconds=86_400, delete=True)

    assert [unit.path for unit in found.units] == [f"{_SPEC.folder}/attempts", "probes/killed"]
    assert found.temporary == ["models/.tmp-killed"]
    assert not temporary.exists()
    assert of_a_writer.exists(), "its writer is still at it"
    assert mine.exists()
    assert not store.list(f"{_SPEC.folder}/attempts")
    assert store.exists(f"{_SPEC.folder}/manifest.json")
    assert store.list(f"{begun.folder}/attempts")


@pytest.mark.parametrize("damaged", ["config.json", "events"])
def test_beside_a_run_that_cannot_be_read_nothing_is_deleted(
    corpora_folder: Path, damaged: str
) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/store")
    _execute(open_run(store, _config(corpora_folder, "mine", _DONE, None)), _DONE)
    path = next(path for path in store.list("runs/mine") if damaged in path)
    store.replace(path, b'{"sha256": "0"}')
    _commit(store, _SPEC)

    with pytest.raises(UnreadableRun, match=r"run 'mine'.*nothing is deleted"):
        collect(store, older_than_seconds=0, delete=True)
    assert store.exists(f"{_SPEC.folder}/manifest.json")


def test_a_unit_loses_its_commit_first(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}/store")
    _commit(store, _SPEC)
    create_record(store, f"{_SPEC.folder}/specification.json", {"inputs": {}})
    gone: list[str] = []
    monkeypatch.setattr(Store, "delete", lambda self, path: gone.append(path))

    collect(store, older_than_seconds=0, delete=True)

    of_unit = [path.rpartition("/")[2] for path in gone if path.startswith("models/")]
    assert of_unit[:2] == ["manifest.json", "specification.json"]
    assert of_unit[2].startswith("data-")


def test_the_command_lists_and_then_deletes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    _commit(store, _SPEC)
    _age(store, days=8)
    option = f"--store={store.url}"

    listed = json.loads(_invoke("gc", option, "--json").stdout)
    assert {"schema", "store", "older_than_seconds", "deleted", "units", "temporary", "kept"} <= (
        listed.keys()
    )
    assert (listed["deleted"], listed["older_than_seconds"]) == (False, 7 * 86_400)
    unit = listed["units"][0]
    assert (unit["path"], unit["objects"], unit["skipped"]) == (_SPEC.folder, 2, None)
    assert unit["bytes"] == listed["bytes"] > 0
    assert json.loads(_invoke("gc", option, "--older-than=9d", "--json").stdout)["units"] == []
    assert "nothing was deleted: --delete does" in _invoke("gc", option).stdout
    assert store.list("models")

    deleted = _invoke("gc", option, "--delete", "--older-than=30m")
    assert "1 units" in deleted.stdout
    assert "leaves no time" in deleted.stderr
    assert store.list("models") == []
    assert "a number and s, m, h or d" in _invoke("gc", option, "--older-than=7", expect=2).output


@pytest.mark.slow
def test_real_runs_resume_with_every_stage_reused(
    tmp_path: Path, prefect_api: str, trained_here: list[str], tiny_config: MakeConfig
) -> None:
    store = open_store(str(tmp_path / "store"))
    kept = tiny_config(store.url, "rounds=1", name="kept")
    # Another seed shares no stage; so short a training labels badly, which is no matter here.
    lenient = ("baseline=false", "selection.allow_collapse=true")
    other = tiny_config(store.url, "rounds=1", "seed=1", *lenient, name="other")
    self_training(kept)
    self_training(other)
    lost = [stage for one in read_status(store, "other").rounds for stage in one.stages]
    for path in store.list("runs/other"):
        store.delete(path)
    _age(store, days=30)

    found = collect(store, older_than_seconds=86_400, delete=True)

    gone = {unit.path.split("/")[1] for unit in found.units if "/" in unit.path}
    assert {stage["fingerprint"] for stage in lost} <= gone
    assert {stage.state for stage in plan_run(store, kept)} == {"reused"}
    trained_here.clear()
    self_training(kept)
    status = read_status(store, "kept")
    stages = [s for one in (*status.rounds, status.baseline) if one for s in one.stages]
    assert {stage["state"] for stage in stages} == {"reused"}
    assert trained_here == []


@pytest.mark.s3
def test_on_s3_the_same_is_found_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    from storage.file_systems import file_system_of

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        file_system_of("s3").call_s3("create_bucket", Bucket="garbage")
        store = open_store("s3://garbage/prefix")
        other = Specification("train", 1, {"other": True}, {})
        for one in (_SPEC, other):
            _commit(store, one)
        append_event(store, "mine", "stage_referenced", fingerprint=other.fingerprint)

        assert collect(store, older_than_seconds=3600, delete=True).num_young == 1
        # S3 tells times in whole seconds; an hour later by its clock.
        monkeypatch.setattr("flows.collecting.time_of", lambda _: time.time() + 3600)
        found = collect(store, older_than_seconds=60, delete=True)

        assert [unit.path for unit in found.units] == [_SPEC.folder]
        assert [path.split("/")[1] for path in store.list("models")] == [other.fingerprint] * 2
    finally:
        server.stop()


_DONE = Scenario(0, 1, 1, 1.0, True, True, False, False)


def _config(
    folder: Path, name: str, scenario: Scenario, given_teacher: str | None
) -> SelfTrainingConfig:
    guard = "near_duplicates" if scenario.is_guarded else "none"
    teacher = f"teacher={_TRAINING}"
    if given_teacher is not None:
        teacher = f"teacher={{kind: given, model: models/{given_teacher}}}"
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.yaml"
        path.write_text(
            f"name: {name}\nseed: {scenario.seed}\nrounds: {scenario.rounds}\n"
            f"data: {{root: '{folder}', labeled: labeled, dev: dev, test: test,"
            f" unlabeled: unlabeled}}\nteacher: {_TRAINING}\nstudent: {_TRAINING}\n"
            f"selection: {{leak_guard: {{kind: {guard}}}}}\n"
        )
        return load_config(str(path), overrides=[teacher])


def _graph(run: OpenRun) -> RunGraph:
    view = Shown(8, 0, "bilinear") if run.pins.given_teacher is not None else None
    return RunGraph(run.config, run.pins, view)


def _walk(run: OpenRun, ends_after: int) -> Iterator[Specification]:
    """Yield the stages of a run in its order, as flows/self_training.py goes through them."""
    graph = _graph(run)
    teacher = graph.first_model()
    yield from (training.specification for training in graph.teacher())
    yield graph.evaluate("validate", teacher)
    yield graph.evaluate("test", teacher)
    for round_index in range(1, run.config.rounds + 1):
        guard = graph.guard()
        if guard is not None:
            yield guard
        yield graph.label(teacher)
        yield graph.select(teacher, round_index)
        yield from (training.specification for training in graph.student(teacher, round_index))
        student = graph.student_model(teacher, round_index)
        yield graph.evaluate("validate", student)
        yield graph.evaluate("test", student)
        yield graph.promote(teacher, student)
        teacher = student
        if round_index == ends_after:
            break
    trainings = graph.baseline(min(ends_after, run.config.rounds))
    yield from (training.specification for training in trainings)
    yield graph.evaluate("validate", model_of(trainings))
    yield graph.evaluate("test", model_of(trainings))


def _execute(run: OpenRun, scenario: Scenario) -> list[Specification]:
    """Commit a share of a run's stages as the driver does; return those that it referred to."""
    stages = list(_walk(run, scenario.ends_after))
    chosen = stages[: round(scenario.share_done * len(stages))]
    for one in chosen:
        append_event(
            run.store, run.name, "stage_referenced", kind=one.kind, fingerprint=one.fingerprint
        )
        _commit(run.store, one)
        if one.kind == "select" and scenario.has_compact:
            _commit(run.store, materializing.specify(one.fingerprint))
    if scenario.share_done == 1:
        model = next(s for s in reversed(chosen) if s.kind == "train")
        append_event(run.store, run.name, "run_done", model=model.fingerprint)
    return chosen


def _commit(store: Store, one: Specification) -> None:
    """Write what a finished stage leaves, with contents of no meaning."""
    stored = put_object(store, one.folder, "data", one.fingerprint.encode(), "bin")
    objects = [stored]
    if one.kind == "train" and one.settings.get("class_names"):
        description = ModelDescription(
            architecture=SmallCnnConfig(width=4, depth=1),
            heads=main_head(tuple(one.settings["class_names"])),
            image_size=8,
        ).to_json()
        objects.append(put_object(store, one.folder, "description", description, "json"))
    for part, role in (("predictions", "labeler"), ("descriptors", "descriptor")):
        if role in one.inputs:
            folder = f"{part}/{one.inputs[role]}"
            shard = put_object(store, folder, "f" * 64, one.inputs[role].encode(), "parquet")
            create_record(store, f"{folder}/{'f' * 64}.json", {"object": shard.path})
    manifest = Manifest(
        kind=one.kind,
        fingerprint=one.fingerprint,
        stage_version=one.version,
        settings=one.settings,
        inputs={role: InputReference(name, "0" * 64) for role, name in one.inputs.items()},
        objects=tuple(objects),
    )
    commit_manifest(store, one.folder, manifest)


def _names(one: Specification) -> set[str]:
    compact = {materializing.specify(one.fingerprint).fingerprint} if one.kind == "select" else {""}
    return {one.fingerprint, *one.inputs.values()} | compact


def _name_of(path: str) -> str:
    return path.split("/")[1].partition(".")[0]


def _contents(store: Store) -> dict[str, str]:
    """Return path -> checksum of all objects of stages and corpora; views of patterns apart."""
    return {
        path: sha256_hex(store.read(path))
        for path in store.list()
        if path.startswith(_PREFIXES) and not path.startswith("corpora/index-")
    }


def _age(store: Store, *, days: float, folder: str = "") -> None:
    """Make a local store's files look old, temporary ones included."""
    then = time.time() - 86_400 * days
    for file in (Path(store.url) / folder).rglob("*"):
        if file.is_file():
            os.utime(file, (then, then))


def _invoke(*arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == expect, (result.output, result.exception)
    return result
