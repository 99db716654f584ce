"""Items of an opened shard: views, copies, and what happens to images that cannot be decoded."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from models.noise import NoCropConfig, NoiseConfig, RandomResizedConfig
from models.randomness import hash_keys
from storage.samples import RawSample
from tasks.images import BadImage
from tasks.shard_items import (
    BadSampleBudget,
    ShardItems,
    Targets,
    TooManyBadSamples,
    draw_crops,
    scaled_box,
)

BAD = b"not an image at all"


@pytest.fixture(scope="module")
def decoders():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def make_items(lab):
    def make(*, bad=(), limit=0, copies=(1, 1, 1, 1), size=8):
        """Samples 0..3 of shard s; those in `bad` cannot be decoded."""
        images = [BAD if i in bad else lab.png(i % 3, i, size=size) for i in range(len(copies))]
        samples = [
            RawSample(f"s/{i}", memoryview(image), "png", None, 0) for i, image in enumerate(images)
        ]
        sample_of = np.repeat(np.arange(len(copies)), copies)
        return ShardItems(
            samples,
            sample_of=sample_of,
            copies=np.concatenate([np.arange(n) for n in copies]),
            key_hashes=hash_keys([samples[i].key for i in sample_of]).view(np.int64),
            targets=Targets(labels=sample_of * 10),
            budget=BadSampleBudget("s", limit),
        )

    return make


def fetch(items, wanted, decoders, config, *, epochs=None, stream=1):
    """The items found, (n,), and one view of each, decoded side by side."""

    def decode(item, epoch):
        return items.decode(item, epoch, (stream,), config)

    decoded = list(decoders.map(decode, wanted, epochs or [0] * len(wanted)))
    return np.array([found for found, _ in decoded]), [views[0] for _, views in decoded]


def test_views_come_in_the_order_that_was_asked_for(lab, make_items, decoders):
    items = make_items()
    found, views = fetch(items, [2, 0, 3, 2], decoders, lab.config())
    assert found.tolist() == [2, 0, 3, 2]
    alone = [fetch(items, [i], decoders, lab.config())[1][0] for i in range(4)]
    for view, i in zip(views, [2, 0, 3, 2], strict=True):
        np.testing.assert_array_equal(view, alone[i])
    assert [v.shape for v in views] == [(8, 8, 3)] * 4
    assert len({v.tobytes() for v in alone}) == 4


def test_copies_of_an_image_share_its_view(lab, make_items, decoders):
    # Items 0, 1 are sample 0; item 2 is sample 1; items 3, 4, 5 are sample 2.
    items = make_items(copies=(2, 1, 3))
    found, views = fetch(items, [0, 1, 2, 3, 5], decoders, lab.config())
    assert found.tolist() == [0, 1, 2, 3, 5]
    assert items.copies[found].tolist() == [0, 1, 0, 0, 2]
    np.testing.assert_array_equal(views[0], views[1])
    np.testing.assert_array_equal(views[3], views[4])
    assert views[1].tobytes() != views[2].tobytes()


def test_an_undecodable_image_is_replaced_by_the_next_item_and_counted(lab, make_items, decoders):
    items = make_items(bad={1}, limit=1)
    found, views = fetch(items, [0, 1, 2], decoders, lab.config())
    # The item that took its place brings its own label and key.
    assert found.tolist() == [0, 2, 2]
    assert items.targets.labels is not None
    assert items.targets.labels[found].tolist() == [0, 20, 20]
    np.testing.assert_array_equal(views[1], views[2])
    assert list(items.budget.reasons) == ["s/1"]
    fetch(items, [1, 1], decoders, lab.config())
    assert len(items.budget.reasons) == 1  # an image counts once, however often it is met


def test_the_last_item_is_replaced_by_the_first(lab, make_items, decoders):
    found, _ = fetch(make_items(bad={3}, limit=1), [3], decoders, lab.config())
    assert found.tolist() == [0]


def test_bad_neighbours_are_passed_over_together(lab, make_items, decoders):
    items = make_items(bad={1, 2}, limit=2)
    found, _ = fetch(items, [1], decoders, lab.config())
    assert found.tolist() == [3]
    assert sorted(items.budget.reasons) == ["s/1", "s/2"]


def test_more_bad_images_than_allowed_name_shard_key_limit_and_remedy(lab, make_items, decoders):
    with pytest.raises(TooManyBadSamples) as caught:
        fetch(make_items(bad={1, 2}, limit=1), [1], decoders, lab.config())
    message = str(caught.value)
    assert "shard s: 2 undecodable images" in message
    assert "max_bad_samples=1" in message
    assert "s/2" in message
    assert "Repair the shard, or raise max_bad_samples" in message


def test_a_shard_without_any_decodable_image_is_an_error_whatever_the_limit(
    lab, make_items, decoders
):
    with pytest.raises(TooManyBadSamples, match="shard s: no image could be decoded"):
        fetch(make_items(bad={0, 1, 2, 3}, limit=99), [0], decoders, lab.config())


def test_random_resized_crops_differ_by_copy_and_epoch_only(lab, make_items, decoders):
    config = lab.config(noise=NoiseConfig(crop=RandomResizedConfig(scale=(0.1, 0.5))))
    items = make_items(copies=(2, 1, 1), size=32)
    _, views = fetch(items, [0, 1, 0, 0], decoders, config, epochs=[0, 0, 1, 0])
    copy0, copy1, epoch1, again = (view.tobytes() for view in views)
    assert again == copy0
    assert len({copy0, copy1, epoch1}) == 3
    assert views[0].shape == (8, 8, 3)
    _, other = fetch(items, [0], decoders, config, stream=2)
    assert other[0].tobytes() != copy0


def test_the_budget_allows_its_limit_and_refuses_the_next():
    budget = BadSampleBudget("a-7", 2)
    budget.spend("a-7/x", BadImage("a-7/x: cut"))
    budget.spend("a-7/x", BadImage("a-7/x: cut"))
    budget.spend("a-7/y", BadImage("a-7/y: cut"))
    assert budget.reasons == {"a-7/x": "a-7/x: cut", "a-7/y": "a-7/y: cut"}
    with pytest.raises(TooManyBadSamples, match=r"a-7: 3 undecodable .*a-7/z: not"):
        budget.spend("a-7/z", BadImage("a-7/z: not an image"))


def jpeg_items(sizes):
    """Smooth JPEGs of these sizes, one item each."""
    samples = []
    for i, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x % 256, y % 256, (x + y + 40 * i) % 256], axis=-1) // 2
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
        samples.append(RawSample(f"s/{i}", memoryview(buffer.getvalue()), "jpg", None, 0))
    return ShardItems(
        samples,
        sample_of=np.arange(len(samples)),
        copies=np.zeros(len(samples), np.int64),
        key_hashes=hash_keys([s.key for s in samples]).view(np.int64),
        targets=Targets(),
        budget=BadSampleBudget("s", 0),
    )


@pytest.mark.parametrize("crop", [NoCropConfig(), RandomResizedConfig(scale=(0.5, 1.0))])
def test_reduced_decoding_shows_the_same_part_of_an_image(lab, decoders, crop):
    items = jpeg_items([(200, 140), (140, 200), (301, 97)])
    noise = NoiseConfig(crop=crop)
    full, reduced = (lab.config(noise=noise, decode=decode) for decode in ("full", "reduced"))
    for whole, part in zip(
        fetch(items, [0, 1, 2], decoders, full)[1],
        fetch(items, [0, 1, 2], decoders, reduced)[1],
        strict=True,
    ):
        assert part.shape == (8, 8, 3)
        # The longer side is resized to whole pixels, here 24 or 23 of which 8 are cut: up to half
        # a pixel. Known-broken variant: a box not scaled with its image: more than 30.
        assert 0 < float(np.abs(whole.astype(int) - part).mean()) < 8


def test_reduced_decoding_changes_nothing_where_the_view_needs_all_pixels(lab, decoders):
    items = jpeg_items([(15, 12)])  # half of 12 is less than 8
    full, reduced = (lab.config(decode=decode) for decode in ("full", "reduced"))
    np.testing.assert_array_equal(
        fetch(items, [0], decoders, full)[1][0], fetch(items, [0], decoders, reduced)[1][0]
    )


def test_a_box_keeps_its_place_in_the_reduced_image():
    # 101 pixels become 26 at a quarter (rounded up): the place is by share, 50 / 101 * 26.
    left, top, right, bottom = scaled_box((50, 20, 101, 40), (101, 40), (26, 10))
    assert (left, top) == pytest.approx((12.871287, 5.0))
    assert (right, bottom) == (26, 10)  # not a rounding error beyond, which would be refused


def test_boxes_drawn_for_a_batch_are_those_drawn_one_by_one():
    crop, n = RandomResizedConfig(), 40
    rng = np.random.default_rng(0)
    keys, copies = rng.integers(-(2**62), 2**62, n), rng.integers(0, 4, n)
    epochs, widths, heights = rng.integers(0, 9, n), rng.integers(30, 900, n), np.full(n, 300)
    together = draw_crops(crop, 7, keys, copies, epochs, widths, heights)
    alone = [
        draw_crops(crop, 7, *(a[i : i + 1] for a in (keys, copies, epochs, widths, heights)))[0]
        for i in range(n)
    ]
    assert together == alone
    assert len(set(together)) == n
