"""Opening a run: what it pins, what resume obeys, and data that is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.config import SelfTrainingConfig
from flows.loading import ConfigError
from flows.opening import (
    MACHINE_SETTINGS,
    open_run,
    reopen_run,
    reopened_config,
    resolve_inputs,
)
from storage.corpus import EmptyCorpus, MissingShard, load_corpus, load_locations, read_samples
from storage.manifest import UnknownSchema, read_stored, sealed
from storage.runs import RunExists, UnknownRun, read_run_config
from storage.samples import CorruptShard
from tasks.classifiers import ClassesMismatch, UnknownModel
from tasks.initial_weights import WeightsMismatch, initial_weights_path
from tasks.launching import ExternalLaunch, LocalLaunch

TRAINING = {
    "architecture": {"kind": "small_cnn", "width": 4, "depth": 1},
    "image_size": 8,
    "batch_size": 6,
    "duration": {"steps": 12},
}


def config_of(folder, **changes):
    document = {
        "name": "tiny",
        "rounds": 2,
        "data": {
            "root": str(folder),
            "labeled": "labeled",
            "dev": "dev",
            "test": "test",
            "unlabeled": "unlabeled",
        },
        "teacher": TRAINING,
        "student": TRAINING,
    }
    return SelfTrainingConfig.model_validate(document | changes)


@pytest.fixture
def data(lab, tmp_path):
    """A copy of the corpora that a test may damage."""
    folder = tmp_path / "data"
    shutil.copytree(lab.folder, folder)
    return folder


@pytest.fixture
def store(lab, tmp_path):
    return lab.in_empty_store(tmp_path / "run-store").store


def refused(store, folder, error, **changes):
    with pytest.raises(error) as caught:
        open_run(store, config_of(folder, **changes))
    assert not Path(store.url, "runs").exists(), "a refused run leaves no name behind"
    return str(caught.value)


def test_a_run_pins_its_inputs_by_content(lab, store, data):
    run = open_run(store, config_of(data))
    assert run.pins.labeled == lab.labeled.digest
    assert run.pins.dev == lab.dev.digest
    assert run.pins.test == lab.test.digest
    assert run.pins.unlabeled == lab.unlabeled.digest
    assert run.pins.class_names == ("red", "green", "blue")
    assert run.pins.given_teacher is None
    assert run.num_labeled == 24
    assert run.name == "tiny"


def test_opening_again_is_going_on(store, data):
    first = open_run(store, config_of(data))
    assert open_run(store, config_of(data)) == first
    assert reopen_run(store, "tiny") == first


def test_the_store_is_not_part_of_the_pinned_config(store, data):
    open_run(store, config_of(data, store="/one/place"))
    assert open_run(store, config_of(data, store="/another")).config.store is None
    assert "store" not in read_run_config(store, "tiny")["config"]


def test_the_root_stands_before_every_relative_entry_of_a_pattern(lab, store, data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("labeled-2.tar", "classes.json"):
        shutil.copy(data / "labeled" / name, elsewhere / name)
    (data / "labeled" / "labeled-2.tar").unlink()
    changed = config_of(data).data.model_dump() | {
        "labeled": f"labeled/labeled-0.tar, labeled/labeled-{{1..1}}.tar,{elsewhere}/labeled-2.tar"
    }
    run = open_run(store, config_of(data, data=changed))
    assert run.pins.labeled == lab.labeled.digest


def test_another_config_under_the_same_name_names_the_keys(store, data):
    open_run(store, config_of(data))
    with pytest.raises(RunExists) as caught:
        open_run(store, config_of(data, rounds=3, student=TRAINING | {"batch_size": 8}))
    message = str(caught.value)
    assert "config.rounds is 2 there, 3 asked for" in message
    assert "config.student.batch_size is 6 there, 8 asked for" in message
    assert "--name" in message


def test_a_run_goes_on_under_other_machine_settings_and_keeps_its_pins(store, data, tmp_path):
    first = open_run(store, config_of(data))
    moved = {
        "device": "cpu",
        "cache": {"dir": str(tmp_path / "cache"), "max_bytes": 2**30},
        "loader_threads": 3,
        "materialize": "never",
        "launch": {"kind": "local", "processes": 2},
        "engine": {"kind": "local", "processes": 0, "threads": 1},
        "trackers": [{"kind": "tensorboard", "folder": "board"}],
    }
    assert moved.keys() == set(MACHINE_SETTINGS)
    second = open_run(store, config_of(data, **moved))
    assert second.pins == first.pins
    assert second.config.model_dump(mode="json", include=set(moved)) == moved
    rest = set(SelfTrainingConfig.model_fields) - set(moved)
    assert second.config.model_dump(include=rest) == first.config.model_dump(include=rest)
    assert reopen_run(store, "tiny") == first  # the next attempt begins with what was pinned
    with pytest.raises(RunExists) as caught:
        open_run(store, config_of(data, rounds=3, **moved))
    assert "config.rounds is 2 there, 3 asked for." in str(caught.value)
    assert "launch" not in str(caught.value)  # what may differ is not held against it


def test_resume_takes_machine_settings_and_no_others(store, data):
    open_run(store, config_of(data, loader_threads=5))
    config = reopened_config(store, "tiny", ["launch.processes=2", "cache=null", "device=cpu"])
    assert (config.launch, config.device) == (LocalLaunch(processes=2), "cpu")
    assert config.loader_threads == 5
    assert open_run(store, config).config == config
    assert reopened_config(store, "tiny", []) == reopen_run(store, "tiny").config
    external = reopened_config(store, "tiny", ["launch.kind=external", "launch.poll_seconds=1"])
    assert external.launch == ExternalLaunch(poll_seconds=1)
    with pytest.raises(ConfigError, match=r"--set student\.batch_size=8: a run keeps its config"):
        reopened_config(store, "tiny", ["student.batch_size=8"])
    with pytest.raises(ConfigError, match=r"launch\.processes=5 does not fit teacher"):
        reopened_config(store, "tiny", ["launch.processes=5"])


def test_resume_obeys_the_pins_and_not_what_urls_hold_today(lab, store, data):
    first = open_run(store, config_of(data))
    # Tonight the corpus grew, and the labelled shards were written anew.
    lab.write_shard(data / "unlabeled" / "more-0.tar", lab.images_of("m", 5, start=8000))
    lab.write_shard(data / "labeled" / "labeled-0.tar", lab.images_of("n", 8, start=8100))
    again = open_run(store, config_of(data))
    assert again.pins == first.pins
    corpus = load_corpus(store, again.pins.unlabeled or "")
    assert corpus.num_samples == 50
    # What has changed under the pins is never read as if it had not.
    labeled = load_corpus(store, again.pins.labeled)
    locations = load_locations(store, again.pins.labeled)
    with pytest.raises(CorruptShard, match=r"shard labeled-0 at .* is not what was indexed"):
        read_samples(labeled, locations, "labeled-0")
    assert len(read_samples(labeled, locations, "labeled-1")) == 8
    # A new run sees the new data.
    new = open_run(store, config_of(data, name="tonight"))
    assert load_corpus(store, new.pins.unlabeled or "").num_samples == 55
    assert new.pins.labeled != first.pins.labeled
    assert new.pins.dev == first.pins.dev


def test_shards_may_move_between_runs(store, data, tmp_path):
    first = open_run(store, config_of(data))
    moved = tmp_path / "moved"
    data.rename(moved)
    second = open_run(store, config_of(moved, name="second"))
    assert second.pins == first.pins
    # Both runs find the shards where they lie now.
    corpus = load_corpus(store, first.pins.unlabeled or "")
    assert read_samples(corpus, load_locations(store, corpus.digest), "unlabeled-0")


def test_an_unknown_run_lists_the_known_ones(store, data):
    open_run(store, config_of(data))
    with pytest.raises(UnknownRun, match=r"no run 'other' .*known runs: tiny"):
        reopen_run(store, "other")


@pytest.mark.parametrize("place", ["pins", "config"])
def test_a_run_of_a_newer_version_is_not_guessed_at(store, data, place):
    open_run(store, config_of(data))
    body = read_run_config(store, "tiny")
    if place == "pins":
        body["schema"] = 2
    else:
        body["config"]["schema"] = 2
    store.replace("runs/tiny/config.json", sealed(body))
    with pytest.raises(UnknownSchema, match="newer selftrain: upgrade"):
        reopen_run(store, "tiny")


def test_a_pinned_config_without_a_later_option_is_read_with_its_default(store, data):
    open_run(store, config_of(data))
    body = read_run_config(store, "tiny")
    del body["config"]["stop"]
    store.replace("runs/tiny/config.json", sealed(body))
    assert open_run(store, config_of(data)).config.stop.patience_rounds is None


# Data that is refused.


def test_a_class_without_any_label_is_named(lab, store, data):
    shutil.rmtree(data / "labeled")
    samples = [s for s in lab.images_of("l", 24, start=0) if s[2] != 1]
    lab.write_split(data / "labeled", {"labeled-0": samples})
    message = refused(store, data, ValueError)
    assert "data.labeled: 1 of 3 classes have no label: green." in message
    assert "label some images, or take the classes out of classes.json" in message


def test_a_dev_split_may_lack_a_class(lab, store, data):
    shutil.rmtree(data / "dev")
    samples = [s for s in lab.images_of("d", 15, start=1000) if s[2] != 1]
    lab.write_split(data / "dev", {"dev-0": samples})
    assert open_run(store, config_of(data)).num_labeled == 24


@pytest.mark.parametrize("split", ["labeled", "dev", "test"])
def test_a_sample_without_a_label_in_a_labelled_split_is_counted(lab, store, data, split):
    samples = lab.images_of("x", 6, start=500)
    samples[2] = (*samples[2][:2], None)
    lab.write_shard(data / split / f"{split}-9.tar", samples)
    message = refused(store, data, ValueError)
    assert f"data.{split}: 1 of " in message
    assert "samples have no .cls member" in message


@pytest.mark.parametrize("split", ["labeled", "dev", "test", "unlabeled"])
def test_a_split_without_any_sample_names_its_key(lab, store, data, split):
    shutil.rmtree(data / split)
    lab.write_split(data / split, {"empty-0": []})
    message = refused(store, data, EmptyCorpus)
    assert f"data.{split} = '{split}'" in message
    assert "no sample; check the shard pattern" in message


@pytest.mark.parametrize("split", ["labeled", "dev", "test", "unlabeled"])
def test_a_folder_without_shards_names_its_key(store, data, split):
    shutil.rmtree(data / split)
    (data / split).mkdir()
    message = refused(store, data, ValueError)
    assert f"data.{split}: no shard: the folder" in message
    assert "holds no .tar file" in message


def test_a_pattern_that_matches_nothing_names_its_key(store, data):
    changed = config_of(data).data.model_dump() | {"unlabeled": "unlabeled/nothing-*.tar"}
    message = refused(store, data, ValueError, data=changed)
    assert "data.unlabeled: no shard: nothing matches" in message


def test_a_missing_shard_names_shard_place_and_remedy(store, data):
    changed = config_of(data).data.model_dump() | {"unlabeled": "unlabeled/unlabeled-{0..5}.tar"}
    message = refused(store, data, MissingShard, data=changed)
    assert f"shard unlabeled-5: nothing at {data}/unlabeled/unlabeled-5.tar" in message
    assert "Correct the pattern, or put the shard there" in message


def test_a_cut_shard_names_shard_and_remedy(store, data):
    shard = data / "unlabeled" / "unlabeled-3.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    message = refused(store, data, CorruptShard)
    assert "shard unlabeled-3: cut at byte 3000" in message
    assert "Copy the shard again" in message


def test_an_index_that_is_not_there_names_its_key_and_the_command(store, data):
    changed = config_of(data).data.model_dump() | {"unlabeled": "unlabeled/index.json"}
    message = refused(store, data, FileNotFoundError, data=changed)
    assert "data.unlabeled = 'unlabeled/index.json': no index at" in message
    assert "selftrain data index" in message


@pytest.mark.parametrize(
    ("first", "second"), [("labeled", "dev"), ("labeled", "test"), ("dev", "unlabeled")]
)
def test_splits_that_share_a_shard_are_refused(store, data, first, second):
    source = next((data / first).glob("*.tar"))
    shutil.copy(source, data / second / "copy-of-it.tar")
    message = refused(store, data, ValueError)
    assert f"is in data.{first} and in data.{second}: splits must not share images" in message
    assert "shard copy-of-it" in message


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_split_of_other_classes_names_key_and_classes(store, data, split):
    body = {"schema": 1, "class_names": ["red", "green", "violet"]}
    (data / split / "classes.json").write_text(json.dumps(body))
    message = refused(store, data, ClassesMismatch)
    assert f"data.{split}: " in message
    assert "only in the corpus: violet; only in the model: blue" in message
    assert "rename them (classes.json beside the shards" in message


@pytest.mark.parametrize("split", ["labeled", "dev", "test"])
def test_a_labelled_split_without_class_names_says_where_to_write_them(store, data, split):
    (data / split / "classes.json").unlink()
    message = refused(store, data, ValueError)
    assert f"data.{split}" in message
    assert "no classes.json beside the shards, so class numbers have no names" in message


def test_a_corpus_to_label_needs_no_class_names(store, data):
    (data / "unlabeled" / "classes.json").unlink()
    run = open_run(store, config_of(data))
    assert load_corpus(store, run.pins.unlabeled or "").class_names is None


def test_a_label_beyond_the_class_names_is_refused(store, data):
    (data / "dev" / "classes.json").write_text('{"schema": 1, "class_names": ["red", "green"]}')
    message = refused(store, data, ValueError)
    assert "class number 2 has no name: there are 2 class names" in message


def test_without_a_test_split_nothing_is_pinned_for_it(store, data):
    changed = config_of(data).data.model_dump() | {"test": None}
    assert open_run(store, config_of(data, data=changed)).pins.test is None


@pytest.mark.parametrize(
    ("section", "duration", "warmup"),
    [
        # 24 labels, 6 a step: 2.5 epochs are 10 steps, 70 samples are 11.
        ("student", {"steps": 10}, {"labeled_epochs": 2.5}),
        ("teacher", {"labeled_epochs": 2.5}, {"samples_seen": 70}),
    ],
)
def test_a_warmup_as_long_as_its_training_is_found_before_anything_is_computed(
    store, data, section, duration, warmup
):
    training = TRAINING | {"duration": duration, "warmup": warmup}
    message = refused(store, data, ValueError, **{section: training})
    assert f"{section}.warmup is 1" in message
    assert "24 images of data.labeled" in message
    assert "shorten the warm-up or lengthen the training" in message


def test_a_calibration_that_the_predictions_cannot_have_is_found_before_anything_is_computed(
    store, data
):
    uncalibrated = {"labeling": {"form": "top_k", "k": 2}, "selection": {"calibration": "none"}}
    message = refused(store, data, ValueError, **uncalibrated)
    assert "selection.calibration=none with predictions of the top_k form" in message


# A given teacher.


def given(model):
    return {"teacher": {"kind": "given", "model": model}}


def test_a_given_teacher_is_pinned_by_its_fingerprint(pipeline, data):
    store, teacher = pipeline.lab.store, pipeline.teacher.fingerprint
    for number, model in enumerate([f"models/{teacher}", f"{store.url}/models/{teacher}/"]):
        config = config_of(data, name=f"given-{number}", **given(model))
        assert open_run(store, config).pins.given_teacher == teacher


def test_a_given_teacher_outside_the_store_is_refused(store, data):
    message = refused(store, data, ValueError, **given(f"/elsewhere/models/{'a' * 64}"))
    assert f"/elsewhere/models/{'a' * 64} lies outside the run's store {store.url}" in message
    assert "import it there" in message


def test_a_given_teacher_that_is_not_there_is_refused(store, data):
    message = refused(store, data, UnknownModel, **given(f"models/{'a' * 64}"))
    assert f"no finished model models/{'a' * 64}" in message


def test_a_given_teacher_of_other_classes_is_refused(pipeline, lab, data):
    classes = {"schema": 1, "class_names": ["cyan", "green", "blue"]}
    for split in ("labeled", "dev", "test", "unlabeled"):
        (data / split / "classes.json").write_text(json.dumps(classes))
    store = lab.in_empty_store(data.parent / "given-store").store
    models = Path(pipeline.lab.store.url) / "models"
    shutil.copytree(models, Path(store.url) / "models")
    message = refused(
        store, data, ClassesMismatch, **given(f"models/{pipeline.teacher.fingerprint}")
    )
    assert f"teacher.model = models/{pipeline.teacher.fingerprint} knows 3 classes" in message
    assert "only in the corpus: cyan; only in the model: red" in message


# Weights to start from.


def starting(model, **more):
    return {"student": TRAINING | {"init": {"kind": "model", "model": model}} | more}


def test_a_model_to_start_from_is_pinned_by_its_fingerprint(pipeline, data):
    store, model = pipeline.lab.store, pipeline.teacher.fingerprint
    run = open_run(store, config_of(data, name="init-model", **starting(f"models/{model}")))
    assert (run.pins.student_init, run.pins.teacher_init) == (model, None)
    assert reopen_run(store, "init-model").pins == run.pins


def test_a_model_to_start_from_must_be_there_and_of_the_students_architecture(
    pipeline, store, data
):
    message = refused(store, data, UnknownModel, **starting(f"models/{'a' * 64}"))
    assert f"no finished model models/{'a' * 64}" in message
    message = refused(store, data, ValueError, **starting(f"/elsewhere/models/{'a' * 64}"))
    assert "student.init.model = /elsewhere" in message
    wider = {"architecture": {"kind": "small_cnn", "width": 8, "depth": 1}}
    config = config_of(
        data, name="wider", **starting(f"models/{pipeline.teacher.fingerprint}", **wider)
    )
    with pytest.raises(WeightsMismatch, match=r"is a small_cnn-4x1, student.architecture a"):
        open_run(pipeline.lab.store, config)


def test_weights_from_elsewhere_are_copied_when_the_run_is_opened(pipeline, store, data, tmp_path):
    weights = tmp_path / "weights.safetensors"
    stored = pipeline.teacher.object("model")
    weights.write_bytes(read_stored(pipeline.lab.store, stored))
    init = {"init": {"kind": "pretrained", "weights": str(weights)}}
    config = config_of(data, teacher=TRAINING | init, student=TRAINING | init)
    run = open_run(store, config)
    sha256 = run.pins.teacher_init
    assert sha256 is not None
    assert run.pins.student_init == sha256
    assert store.read(initial_weights_path(sha256), sha256=sha256)
    # Resume obeys the pin, whatever has become of the file.
    weights.unlink()
    assert open_run(store, config).pins == run.pins


def test_weights_that_do_not_fit_are_refused_before_anything_is_computed(store, data, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, weights)
    init = {"init": {"kind": "pretrained", "weights": str(weights)}}
    message = refused(store, data, WeightsMismatch, teacher=TRAINING | init)
    assert f"{weights} does not fit small_cnn-4x1: missing" in message


def test_students_can_start_from_a_given_teacher_of_their_architecture_only(pipeline, data):
    store, teacher = pipeline.lab.store, given(f"models/{pipeline.teacher.fingerprint}")
    init = {"init": {"kind": "teacher"}}
    run = open_run(store, config_of(data, name="same", **teacher, student=TRAINING | init))
    assert run.pins.student_init is None, "known round by round"
    wider = {"architecture": {"kind": "small_cnn", "width": 8, "depth": 1}}
    wider_student = TRAINING | init | wider
    config = config_of(data, name="wider-than-given", **teacher, student=wider_student)
    with pytest.raises(WeightsMismatch, match="small_cnn-8x1"):
        open_run(store, config)


def test_a_run_without_rounds_indexes_no_unlabelled_corpus(store, data):
    shutil.rmtree(data / "unlabeled")
    run = open_run(store, config_of(data, rounds=0, student=None, baseline=False))
    assert run.pins.unlabeled is None


def test_a_fine_tuning_shorter_than_its_warm_up_is_refused(store, data):
    # 24 images in batches of 6: half an epoch is 2 steps.
    finetune = {
        "duration": {"labeled_epochs": 0.5},
        "warmup": {"steps": 2},
        "optimizer": {"kind": "sgd"},
        "batch_size": 6,
    }
    order = {"order": "finetune_on_labels_last", "finetune": finetune}
    message = refused(store, data, ValueError, student=TRAINING | order)
    assert "student.finetune.warmup is 2 steps with the 24 images" in message


# The demo's data.


def test_the_digits_are_made_in_the_store_once(store):
    digits = {"kind": "digits", "labels_per_class": 2, "dev": 20, "test": 20, "shard_size": 500}
    config = config_of("", data=digits)
    pins = resolve_inputs(store, config)
    assert pins.class_names == tuple("0123456789")
    sizes = [
        load_corpus(store, digest).num_samples
        for digest in (pins.labeled, pins.dev, pins.test, pins.unlabeled)
        if digest is not None
    ]
    assert sizes == [20, 20, 20, 1797 - 60]
    (folder,) = Path(store.url, "data").iterdir()
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert resolve_inputs(store, config) == pins
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == written
    # The run's seed draws the split, unless the data have one of their own.
    assert resolve_inputs(store, config_of("", data=digits, seed=1)).labeled != pins.labeled
    assert (
        resolve_inputs(store, config_of("", data=digits | {"seed": 0}, seed=1)).labeled
        == pins.labeled
    )
