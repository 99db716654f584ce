"""Compact shards: the same batches from fewer bytes, written only where that pays."""

import tarfile
from dataclasses import replace

import pytest
import torch

import storage.corpus
import tasks.batches
import tasks.materializing
from models.balancing import BalanceNoneConfig
from models.durations import Duration
from models.noise import AffineConfig, NoiseConfig, RandomResizedConfig
from models.thresholds import FixedThresholdConfig
from storage.corpus import read_samples
from storage.manifest import read_stored
from storage.samples import RawSample, iterate_samples
from storage.shard_cache import CacheConfig
from tasks.batches import TrainingBatches
from tasks.loading import LoadingConfig, MaterializeChoice
from tasks.materializing import (
    compact_shard,
    find_compact,
    materialize,
    materialize_if_useful,
    specify,
)
from tasks.selection import SelectionConfig

KEEP_CONFIDENT = SelectionConfig(
    calibration="none",
    threshold=FixedThresholdConfig(confidence=0.5),
    balance=BalanceNoneConfig(),
    allow_collapse=True,
)
KEPT = {1, 2, 8}
"""Of 12 samples in 3 shards; the middle shard has nothing to give."""


@pytest.fixture
def chosen(lab, tmp_path):
    """A lab in a store of its own, with a labelling and a selection of 3 of 12 samples."""
    own = lab.in_store(tmp_path / "store")
    samples = own.images_of("u", 12, start=70, labeled=False)
    shards = {f"u-{i}": samples[4 * i : 4 * i + 4] for i in range(3)}
    own.write_split(tmp_path / "u", shards)
    own = own.with_corpora(unlabeled=own.index_into(own.store, tmp_path / "u"))
    rows = [(key, i % 3, 0.9 if i in KEPT else 0.4) for i, (key, _, _) in enumerate(samples)]
    planted = {f"u-{i}": rows[4 * i : 4 * i + 4] for i in range(3)}
    labeling = own.plant_labeling(own.store, own.unlabeled, planted)
    selection = own.run_selection(
        own.store, labeling, None, KEEP_CONFIDENT, class_names=own.class_names
    )
    return own, selection, labeling


@pytest.fixture
def batches_of(chosen):
    own, selection, labeling = chosen
    opened = []

    def make(config, **changes):
        batches = TrainingBatches(
            own.store,
            config,
            labeled=own.labeled.digest,
            class_names=own.class_names,
            selection=selection,
            labeling=labeling,
            stage_stream=5,
            device=torch.device("cpu"),
            max_bad_samples=0,
            **changes,
        )
        opened.append(batches)
        return batches

    yield make
    for batches in opened:
        batches.close()


def test_compact_shards_hold_the_selected_images_and_nothing_else(chosen):
    own, selection, labeling = chosen
    manifest = materialize(own.store, selection, labeling, cache=None)
    assert [stored.name for stored in manifest.objects] == [
        shard.digest for shard in own.unlabeled.shards if shard.stem != "u-1"
    ]
    found = [
        (sample.key, bytes(sample.image))
        for stored, stem in zip(manifest.objects, ("u-0", "u-2"), strict=True)
        for sample in iterate_samples(read_stored(own.store, stored), stem=stem)
    ]
    samples = own.images_of("u", 12, start=70, labeled=False)
    assert found == [(f"u-{i // 4}/{samples[i][0]}", samples[i][1]) for i in sorted(KEPT)]
    assert manifest.counts["samples"] == 3
    assert manifest.counts["bytes"] < manifest.counts["corpus_bytes"]
    assert manifest.fingerprint == specify(selection.fingerprint).fingerprint


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize(
    "noise",
    [NoiseConfig(affine=AffineConfig()), NoiseConfig(crop=RandomResizedConfig(scale=(0.3, 0.9)))],
)
def test_batches_from_compact_shards_are_identical_and_need_no_whole_shard(
    chosen, batches_of, monkeypatch, tmp_path, cache_bytes, with_cache, noise
):
    own, selection, labeling = chosen
    config = own.config(unlabeled_ratio=2, noise=noise)
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", cache_bytes)
    expected = batches_of(config)
    compact = materialize(own.store, selection, labeling, cache=None)
    for shard in own.unlabeled.shards:  # from now on the corpus is not there
        (tmp_path / "u" / f"{shard.stem}.tar").unlink()
    cache = CacheConfig(dir=str(tmp_path / "cache"), max_bytes=2**30) if with_cache else None
    found = batches_of(config, compact=compact, cache=cache)
    pairs = []
    for step in range(5):
        pairs.append(found.batch(step))
    # The whole shards come back for the comparison: known-broken variants (another order of items
    # in the compact shards, keys without the shard's stem) draw other noise or other positions.
    own.write_split(
        tmp_path / "u",
        {
            f"u-{i}": own.images_of("u", 12, start=70, labeled=False)[4 * i : 4 * i + 4]
            for i in range(3)
        },
    )
    for step, batch in enumerate(pairs):
        whole = expected.batch(step)
        assert torch.equal(batch.images, whole.images)
        assert torch.equal(batch.labels, whole.labels)
        assert torch.equal(batch.pseudo_targets, whole.pseudo_targets)
        assert torch.equal(batch.pseudo_weights, whole.pseudo_weights)


def test_materializing_twice_or_after_a_kill_gives_one_result(chosen, monkeypatch):
    own, selection, labeling = chosen

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.materializing, "commit_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        materialize(own.store, selection, labeling, cache=None)
    monkeypatch.undo()
    assert find_compact(own.store, selection.fingerprint) is None  # data without manifest
    data = own.store.list("compact")
    assert len(data) == 2
    first = materialize(own.store, selection, labeling, cache=None)
    assert find_compact(own.store, selection.fingerprint) == first
    assert materialize(own.store, selection, labeling, cache=None) == first
    assert set(own.store.list("compact")) - set(data) == {
        f"compact/{first.fingerprint}/manifest.json"
    }


def test_a_compact_shard_of_the_same_samples_has_the_same_bytes(lab):
    locations = storage.corpus.load_locations(lab.store, lab.labeled.digest)
    stem = lab.labeled.shards[0].stem
    samples = read_samples(lab.labeled, locations, stem)
    assert compact_shard(samples[1:4], stem) == compact_shard(samples[1:4], stem)
    assert compact_shard(samples[1:4], stem) != compact_shard(samples[3:0:-1], stem)


def test_a_compact_shard_has_the_same_bytes_in_every_locale(lab, monkeypatch):
    image = memoryview(b"image")
    samples = [RawSample("s/Löwe", image, "jpg", None, 0)]
    written = compact_shard(samples, "s")
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    assert compact_shard(samples, "s") == written
    (read,) = iterate_samples(written, stem="s", num_samples=1)
    assert (read.key, bytes(read.image)) == ("s/Löwe", b"image")


def order_of(chosen, *, steps=60, cache=None, materialize: MaterializeChoice = "auto"):
    own, selection, _ = chosen
    config = own.config(unlabeled_ratio=2, duration=Duration(steps=steps))
    order = own.order(config, role="student", round_index=1, selection=selection.fingerprint)
    return replace(order, loading=LoadingConfig(cache=cache, materialize=materialize))


@pytest.mark.parametrize(
    ("changes", "cache_bytes", "is_written"),
    [
        ({}, 0, True),  # 3 of 12 samples are a quarter; 60 steps of 12 are 240 passes
        ({}, 2**30, False),  # the corpus fits into memory
        ({"materialize": "never"}, 0, False),
        ({"materialize": "always"}, 2**30, True),
    ],
)
def test_auto_writes_compact_shards_where_they_pay(
    chosen, monkeypatch, changes, cache_bytes, is_written
):
    monkeypatch.setattr(tasks.materializing, "CACHE_BYTES", cache_bytes)
    found = materialize_if_useful(chosen[0].store, order_of(chosen, **changes))
    assert (found is not None) == is_written
    assert (find_compact(chosen[0].store, chosen[1].fingerprint) is not None) == is_written


@pytest.mark.parametrize(("name", "value"), [("LARGEST_SHARE", 0.24), ("FEWEST_EPOCHS", 240.1)])
def test_auto_leaves_large_shares_and_few_passes_alone(chosen, monkeypatch, name, value):
    monkeypatch.setattr(tasks.materializing, "CACHE_BYTES", 0)
    monkeypatch.setattr(tasks.materializing, name, value)
    assert materialize_if_useful(chosen[0].store, order_of(chosen)) is None


def test_auto_leaves_a_corpus_that_the_cache_holds_alone(chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.materializing, "CACHE_BYTES", 0)
    size = chosen[0].unlabeled.num_bytes
    for max_bytes, is_written in ((size, False), (size - 1, True)):
        cache = CacheConfig(dir=str(tmp_path / "cache"), max_bytes=max_bytes)
        found = materialize_if_useful(chosen[0].store, order_of(chosen, cache=cache))
        assert (found is not None) == is_written


def test_a_training_on_labels_alone_has_nothing_to_materialize(lab):
    assert materialize_if_useful(lab.store, lab.order()) is None
