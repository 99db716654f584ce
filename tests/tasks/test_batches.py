"""Batches: the same at every step of every run, joined on keys, each copy under its own noise."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
import torch

import storage.corpus
import tasks.batches
import tasks.shard_items
from models.balancing import TopKConfig
from models.noise import AffineConfig, NoiseConfig, RandomResizedConfig
from models.objectives import Stream
from models.thresholds import FixedThresholdConfig
from storage.shard_cache import CacheConfig, CacheTooSmall, ShardCache
from tasks.batches import TrainingBatches
from tasks.images import clean_view, decode_image
from tasks.shard_items import TooManyBadSamples

BAD = b"\x89PNG\r\n\x1a\n cut"
CLEAN = NoiseConfig(horizontal_flip=False)


@pytest.fixture
def open_batches():
    """Make TrainingBatches that are closed when the test ends."""
    opened = []

    def make(
        lab, config, *, selection=None, labeling=None, stream=11, max_bad_samples=0, **changes
    ):
        batches = TrainingBatches(
            lab.store,
            config,
            labeled=lab.labeled.digest,
            class_names=lab.class_names,
            selection=selection,
            labeling=labeling,
            stage_stream=stream,
            device=torch.device("cpu"),
            max_bad_samples=max_bad_samples,
            **changes,
        )
        opened.append(batches)
        return batches

    yield make
    for batches in opened:
        batches.close()


def view_of(image, size=8):
    return clean_view(decode_image(image, where="test"), size, 0, "bilinear")


def fingerprint_of(image):
    """What a noiseless image of a batch, (3, S, S) in [0, 1], is recognised by."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes()


def tensors_of(batch):
    tensors = (batch.images, batch.labels, batch.pseudo_targets, batch.pseudo_weights)
    return [t for t in tensors if t is not None]


def assert_same(first, second):
    assert len(tensors_of(first)) == len(tensors_of(second))
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        assert torch.equal(a, b)


def student_config(lab, **changes):
    noise = NoiseConfig(affine=AffineConfig(), dropout=0.2)
    return lab.config(**{"unlabeled_ratio": 2, "noise": noise} | changes)


def test_a_batch_holds_labels_first_and_the_ratio_of_pseudo_labels(pipeline, open_batches):
    config = student_config(pipeline.lab)
    batch = open_batches(
        pipeline.lab, config, selection=pipeline.selection, labeling=pipeline.labels
    ).batch(0)
    assert batch.images.shape == (6 + 12, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert 0 <= float(batch.images.min()) < float(batch.images.max()) <= 1
    assert batch.labels.shape == (6,)
    assert batch.pseudo_targets is not None
    assert batch.pseudo_weights is not None
    assert batch.pseudo_targets.shape == (12, 3)
    torch.testing.assert_close(batch.pseudo_targets.sum(dim=1), torch.ones(12))
    assert batch.pseudo_weights.tolist() == [1.0] * 12
    assert not batch.pseudo_is_hard


def test_batches_are_the_same_for_every_instance_and_order_of_steps(pipeline, open_batches):
    given = {"selection": pipeline.selection, "labeling": pipeline.labels}
    config = student_config(pipeline.lab)
    first = open_batches(pipeline.lab, config, **given)
    second = open_batches(pipeline.lab, config, **given)
    forward = [first.batch(step) for step in range(8)]
    for step in (7, 3, 0, 3, 5):
        assert_same(second.batch(step), forward[step])
    # A resumed process begins in the middle.
    resumed = open_batches(pipeline.lab, config, **given)
    assert_same(resumed.batch(6), forward[6])


def test_streamed_batches_equal_cached_ones(pipeline, open_batches, monkeypatch):
    given = {"selection": pipeline.selection, "labeling": pipeline.labels}
    config = student_config(pipeline.lab)
    cached = open_batches(pipeline.lab, config, **given)
    expected = [cached.batch(step) for step in range(12)]
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", 0)
    streamed = open_batches(pipeline.lab, config, **given)
    for step in [*range(12), 2, 9]:
        assert_same(streamed.batch(step), expected[step])
    assert [source.is_cached for source in streamed._sources] == [False, False]
    assert len(streamed._memory.opened) <= 1  # no byte may be held but of the shard being read


def test_the_files_of_open_shards_count_as_memory(lab, open_batches, monkeypatch):
    # 24 views of 8 x 8 x 3 are 4,608 bytes and 24 labels 192; three shards are tars of 20 KiB.
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", 10_000)
    assert not open_batches(lab, lab.config())._sources[0].is_cached
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", lab.labeled.num_bytes + 4608 + 191)
    assert not open_batches(lab, lab.config())._sources[0].is_cached
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", lab.labeled.num_bytes + 4608 + 192)
    assert open_batches(lab, lab.config())._sources[0].is_cached


def test_random_crops_are_the_same_for_every_instance_and_move_with_the_epoch(lab, open_batches):
    noise = NoiseConfig(crop=RandomResizedConfig(scale=(0.2, 0.6)), horizontal_flip=False)
    config = lab.config(noise=noise, batch_size=24)  # a step is an epoch
    first, second = open_batches(lab, config), open_batches(lab, config)
    assert_same(first.batch(3), second.batch(3))
    epochs = [{fingerprint_of(image) for image in first.batch(step).images} for step in range(2)]
    assert len(epochs[0]) == 24
    assert len(epochs[0] & epochs[1]) < 6


def test_another_stage_sees_another_order_and_other_noise(lab, open_batches):
    config = lab.config(noise=CLEAN, batch_size=24)
    a, b = (open_batches(lab, config, stream=s).batch(0) for s in (1, 2))
    prints = [[fingerprint_of(image) for image in batch.images] for batch in (a, b)]
    assert sorted(prints[0]) == sorted(prints[1])
    assert prints[0] != prints[1]
    noisy = lab.config(batch_size=24)
    a, b = (open_batches(lab, noisy, stream=s).batch(0) for s in (1, 2))
    assert not {i.numpy().tobytes() for i in a.images} & {i.numpy().tobytes() for i in b.images}


def test_noise_changes_with_the_epoch_and_images_do_not(lab, open_batches):
    def epochs(noise):
        batches = open_batches(lab, lab.config(noise=noise, batch_size=24))
        return [{i.numpy().tobytes() for i in batches.batch(s).images} for s in range(2)]

    clean = epochs(CLEAN)
    assert clean[0] == clean[1]
    assert len(clean[0]) == 24
    noisy = epochs(NoiseConfig(horizontal_flip=False, affine=AffineConfig()))
    assert not noisy[0] & noisy[1]


def test_noise_follows_the_image_and_not_its_place_in_a_batch(lab, open_batches):
    def first_epoch(batch_size):
        batches = open_batches(lab, lab.config(batch_size=batch_size))
        steps = range(24 // batch_size)
        return [image.numpy().tobytes() for s in steps for image in batches.batch(s).images]

    assert len(set(first_epoch(24))) == 24
    assert first_epoch(24) == first_epoch(12) == first_epoch(3)


def test_every_labelled_image_bears_its_own_label(lab, open_batches):
    truth = {view_of(image).tobytes(): label for _, image, label in lab.images_of("l", 24, start=0)}
    batches = open_batches(lab, lab.config(noise=CLEAN))
    seen = {}
    for step in range(4):  # 4 steps of 6 are one epoch of 24
        batch = batches.batch(step)
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            seen[fingerprint_of(image)] = label
    assert seen == truth


def test_labels_are_put_into_the_class_order_of_the_run(lab, open_batches, tmp_path):
    samples = lab.images_of("x", 9, start=50)
    folder = lab.write_split(tmp_path / "x", {"x-0": samples}, ["blue", "red", "green"])
    other = lab.with_corpora(labeled=lab.index_into(lab.store, folder))
    batch = open_batches(other, other.config(noise=CLEAN, batch_size=9)).batch(0)
    # .cls 0 is blue there, and class 2 of the run (red, green, blue); 1 is 0 and 2 is 1.
    truth = {view_of(image).tobytes(): [2, 0, 1][label] for _, image, label in samples}
    found = {fingerprint_of(i): n for i, n in zip(batch.images, batch.labels.tolist(), strict=True)}
    assert found == truth


def select_by_hand(lab, rows, config=None):
    labels = lab.plant_labeling(lab.store, lab.unlabeled, rows)
    return {
        "labeling": labels,
        "selection": lab.run_selection(
            lab.store, labels, None, config or lab.keep_all, class_names=lab.class_names
        ),
    }


def with_unlabeled(lab, folder, shards):
    lab.write_split(folder, shards)
    return lab.with_corpora(unlabeled=lab.index_into(lab.store, folder))


def pseudo_labels_seen(batches, steps):
    """Recognised image -> (target, ...) over some noiseless batches."""
    seen = {}
    for step in range(steps):
        batch = batches.batch(step)
        assert batch.pseudo_targets is not None
        images = batch.images[len(batch.labels) :]
        for image, target in zip(images, batch.pseudo_targets, strict=True):
            assert seen.setdefault(fingerprint_of(image), target.tolist()) == target.tolist()
    return seen


def test_deleting_a_sample_shifts_no_label_of_the_others(lab, open_batches, tmp_path):
    # Sample i of 9 gets class i % 3 with a confidence that is its own.
    samples = lab.images_of("u", 9, start=70, labeled=False)
    rows = [(key, i % 3, 0.5 + i / 20) for i, (key, _, _) in enumerate(samples)]
    config = student_config(lab, noise=CLEAN, unlabeled_ratio=3)

    def targets(kept, folder):
        chosen = with_unlabeled(lab, tmp_path / folder, {"u-0": [samples[i] for i in kept]})
        given = select_by_hand(chosen, {"u-0": [rows[i] for i in kept]})
        return pseudo_labels_seen(open_batches(chosen, config, **given), steps=2)

    whole = targets(range(9), "whole")
    cut = targets([0, 1, 2, 4, 5, 6, 7, 8], "cut")
    assert len(whole) == 9
    deleted = view_of(samples[3][1]).tobytes()
    assert cut == {image: target for image, target in whole.items() if image != deleted}


def test_a_sample_that_could_not_be_labelled_shifts_no_label_of_the_others(
    lab, open_batches, tmp_path
):
    samples = list(lab.images_of("u", 9, start=70, labeled=False))
    samples[3] = (samples[3][0], BAD, None)
    chosen = with_unlabeled(lab, tmp_path / "bad", {"u-0": samples})
    # The labelling has 8 rows for the shard's 9 samples.
    rows = [(key, i % 3, 0.9) for i, (key, _, _) in enumerate(samples) if i != 3]
    given = select_by_hand(chosen, {"u-0": rows})
    config = student_config(lab, noise=CLEAN, unlabeled_ratio=3)
    seen = pseudo_labels_seen(open_batches(chosen, config, **given), steps=2)
    expected = {view_of(s[1]).tobytes(): i % 3 for i, s in enumerate(samples) if i != 3}
    assert {image: int(np.argmax(target)) for image, target in seen.items()} == expected


def test_rejected_samples_are_never_read(lab, open_batches, tmp_path):
    samples = lab.images_of("u", 9, start=70, labeled=False)
    chosen = with_unlabeled(
        lab, tmp_path / "some", {"u-0": samples[:4], "u-1": samples[4:7], "u-2": samples[7:]}
    )
    kept = {0, 2, 7, 8}  # u-1 has nothing to give
    rows = [(key, i % 3, 0.9 if i in kept else 0.4) for i, (key, _, _) in enumerate(samples)]
    config = lab.keep_all.model_copy(update={"threshold": FixedThresholdConfig(confidence=0.5)})
    given = select_by_hand(
        chosen, {"u-0": rows[:4], "u-1": rows[4:7], "u-2": rows[7:]}, config=config
    )
    batches = open_batches(chosen, student_config(lab, noise=CLEAN), **given)
    seen = pseudo_labels_seen(batches, steps=3)
    assert set(seen) == {view_of(samples[i][1]).tobytes() for i in kept}


def copies_of_two_images(lab, tmp_path):
    """Four copies of one image of class 0 and four of one of class 1."""
    samples = lab.images_of("u", 2, start=70, labeled=False)
    chosen = with_unlabeled(lab, tmp_path / "copies", {"u-0": samples})
    config = lab.keep_all.model_copy(update={"balance": TopKConfig(k=4), "target": "hard"})
    rows = [(key, i, 0.9) for i, (key, _, _) in enumerate(samples)]
    return chosen, samples, select_by_hand(chosen, {"u-0": rows}, config)


def test_an_epoch_has_every_copy_once(lab, open_batches, tmp_path):
    chosen, samples, given = copies_of_two_images(lab, tmp_path)
    config = student_config(lab, noise=CLEAN, batch_size=4, unlabeled_ratio=2)
    batch = open_batches(chosen, config, **given).batch(0)  # 8 items are one epoch
    seen = Counter(fingerprint_of(image) for image in batch.images[4:])
    assert seen == {view_of(image).tobytes(): 4 for _, image, _ in samples}
    assert batch.pseudo_is_hard
    assert batch.pseudo_targets is not None
    assert sorted(batch.pseudo_targets.tolist()) == [[0, 1, 0]] * 4 + [[1, 0, 0]] * 4


def test_copies_of_an_image_get_noise_of_their_own(lab, open_batches, tmp_path):
    chosen, _, given = copies_of_two_images(lab, tmp_path)
    noise = NoiseConfig(horizontal_flip=False, affine=AffineConfig())
    config = student_config(lab, noise=noise, batch_size=4, unlabeled_ratio=2)
    batches = open_batches(chosen, config, **given)
    images = [image.numpy().tobytes() for s in range(2) for image in batches.batch(s).images[4:]]
    assert len(set(images)) == 16  # 2 images, 4 copies, 2 epochs


def bad_labeled(lab, tmp_path, bad):
    samples = list(lab.images_of("l", 6, start=0))
    for i in bad:
        samples[i] = (samples[i][0], BAD, samples[i][2])
    folder = lab.write_split(tmp_path / "bad", {"bad-0": samples})
    corpus = lab.index_into(lab.store, folder)
    return lab.with_corpora(labeled=corpus), samples


def test_an_undecodable_labelled_image_is_replaced_with_its_label(lab, open_batches, tmp_path):
    broken, samples = bad_labeled(lab, tmp_path, bad=[2])
    config = broken.config(noise=CLEAN, batch_size=6)
    batches = open_batches(broken, config, max_bad_samples=1)
    batch = batches.batch(0)
    assert list(batches.bad_samples()) == ["bad-0/l002"]
    found = Counter(
        (fingerprint_of(i), n) for i, n in zip(batch.images, batch.labels.tolist(), strict=True)
    )
    # Image 2 is not there; the next one, 3, comes twice and brings its label.
    expected = Counter(
        {(view_of(s[1]).tobytes(), i % 3): 1 for i, s in enumerate(samples) if i != 2}
    )
    expected[view_of(samples[3][1]).tobytes(), 0] += 1
    assert found == expected


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_too_many_undecodable_images_name_shard_and_key(
    lab, open_batches, tmp_path, monkeypatch, cache_bytes
):
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", cache_bytes)
    broken, _ = bad_labeled(lab, tmp_path, bad=[2, 4])
    batches = open_batches(broken, broken.config(batch_size=6), max_bad_samples=1)
    with pytest.raises(TooManyBadSamples) as caught:
        batches.batch(0)
    assert re.search(r"shard bad-0: 2 undecodable images .*bad-0/l00[24]: ", str(caught.value))


def test_a_labelled_shard_with_an_unlabelled_sample_names_it(lab, open_batches, tmp_path):
    samples = list(lab.images_of("l", 6, start=0))
    samples[4] = (*samples[4][:2], None)
    folder = lab.write_split(tmp_path / "unlabelled", {"some-0": samples})
    broken = lab.with_corpora(labeled=lab.index_into(lab.store, folder))
    with pytest.raises(ValueError, match=r"some-0/l004: no \.cls member"):
        open_batches(broken, broken.config(batch_size=6)).batch(0)


def joined_parts(batches, step, num_parts):
    """Labelled and pseudo-labelled images of all parts, each in the order of parts."""
    parts = [batches.batch(step, part, num_parts) for part in range(num_parts)]
    count = len(parts[0].labels)
    return (
        torch.cat([part.images[:count] for part in parts]),
        torch.cat([part.images[count:] for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.pseudo_targets for part in parts]),
    )


@pytest.mark.parametrize("num_parts", [2, 3, 6])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_the_parts_of_a_step_are_its_slices(
    pipeline, open_batches, monkeypatch, num_parts, cache_bytes
):
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", cache_bytes)
    given = {"selection": pipeline.selection, "labeling": pipeline.labels}
    batches = open_batches(pipeline.lab, student_config(pipeline.lab), **given)
    for step in (0, 5):
        whole = joined_parts(batches, step, 1)
        for part, one in zip(joined_parts(batches, step, num_parts), whole, strict=True):
            assert torch.equal(part, one)


def test_a_step_that_cannot_be_split_names_its_size_and_the_parts(lab, open_batches):
    with pytest.raises(ValueError, match="6 labeled samples a step cannot be split into 4 equal"):
        open_batches(lab, lab.config()).batch(0, 0, 4)


class Streams:
    """An objective that declares these streams."""

    def __init__(self, *streams):
        self._streams = streams

    def streams(self, config):
        return self._streams


@pytest.fixture
def declare(monkeypatch):
    """Have the objective of any config declare these streams."""
    return lambda *streams: monkeypatch.setattr(
        tasks.batches, "build_objective", lambda config: Streams(*streams)
    )


def test_weak_views_have_the_flip_and_no_other_noise(lab, open_batches, declare):
    noisy = lab.config(noise=NoiseConfig(affine=AffineConfig()), batch_size=24)
    flip_only = lab.config(noise=NoiseConfig(), batch_size=24)
    expected = open_batches(lab, flip_only).batch(0)
    declare(Stream(role="labeled", samples_per_step=24, views=("weak",)))
    weak = open_batches(lab, noisy).batch(0)
    assert torch.equal(weak.images, expected.images)
    assert torch.equal(weak.labels, expected.labels)


def test_further_views_have_draws_of_their_own_and_leave_the_first_as_it_is(
    lab, open_batches, declare
):
    config = lab.config(noise=NoiseConfig(affine=AffineConfig()), batch_size=24)
    alone = open_batches(lab, config).batch(1)
    declare(
        Stream(role="labeled", samples_per_step=24, views=("strong", "strong", "weak")),
    )
    batch = open_batches(lab, config).batch(1)
    assert torch.equal(batch.images, alone.images)
    assert sorted(batch.views) == ["labeled_2", "labeled_3"]
    # Known-broken variant: all views from one stream, which would make these equal.
    second = {image.numpy().tobytes() for image in batch.views["labeled_2"]}
    assert not second & {image.numpy().tobytes() for image in batch.images}
    assert {fingerprint_of(i) for i in batch.views["labeled_3"]} != {
        fingerprint_of(i) for i in open_batches(lab, lab.config(noise=CLEAN)).batch(1).images
    }


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_unlabelled_views_come_by_name_and_are_of_the_same_images(
    lab, open_batches, declare, monkeypatch, cache_bytes
):
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", cache_bytes)
    declare(
        Stream(role="labeled", samples_per_step=6, views=("weak",)),
        Stream(role="unlabeled", samples_per_step=12, views=("weak", "strong", "strong")),
    )
    batch = open_batches(lab, lab.config(noise=CLEAN), unlabeled=lab.unlabeled.digest).batch(0)
    assert batch.images.shape == (6, 3, 8, 8)
    assert batch.pseudo_targets is None
    assert sorted(batch.views) == ["unlabeled_strong", "unlabeled_strong_2", "unlabeled_weak"]
    # Without noise the views are the images, in one order.
    assert torch.equal(batch.views["unlabeled_weak"], batch.views["unlabeled_strong"])
    assert torch.equal(batch.views["unlabeled_weak"], batch.views["unlabeled_strong_2"])
    assert len({fingerprint_of(image) for image in batch.views["unlabeled_weak"]}) == 12


def test_each_view_of_a_stream_is_cropped_on_its_own(lab, open_batches, declare):
    declare(Stream(role="labeled", samples_per_step=24, views=("strong", "strong")))
    noise = NoiseConfig(crop=RandomResizedConfig(scale=(0.2, 0.6)), horizontal_flip=False)
    batch = open_batches(lab, lab.config(noise=noise)).batch(0)
    first = {fingerprint_of(image) for image in batch.images}
    second = {fingerprint_of(image) for image in batch.views["labeled_2"]}
    assert len(first & second) < 6


def test_a_training_on_pseudo_labels_alone_has_no_labels(pipeline, open_batches, declare):
    given = {"selection": pipeline.selection, "labeling": pipeline.labels}
    config = student_config(pipeline.lab)
    joint = open_batches(pipeline.lab, config, **given).batch(3)
    declare(Stream(role="pseudo_labeled", samples_per_step=12, with_selection=True))
    alone = open_batches(pipeline.lab, config, **given).batch(3)
    assert alone.labels.shape == (0,)
    assert torch.equal(alone.images, joint.images[6:])
    assert torch.equal(alone.pseudo_targets, joint.pseudo_targets)


def test_a_batch_of_views_only_has_no_images(lab, open_batches, declare):
    declare(Stream(role="unlabeled", samples_per_step=4))
    batch = open_batches(lab, lab.config(), unlabeled=lab.unlabeled.digest).batch(0)
    assert batch.images.shape == (0, 3, 8, 8)
    assert batch.views["unlabeled_strong"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("stream", "what"),
    [
        (Stream(role="pseudo_labeled", samples_per_step=4, with_selection=True), "a selection"),
        (Stream(role="unlabeled", samples_per_step=4), "no unlabelled corpus"),
    ],
)
def test_a_stream_without_its_data_is_refused(lab, open_batches, declare, stream, what):
    declare(stream)
    with pytest.raises(ValueError, match=what):
        open_batches(lab, lab.config())


def test_a_cached_corpus_is_decoded_once(lab, open_batches, monkeypatch):
    decoded = []

    def counting(data, *, where, reduction=None):
        decoded.append(where)
        return decode_image(data, where=where)

    monkeypatch.setattr(tasks.shard_items, "decode_pixels", counting)
    batches = open_batches(lab, lab.config())
    for step in range(12):  # three epochs of 24
        batches.batch(step)
    batches.close()
    assert len(decoded) == len(set(decoded)) == 24
    # The files are let go with the last image of each shard.
    assert batches._sources[0].samples._open == {}


@pytest.mark.parametrize("loader_threads", [1, 7])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_batches_do_not_depend_on_the_number_of_threads(
    pipeline, open_batches, monkeypatch, loader_threads, cache_bytes
):
    given = {"selection": pipeline.selection, "labeling": pipeline.labels}
    config = student_config(pipeline.lab)
    expected = open_batches(pipeline.lab, config, **given)
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", cache_bytes)
    other = open_batches(pipeline.lab, config, **given, loader_threads=loader_threads)
    for step in range(6):
        assert_same(other.batch(step), expected.batch(step))


def cached_in(folder, max_bytes=2**30):
    return CacheConfig(dir=str(folder), max_bytes=max_bytes)


def test_batches_out_of_the_node_cache_are_the_same_and_need_no_shard_again(
    pipeline, open_batches, monkeypatch, tmp_path
):
    given = {"selection": pipeline.selection, "labeling": pipeline.labels}
    config = student_config(pipeline.lab)
    expected = open_batches(pipeline.lab, config, **given)
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", 0)
    first = open_batches(pipeline.lab, config, **given, cache=cached_in(tmp_path))
    for step in range(12):
        assert_same(first.batch(step), expected.batch(step))
    first.close()

    def unreachable(*args, **kwargs):
        raise AssertionError("a shard was read from where it lies")

    monkeypatch.setattr(storage.corpus, "read_shard", unreachable)
    second = open_batches(pipeline.lab, config, **given, cache=cached_in(tmp_path))
    for step in range(12):
        assert_same(second.batch(step), expected.batch(step))
    assert all(shard.is_mapped for shard in second._memory.opened.values())


def test_a_cache_smaller_than_the_shards_mixed_at_a_time_is_refused_at_once(
    lab, open_batches, tmp_path
):
    # The labelled corpus has three shards, all of one window.
    too_small = lab.labeled.num_bytes - 1
    with pytest.raises(CacheTooSmall, match=f"max_bytes={too_small} is less than the"):
        open_batches(lab, lab.config(), cache=cached_in(tmp_path, too_small))
    open_batches(lab, lab.config(), cache=cached_in(tmp_path, too_small + 1)).batch(0)


def test_a_cache_that_others_fill_slows_a_training_and_does_not_stop_it(
    lab, open_batches, tmp_path, caplog
):
    expected = open_batches(lab, lab.config()).batch(0)
    cache = ShardCache(cached_in(tmp_path, lab.labeled.num_bytes))
    size = lab.labeled.num_bytes
    in_use = cache.read(hashlib.sha256(bytes(size)).hexdigest(), size, lambda: bytes(size))
    batch = open_batches(lab, lab.config(), cache=cached_in(tmp_path, size)).batch(0)
    assert_same(batch, expected)
    assert "is read past the cache" in caplog.text
    assert len(in_use) == size


def test_shards_too_large_for_memory_are_named_with_the_remedy(
    lab, open_batches, monkeypatch, caplog
):
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", 10_000)
    open_batches(lab, lab.config())
    assert f"{lab.labeled.num_bytes + 24 * 8} bytes, but 10000 may be held" in caplog.text
    assert "Set cache: {dir, max_bytes}" in caplog.text


@pytest.mark.parametrize("bad", [[], [2], [2, 3]])
def test_crops_drawn_for_a_batch_pass_over_undecodable_images_as_one_by_one(
    lab, open_batches, tmp_path, bad
):
    broken, _ = bad_labeled(lab, tmp_path, bad=bad)
    noise = NoiseConfig(crop=RandomResizedConfig(scale=(0.2, 0.6)), horizontal_flip=False)
    config = broken.config(noise=noise, batch_size=6)
    batches = open_batches(broken, config, max_bad_samples=2)
    batch = batches.batch(1)
    (source,) = batches._sources
    shards, items, epochs = source.samples._order.read(6, 6)
    opened = source.samples.shards.get(0)
    expected = [
        opened.decode(item, epoch, (batches._noise_stream,), config)
        for item, epoch in zip(items.tolist(), epochs.tolist(), strict=True)
    ]
    assert set(shards.tolist()) == {0}
    assert [fingerprint_of(image) for image in batch.images] == [
        views[0].tobytes() for _, views in expected
    ]
    assert opened.targets.labels[[item for item, _ in expected]].tolist() == batch.labels.tolist()
    assert len(batches.bad_samples()) == len(bad)


def test_copies_of_an_image_are_decoded_once(lab, open_batches, tmp_path, monkeypatch):
    decoded = []

    def counting(data, *, where, reduction=None):
        decoded.append(where)
        return decode_image(data, where=where)

    monkeypatch.setattr(tasks.shard_items, "decode_pixels", counting)
    chosen, _, given = copies_of_two_images(lab, tmp_path)
    config = student_config(lab, noise=CLEAN, batch_size=4, unlabeled_ratio=2)
    batches = open_batches(chosen, config, **given)
    for step in range(3):
        batches.batch(step)
    batches.close()
    assert sorted(key for key in decoded if key.startswith("u-0/")) == ["u-0/u000", "u-0/u001"]
