"""The leak guard: planted copies are found in their shard, and described shards are not reread."""

import io

import numpy as np
import pytest
from PIL import Image

from models.leak_guard_config import NearDuplicatesConfig
from storage.corpus import load_locations, save_corpus
from tasks import guarding
from tasks.guarding import read_leaks, thumbnail
from tasks.shard_items import TooManyBadSamples


def picture(number, size=48):
    """A smooth random image."""
    coarse = np.random.default_rng([7, number]).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def copies_of(image):
    """One of each kind that the guard promises to find."""
    width, height = image.size
    return {
        "jpeg": encoded(image, "JPEG", quality=50),
        "half": encoded(image.resize((width // 2, height // 2)), "JPEG", quality=85),
        "double": encoded(image.resize((2 * width, 2 * height))),
        "cut": encoded(image.crop((2, 0, width - 1, height - 2))),
        "flipped": encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }


@pytest.fixture
def world(lab, tmp_path):
    """Splits of smooth images, and a corpus with copies of some of them."""
    folder = tmp_path / "smooth"
    dev = [(f"d{i}", encoded(picture(i)), i % 3) for i in range(6)]
    test = [(f"t{i}", encoded(picture(100 + i)), i % 3) for i in range(6)]
    planted = [(name, data, None) for name, data in copies_of(picture(2)).items()]
    lab.write_split(folder / "dev", {"dev-0": dev})
    lab.write_split(folder / "test", {"test-0": test[:3], "test-1": test[3:]})
    others = [(f"u{i}", encoded(picture(200 + i)), None) for i in range(20)]
    shards = {
        "corpus-0": [*others[:8], *planted],
        "corpus-1": others[8:14],
        "corpus-2": [*others[14:], ("copy", encoded(picture(104), "JPEG"), None)],
    }
    lab.write_split(folder / "corpus", shards)
    corpora = {name: lab.index_into(lab.store, folder / name) for name in ("dev", "test", "corpus")}
    return lab.with_corpora(dev=corpora["dev"], test=corpora["test"], unlabeled=corpora["corpus"])


def specify(world, *, with_test=True, **config):
    return guarding.specify(
        NearDuplicatesConfig(**config),
        corpus=world.unlabeled.digest,
        dev=world.dev.digest,
        test=world.test.digest if with_test else None,
    )


def run(world, specification, stems=None, *, max_bad_samples=0):
    store = world.store
    images = guarding.read_split_images(store, specification, max_bad_samples=0)
    stems = stems or [shard.stem for shard in world.unlabeled.shards]
    done = guarding.search_shards(
        store, specification, stems, images, max_bad_samples=max_bad_samples
    )
    return list(done)


def found(world, specification):
    manifest = guarding.finish(world.store, specification, seconds=0.0)
    return manifest, {
        f"{stem}/{leak.key}": (leak.split, leak.of)
        for stem, leaks in read_leaks(world.store, manifest).items()
        for leak in leaks
    }


def test_planted_copies_are_found_with_what_they_are_copies_of(world):
    specification = specify(world)
    assert run(world, specification) == [13, 6, 7]
    manifest, leaks = found(world, specification)
    assert leaks == {
        f"corpus-0/{name}": ("dev", "dev-0/d2")
        for name in ("jpeg", "half", "double", "cut", "flipped")
    } | {"corpus-2/copy": ("test", "test-1/t4")}
    assert manifest.counts == {
        "samples": 26,
        "searched": 26,
        "leaked": 6,
        "leaked_from_dev": 5,
        "leaked_from_test": 1,
    }
    assert manifest == specification.result(world.store)


def test_without_a_test_split_dev_is_guarded_alone(world):
    specification = specify(world, with_test=False)
    run(world, specification)
    manifest, leaks = found(world, specification)
    assert set(manifest.inputs) == {"descriptor", "corpus", "dev"}
    assert {split for split, _ in leaks.values()} == {"dev"}
    assert manifest.counts["leaked"] == 5


def test_labels_of_the_splits_are_not_read(world, tmp_path):
    specification = specify(world)
    run(world, specification)
    _, leaks = found(world, specification)
    other = world.in_empty_store(tmp_path / "other-store")
    names = ("dev", "test")
    unlabeled = {}
    for name in names:
        corpus = getattr(world, name)
        folder = tmp_path / "without-labels" / name
        originals = {"dev": [(f"d{i}", picture(i)) for i in range(6)]}
        originals["test"] = [(f"t{i}", picture(100 + i)) for i in range(6)]
        samples = [(key, encoded(image), None) for key, image in originals[name]]
        cut = {"dev": {"dev-0": samples}, "test": {"test-0": samples[:3], "test-1": samples[3:]}}
        world.write_split(folder, cut[name], class_names=None)
        unlabeled[name] = other.index_into(other.store, folder)
        assert unlabeled[name].num_samples == corpus.num_samples
    save_corpus(other.store, world.unlabeled, load_locations(world.store, world.unlabeled.digest))
    bare = other.with_corpora(unlabeled=world.unlabeled, **unlabeled)
    specification = specify(bare)
    run(bare, specification)
    assert found(bare, specification)[1] == leaks


def test_a_guard_that_was_cut_off_goes_on_with_the_shards_left(world):
    specification = specify(world)
    assert run(world, specification, ["corpus-1"]) == [6]
    left = guarding.shards_to_search(world.store, specification)
    assert [shard.stem for shard in left] == ["corpus-0", "corpus-2"]
    with pytest.raises(ValueError, match="2 of 3 shards are not searched, first corpus-0"):
        guarding.finish(world.store, specification, seconds=0.0)
    run(world, specification, [shard.stem for shard in left])
    assert found(world, specification)[0].counts["leaked"] == 6


def test_another_threshold_reads_descriptors_and_no_shard(world):
    first = specify(world)
    run(world, first)
    corpus = world.unlabeled
    save_corpus(world.store, corpus, {shard.stem: "/nowhere" for shard in corpus.shards})
    strict = specify(world, threshold=1.0)
    assert strict.fingerprint != first.fingerprint
    run(world, strict)
    assert found(world, strict)[0].counts["leaked"] <= 1


def test_a_shard_in_two_corpora_is_described_once(world, tmp_path):
    first = specify(world)
    run(world, first)
    grown = world.unlabeled.of(
        [*world.unlabeled.shards, *world.dev.shards], world.unlabeled.class_names
    )
    locations = load_locations(world.store, world.dev.digest)
    save_corpus(
        world.store, grown, locations | {s.stem: "/nowhere" for s in world.unlabeled.shards}
    )
    second = specify(world.with_corpora(unlabeled=grown))
    run(world.with_corpora(unlabeled=grown), second)
    # The dev split's own images are copies of themselves.
    counts = guarding.finish(world.store, second, seconds=0.0).counts
    assert (counts["leaked"], counts["leaked_from_dev"]) == (12, 11)


def test_undecodable_images_are_counted_and_left_out(world, tmp_path):
    samples = [("good", encoded(picture(3)), None), ("bad", encoded(picture(5))[:80], None)]
    folder = world.write_split(tmp_path / "damaged", {"damaged-0": samples})
    damaged = world.with_corpora(unlabeled=world.index_into(world.store, folder))
    specification = specify(damaged)
    with pytest.raises(TooManyBadSamples, match="damaged-0: 1 undecodable"):
        run(damaged, specification)
    run(damaged, specification, max_bad_samples=1)
    manifest, leaks = found(damaged, specification)
    assert leaks == {"damaged-0/good": ("dev", "dev-0/d3")}
    assert (manifest.counts["samples"], manifest.counts["searched"]) == (2, 1)


def test_thumbnails_are_means_over_areas_whatever_the_aspect():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 64:] = 200
    small = thumbnail(encoded(Image.fromarray(pixels)), where="x")
    assert small.shape == (32, 32, 3)
    assert small[:, :16].max() == 0
    assert small[:, 16:].min() == 200
