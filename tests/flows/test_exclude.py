"""data.exclude: what it names is in no corpus, no fingerprint and no batch of a run."""

import shutil

import pytest
import torch

from flows.config import SelfTrainingConfig
from flows.opening import resolve_inputs
from models.noise import NoiseConfig
from storage.corpus import EmptyCorpus, load_corpus, load_locations, read_samples, save_corpus
from storage.exclusion import exclude
from storage.manifest import read_stored
from storage.predictions import read_predictions, read_record
from storage.selections import from_parquet
from tasks.batches import TrainingBatches
from tasks.images import clean_view, decode_image

TRAINING = {
    "architecture": {"kind": "small_cnn", "width": 4, "depth": 1},
    "image_size": 8,
    "batch_size": 6,
    "duration": {"steps": 12},
}
GONE = {"labeled-0/l002", "labeled-2/l020", "unlabeled-1/u013", "unlabeled-4/v024"}


@pytest.fixture
def data(lab, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(lab.folder, folder)
    return folder


@pytest.fixture
def store(lab, tmp_path):
    return lab.in_empty_store(tmp_path / "run-store").store


def config_of(folder, **changes):
    splits = {name: name for name in ("labeled", "dev", "test", "unlabeled")}
    document = {
        "name": "tiny",
        "rounds": 1,
        "data": {"root": str(folder)} | splits | changes,
        "teacher": TRAINING,
        "student": TRAINING,
    }
    return SelfTrainingConfig.model_validate(document)


def keys_of(store, digest):
    corpus, locations = load_corpus(store, digest), load_locations(store, digest)
    return {s.key for shard in corpus.shards for s in read_samples(corpus, locations, shard.stem)}


def test_every_split_is_pinned_without_the_keys(data, store):
    whole = resolve_inputs(store, config_of(data))
    (data / "takedowns.txt").write_text("\n".join([*sorted(GONE), "elsewhere/x"]))
    pins = resolve_inputs(store, config_of(data, exclude="takedowns.txt"))
    for split in ("labeled", "unlabeled"):
        before, after = keys_of(store, getattr(whole, split)), keys_of(store, getattr(pins, split))
        assert before - after == {key for key in GONE if key.startswith(f"{split}-")}
        assert getattr(whole, split) != getattr(pins, split)  # so are all later fingerprints
    assert (pins.dev, pins.test) == (whole.dev, whole.test)  # nothing was excluded there


def test_a_list_of_other_keys_changes_no_pin(data, store):
    whole = resolve_inputs(store, config_of(data))
    (data / "takedowns.txt").write_text("elsewhere/x\n")
    assert resolve_inputs(store, config_of(data, exclude="takedowns.txt")) == whole


def test_a_missing_list_is_refused_by_its_key(data, store):
    with pytest.raises(FileNotFoundError, match=r"data\.exclude = 'no\.txt'"):
        resolve_inputs(store, config_of(data, exclude="no.txt"))


def test_a_list_that_leaves_nothing_names_the_split(data, store):
    (data / "all.txt").write_text("\n".join(f"dev-0/d{i:03d}" for i in range(15)))
    with pytest.raises(EmptyCorpus, match=r"data\.exclude = 'all\.txt' leaves nothing of dev"):
        resolve_inputs(store, config_of(data, exclude="all.txt"))


def test_a_shard_in_two_splits_is_refused_also_with_exclusions(data, store):
    shutil.copy(data / "labeled" / "labeled-0.tar", data / "unlabeled" / "labeled-0.tar")
    (data / "keys.txt").write_text("labeled-0/l002\n")
    with pytest.raises(ValueError, match="splits must not share images"):
        resolve_inputs(store, config_of(data, exclude="keys.txt"))


def test_excluded_samples_are_neither_labelled_nor_trained_on(lab):
    def without(corpus):
        locations = load_locations(lab.store, corpus.digest)
        found = exclude(corpus, locations, GONE).corpus
        save_corpus(lab.store, found, locations)
        return found

    own = lab.with_corpora(labeled=without(lab.labeled), unlabeled=without(lab.unlabeled))
    # The predictions of the whole shards are there first: they must not be taken for these.
    teacher = own.train()
    lab.label(teacher.fingerprint)
    labeling = own.label(teacher.fingerprint)
    for shard in own.unlabeled.shards:
        record = read_record(own.store, labeling.inputs["labeler"].fingerprint, shard.digest)
        assert record is not None
        keys = read_predictions(own.store, record).keys
        assert not GONE & {f"{shard.stem}/{key}" for key in keys}
        assert len(keys) == shard.num_samples

    selection = own.run_selection(
        own.store, labeling, None, own.keep_all, class_names=own.class_names
    )
    assert selection.counts["samples"] == sum(selection.counts["items"].values()) == 48
    for shard in own.unlabeled.shards:
        chosen = from_parquet(
            read_stored(own.store, selection.object(shard.digest)), num_samples=shard.num_samples
        )
        assert not GONE & {f"{shard.stem}/{key}" for key in chosen.keys}
    batches = TrainingBatches(
        own.store,
        own.config(unlabeled_ratio=2, noise=NoiseConfig(horizontal_flip=False)),
        labeled=own.labeled.digest,
        class_names=own.class_names,
        selection=selection,
        labeling=labeling,
        stage_stream=1,
        device=torch.device("cpu"),
        max_bad_samples=0,
    )
    seen = set()
    for step in range(8):  # 48 labelled images of 22, 96 pseudo-labelled ones of 48
        images = (batches.batch(step).images * 255).round().to(torch.uint8)
        seen |= {image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images}
    batches.close()
    assert seen == views_of(own, own.labeled) | views_of(own, own.unlabeled)
    assert len(seen) == 22 + 48


def views_of(lab, corpus):
    locations = load_locations(lab.store, corpus.digest)
    return {
        clean_view(decode_image(s.image, where=s.key), 8, 0, "bilinear").tobytes()
        for shard in corpus.shards
        for s in read_samples(corpus, locations, shard.stem)
    }
