"""Near-duplicates: descriptors by hand, and copies that are found and look-alikes that are not."""

import numpy as np
import pytest
import torch

from models import near_duplicates
from models.leak_guard_config import NearDuplicatesConfig
from models.near_duplicates import NUM_COEFFICIENTS, References, describe, find_near_duplicates


def scenes(count, *, seed=0, size=40):
    """Smooth random images, (N, size, size, 3) uint8: noise of 5 x 5 cells, interpolated."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return smooth.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def thumbnails(images):
    """Means over areas, (N, 32, 32, 3)."""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(planes, size=32, mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def found(copies, references, threshold=0.97):
    return find_near_duplicates(
        describe(thumbnails(copies)), References.of(thumbnails(references)), threshold=threshold
    )


def test_a_vertical_edge_has_the_coefficients_worked_by_hand():
    edge = np.zeros((1, 32, 32, 3), np.uint8)
    edge[:, :, 16:] = 255
    values = describe(edge)[0]
    # Luma's mean: 16 cells a side of mean 127.5, 16 * 127.5 = 2040.
    assert values[0] == pytest.approx(2040, rel=1e-5)
    # First horizontal frequency: 4 (of 16 equal rows) * sqrt(2/16) * 255 * sum of
    # cos(pi (j + 1/2) / 16) over j = 8..15, which is -1 / (2 sin(pi / 32)) = -5.101148.
    assert values[1] == pytest.approx(4 * np.sqrt(1 / 8) * 255 * -5.101148, rel=1e-5)
    # The edge is odd about the middle: no even frequencies; nothing changes downwards, and it is
    # grey: no chroma.
    assert np.abs(values[2:8:2]).max() < 1e-2
    assert np.abs(values[8:]).max() < 1e-2
    assert values.shape == (NUM_COEFFICIENTS,)


def test_a_color_is_in_the_means_of_chroma():
    blue = np.zeros((1, 32, 32, 3), np.uint8)
    blue[..., 2] = 200
    values = describe(blue)[0]
    # 16 * 200 times blue's share of luma, of blue chroma and of red chroma.
    assert values[0] == pytest.approx(16 * 200 * 0.114, rel=1e-4)
    assert values[64] == pytest.approx(16 * 200 * 0.5, rel=1e-4)
    assert values[80] == pytest.approx(16 * 200 * -0.081312, rel=1e-4)


def test_an_image_is_its_own_copy_at_similarity_one():
    images = scenes(20)
    matches = found(images, images)
    assert matches.rows.tolist() == matches.references.tolist() == list(range(20))
    assert matches.similarities == pytest.approx(np.ones(20), abs=1e-5)


def test_other_images_are_no_copies():
    matches = found(scenes(200, seed=1), scenes(200, seed=2))
    assert matches.rows.tolist() == []


def test_mirrored_brightened_and_noisy_copies_are_found():
    images = scenes(30)
    noise = np.random.default_rng(3).normal(0, 6, images.shape)
    copies = [
        images[:, :, ::-1],
        np.clip(images * 0.8 + 30, 0, 255).astype(np.uint8),
        np.clip(images + noise, 0, 255).astype(np.uint8),
    ]
    for copy in copies:
        matches = found(np.ascontiguousarray(copy), images)
        assert matches.references.tolist() == list(range(30))


def test_an_image_on_its_head_is_no_copy():
    images = scenes(30)
    assert found(np.ascontiguousarray(images[:, ::-1]), images).rows.tolist() == []


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_copies_without_a_few_pixels_at_the_borders_are_found(is_mirrored):
    images = scenes(60)
    rng = np.random.default_rng(4)
    copies = []
    for image in images:
        left, top, right, bottom = rng.integers(0, 3, 4)  # of 40: up to 5 % at each border
        cut = image[top : 40 - bottom, left : 40 - right]
        copies.append(thumbnails(np.ascontiguousarray(cut)[None])[0])
    stacked = np.stack(copies)
    if is_mirrored:
        stacked = np.ascontiguousarray(stacked[:, :, ::-1])
    references = References.of(thumbnails(images))
    matches = find_near_duplicates(describe(stacked), references, threshold=0.97)
    assert matches.references.tolist() == list(range(60))


def test_crops_decide_where_whole_images_would_not(monkeypatch):
    image = scenes(1, seed=5)
    cut = np.ascontiguousarray(image[:, :38, 2:])
    whole = found(cut, image, threshold=0.92).similarities
    monkeypatch.setattr(near_duplicates, "_CUTS", ((0, 0),))
    without_crops = found(cut, image, threshold=0.92).similarities
    assert whole > 0.995 > without_crops


def test_a_descriptor_in_half_precision_finds_the_same():
    images = scenes(20)
    references = References.of(thumbnails(images))
    values = describe(thumbnails(images[:, :, ::-1].copy()))
    full = find_near_duplicates(values, references, threshold=0.97)
    half = find_near_duplicates(values.astype(np.float16), references, threshold=0.97)
    assert half.rows.tolist() == full.rows.tolist()
    assert half.similarities == pytest.approx(full.similarities, abs=1e-3)


def test_images_of_one_color_are_copies_of_none():
    flat = np.full((3, 40, 40, 3), 90, np.uint8)
    assert found(flat, flat).rows.tolist() == []


def test_the_most_similar_reference_is_named_and_of_equal_ones_the_first():
    image, other = scenes(2)
    noisy = np.clip(image + np.random.default_rng(6).normal(0, 20, image.shape), 0, 255)
    references = np.stack([other, noisy.astype(np.uint8), image, image])
    matches = found(image[None], references)
    assert matches.references.tolist() == [2]


def test_blocks_change_nothing(monkeypatch):
    images = scenes(50)
    copies = np.concatenate([images[10:40], scenes(20, seed=9)])
    whole = found(copies, images)
    for name, size in (("_ROWS", 7), ("_COLUMNS", 11), ("_PAIRS", 3)):
        monkeypatch.setattr(near_duplicates, name, size)
    cut = found(copies, images)
    assert cut.rows.tolist() == whole.rows.tolist() == list(range(30))
    assert cut.references.tolist() == whole.references.tolist() == list(range(10, 40))
    assert cut.similarities == pytest.approx(whole.similarities, abs=1e-6)


def test_where_all_look_alike_the_nearest_are_compared(monkeypatch):
    image = scenes(1)
    rng = np.random.default_rng(7)
    alike = np.clip(image + rng.normal(0, 8, (40, *image.shape[1:])), 0, 255).astype(np.uint8)
    monkeypatch.setattr(near_duplicates, "_MAX_CANDIDATES", 2)
    assert found(alike[17:18], alike).references.tolist() == [17]


def test_no_images_have_no_copies():
    none = np.zeros((0, 40, 40, 3), np.uint8)
    values = np.zeros((0, NUM_COEFFICIENTS), np.float16)
    references = References.of(thumbnails(scenes(2)))
    assert find_near_duplicates(values, references, threshold=0.97).rows.tolist() == []
    with pytest.raises(ValueError, match="no references"):
        References.of(thumbnails(none) if len(none) else np.zeros((0, 32, 32, 3), np.uint8))


def test_what_is_no_descriptor_or_thumbnail_is_refused():
    references = References.of(thumbnails(scenes(1)))
    with pytest.raises(ValueError, match=r"descriptors must be \(N, 96\)"):
        find_near_duplicates(np.zeros((1, 95)), references, threshold=0.97)
    with pytest.raises(ValueError, match=r"threshold must be in \[0.92, 1\], not 0.5"):
        find_near_duplicates(np.zeros((1, 96)), references, threshold=0.5)
    with pytest.raises(ValueError, match=r"thumbnails must be \(N, 32, 32, 3\) uint8"):
        describe(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.92"):
        NearDuplicatesConfig(threshold=0.7)
