"""Input noise: crops, flips, affine maps, cutout, and what it depends on."""

import math
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from pydantic import ValidationError
from torch import Tensor

from models.draws import Draws, input_draws, key_hash_tensor
from models.noise import (
    AffineConfig,
    CutoutConfig,
    NoiseConfig,
    PadShiftConfig,
    RandAugmentConfig,
    RandomResizedConfig,
    StochasticDepthConfig,
    apply_input_noise,
    draw_boxes,
)
from models.noise.affine import affine_maps
from models.noise.geometry import centered_maps, identity_maps, warp_bilinear, warp_nearest

_EVERYTHING = NoiseConfig(
    crop=PadShiftConfig(pixels=3),
    affine=AffineConfig(shear=5.0),
    randaugment=RandAugmentConfig(num_ops=3, magnitude=12),
    cutout=CutoutConfig(fraction=0.3),
)


def _draws(n: int, *, stream: int = 5, copy: int = 0, epoch: int = 0) -> Draws:
    keys = [f"shard/{i}" for i in range(n)]
    return input_draws(
        stream, key_hash_tensor(keys), torch.full((n,), copy), torch.full((n,), epoch)
    )


def _images(n: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def test_noise_does_not_depend_on_batch_composition_or_order() -> None:
    images, draws = _images(97), _draws(97)
    whole = apply_input_noise(images, _EVERYTHING, draws)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[40:43]):
        alone = apply_input_noise(images[part], _EVERYTHING, draws.select(part))
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("change", [{"stream": 6}, {"copy": 1}, {"epoch": 1}])
def test_another_stream_copy_or_epoch_is_other_noise(change: dict[str, int]) -> None:
    images = _images(32)
    first = apply_input_noise(images, _EVERYTHING, _draws(32))
    other = apply_input_noise(images, _EVERYTHING, _draws(32, **change))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(apply_input_noise(images, _EVERYTHING, _draws(32)), first)


def test_adding_a_technique_does_not_shift_anothers_draws() -> None:
    images, draws = _images(32), _draws(32)
    plain = apply_input_noise(images, NoiseConfig(), draws)
    with_cutout = apply_input_noise(images, NoiseConfig(cutout=CutoutConfig(fraction=0.25)), draws)
    is_kept = with_cutout != 128 / 255
    assert torch.equal(with_cutout[is_kept], plain[is_kept])


def test_global_generators_are_neither_read_nor_moved() -> None:
    images, draws = _images(16), _draws(16)
    torch.manual_seed(0)
    first = apply_input_noise(images, _EVERYTHING, draws)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(apply_input_noise(images, _EVERYTHING, draws), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(16, 16), (9, 20)])
def test_noised_images_are_float32_within_0_and_1(size: tuple[int, int]) -> None:
    images = _images(64, *size)
    out = apply_input_noise(images, _EVERYTHING, _draws(64))
    assert out.dtype == torch.float32
    assert out.shape == images.shape
    assert float(out.min()) >= 0.0
    assert float(out.max()) <= 1.0


def test_without_noise_the_image_is_divided_by_255() -> None:
    images = _images(4)
    out = apply_input_noise(images, NoiseConfig(horizontal_flip=False), _draws(4))
    assert torch.equal(out, images.float() / 255)


def test_an_empty_batch_stays_empty() -> None:
    out = apply_input_noise(_images(0), _EVERYTHING, _draws(0))
    assert out.shape == (0, 3, 16, 16)


@pytest.mark.gpu
def test_noise_on_the_accelerator_is_that_of_the_cpu() -> None:
    images, draws = _images(256), _draws(256)
    on_cpu = apply_input_noise(images, _EVERYTHING, draws)
    for where in (draws, draws.to("cuda")):
        on_device = apply_input_noise(images.cuda(), _EVERYTHING, where).cpu()
        # cosines differ in their last bit: a pixel may be read from its neighbour
        assert float((on_device - on_cpu).abs().gt(0.01).float().mean()) < 0.01


def test_half_of_the_images_are_flipped() -> None:
    images = _images(2000, 2, 3)
    out = apply_input_noise(images, NoiseConfig(), _draws(2000))
    flipped = (out == images.flip(3).float() / 255).flatten(1).all(1)
    kept = (out == images.float() / 255).flatten(1).all(1)
    assert bool((flipped | kept).all())
    # sigma = sqrt(2000) / 2 = 22.4; 5 sigma = 112
    assert abs(int(flipped.sum()) - 1000) < 112


def test_pad_shift_cuts_a_window_of_the_reflected_image() -> None:
    images = _images(300, 6, 8)
    config = NoiseConfig(crop=PadShiftConfig(pixels=2), horizontal_flip=False)
    out = apply_input_noise(images, config, _draws(300)) * 255
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    windows = torch.stack(
        [padded[:, :, y : y + 6, x : x + 8] for y in range(5) for x in range(5)], dim=1
    )
    is_window = (windows - out[:, None]).abs().flatten(2).amax(2) < 0.01  # (B, 25)
    assert bool(is_window.any(1).all())
    assert bool(is_window.any(0).all())  # every shift occurs


def test_a_shift_beyond_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="below the image's sides, got 16 for 16 x 16"):
        apply_input_noise(_images(1), NoiseConfig(crop=PadShiftConfig(pixels=16)), _draws(1))


def test_boxes_lie_inside_and_keep_area_and_ratio() -> None:
    n = 5000
    widths, heights = torch.full((n,), 500), torch.full((n,), 375)
    boxes = draw_boxes(RandomResizedConfig(), _draws(n), widths, heights)
    assert boxes.dtype == torch.int64
    left, top, right, bottom = boxes.double().unbind(1)
    assert float(left.min()) >= 0
    assert float(top.min()) >= 0
    assert float(right.max()) <= 500
    assert float(bottom.max()) <= 375
    area = (right - left) * (bottom - top) / (500 * 375)
    ratio = (right - left) / (bottom - top)
    # whole pixels: a side of some 100 pixels is off by at most 1/2 %
    assert 0.078 < float(area.min()) < 0.1
    assert float(area.max()) > 0.9
    assert 0.74 < float(ratio.min()) < 0.78
    assert 1.29 < float(ratio.max()) < 1.35
    # torchvision 0.29's RandomResizedCrop.get_params, 5,000 draws on 375 x 500 (seed 0): mean area
    # .4352, std .2168; mean ratio 1.0464. 5 sigma of the difference = 5 * .2168 * sqrt(2 / 5000)
    assert abs(float(area.mean()) - 0.4352) < 0.0217
    assert abs(float(ratio.mean()) - 1.0464) < 0.02
    # positions are symmetric: the mean centre is the image's
    assert abs(float((left + right).mean()) / 2 - 250) < 5
    assert abs(float((top + bottom).mean()) / 2 - 187.5) < 5


def test_where_no_box_fits_the_largest_central_one_is_taken() -> None:
    # 1000 x 10 and scale 1: no box of ratio <= 4/3 has the image's area; the central is 13 x 10
    config = RandomResizedConfig(scale=(1.0, 1.0))
    boxes = draw_boxes(config, _draws(2), torch.tensor([1000, 10]), torch.tensor([10, 1000]))
    # width round(10 * 4/3) = 13, left floor(987 / 2) = 493; height round(10 / .75) = 13
    assert boxes.tolist() == [[493, 0, 506, 10], [0, 493, 10, 506]]


def test_a_box_does_not_depend_on_the_batch() -> None:
    widths, heights = torch.arange(20, 70), torch.arange(90, 40, -1)
    whole = draw_boxes(RandomResizedConfig(), _draws(50), widths, heights)
    part = torch.tensor([31, 4, 7])
    alone = draw_boxes(RandomResizedConfig(), _draws(50).select(part), widths[part], heights[part])
    assert torch.equal(alone, whole[part])


def test_the_box_of_a_tiny_image_is_a_pixel() -> None:
    one = torch.tensor([1])
    assert draw_boxes(RandomResizedConfig(), _draws(1), one, one).tolist() == [[0, 0, 1, 1]]


def test_cutout_squares_have_the_sides_of_the_config() -> None:
    images = torch.ones(500, 3, 16, 16)
    config = NoiseConfig(horizontal_flip=False, cutout=CutoutConfig(fraction=0.25))
    is_cut = apply_input_noise(images, config, _draws(500))[:, 0] != 1
    sizes = is_cut.sum((1, 2))
    # round(.25 * 16) = 4: 16 pixels inside, at a corner 2 x 2
    assert int(sizes.max()) == 16
    assert int(sizes.min()) == 4
    assert set(is_cut.any(2).sum(1).tolist()) <= {2, 3, 4}
    assert bool(is_cut.any(0).all())  # every pixel is cut in some image


def test_identity_maps_leave_images_alone() -> None:
    images = _images(3, 7, 9).float()
    assert torch.equal(warp_nearest(images, identity_maps(3), 128), images)
    assert torch.allclose(warp_bilinear(images, identity_maps(3), "zeros"), images, atol=1e-3)


def test_bilinear_warp_equals_torchvisions_affine() -> None:
    images = _images(2, 20, 30).float()
    radians = torch.full((2,), math.radians(25.0))
    cos, sin = torch.cos(radians) / 1.2, torch.sin(radians) / 1.2
    # torchvision turns the content by 25 degrees, magnifies by 1.2 and moves it by (3, -2); the
    # position that is read is the inverse of that
    linear = torch.stack((cos, sin, -sin, cos), dim=1).view(2, 2, 2)
    moved = torch.tensor([3.0, -2.0])
    maps = centered_maps(linear, -(linear @ moved), 20, 30)
    theirs = TF.affine(
        images, 25.0, [3, -2], 1.2, [0.0, 0.0], interpolation=TF.InterpolationMode.BILINEAR
    )
    assert torch.allclose(warp_bilinear(images, maps, "zeros"), theirs, atol=0.05)


def test_affine_maps_stay_within_their_ranges() -> None:
    config = AffineConfig(degrees=20, translate=0.1, scale=(0.8, 1.25), shear=0)
    maps = affine_maps(config, _draws(4000), 16, 24)
    determinant = maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0]
    zoom = determinant.rsqrt()
    angle = torch.atan2(maps[:, 0, 1], maps[:, 0, 0])
    center = torch.tensor([11.5, 7.5, 1.0])
    shift = (maps * center).sum(2) - center[:2]
    assert 0.8 - 1e-5 < float(zoom.min()) < 0.81
    assert 1.24 < float(zoom.max()) < 1.25 + 1e-5
    assert math.radians(19.8) < float(angle.max()) <= math.radians(20) + 1e-5
    assert math.radians(-20) - 1e-5 <= float(angle.min()) < math.radians(-19.8)
    # a tenth of 24 and of 16
    assert 2.37 < float(shift[:, 0].abs().max()) <= 2.4 + 1e-4
    assert 1.58 < float(shift[:, 1].abs().max()) <= 1.6 + 1e-4


def test_a_shear_of_45_degrees_moves_by_one_column_a_row() -> None:
    config = AffineConfig(degrees=0, translate=0, scale=(1, 1), shear=45)
    maps = affine_maps(config, _draws(4000), 8, 8)
    assert 0.99 < float(maps[:, 0, 1].max()) <= 1 + 1e-5
    assert torch.equal(maps[:, 1, :2], torch.tensor([[0.0, 1.0]]).expand(4000, 2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "\\(B, 3, H, W\\), got \\(2, 1, 8, 8\\)"),
        (torch.zeros(3, 3, 8, 8), "3 images and 2 draws"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int32), "uint8 or float"),
    ],
)
def test_images_of_another_shape_or_type_cannot_be_noised(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_input_noise(images, NoiseConfig(), _draws(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": {"kind": "centre"}}, "'none', 'pad_shift', 'random_resized'"),
        ({"crop": {"kind": "random_resized", "scale": (0.5, 0.1)}}, "crop.scale"),
        ({"crop": {"kind": "random_resized", "ratio": (0.0, 1.0)}}, "crop.ratio"),
        ({"affine": {"scale": (1.2, 0.8)}}, "affine.scale"),
        ({"dropout": 1.0}, "less than 1"),
        ({"mixup": 0.2}, "Extra inputs"),
    ],
)
def test_unknown_or_impossible_noise_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NoiseConfig.model_validate(fields)


def test_noise_configs_survive_json() -> None:
    config = _EVERYTHING.model_copy(
        update={"dropout": 0.3, "stochastic_depth": StochasticDepthConfig(rule="linear_huang")}
    )
    assert NoiseConfig.model_validate_json(config.model_dump_json()) == config
