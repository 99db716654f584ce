"""RandAugment: each operation against torchvision's, and what is drawn."""

import math
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from pydantic import ValidationError
from torch import Tensor

from models.draws import Draws, input_draws, key_hash_tensor
from models.noise import NoiseConfig, RandAugmentConfig, apply_input_noise
from models.noise import image_operations as ops
from models.noise.geometry import centered_maps, identity_maps
from models.noise.randaugment import Operation, drawn_operations, num_operations, randaugment


def _images(n: int = 6, size: int = 32) -> Tensor:
    """Return smooth and noisy uint8 images of several contrasts, one of them constant."""
    generator = torch.Generator().manual_seed(n * 1000 + size)
    noise = torch.rand(n, 3, size, size, generator=generator)
    ramp = torch.linspace(0, 1, size)
    images = 0.5 * noise + 0.5 * (ramp[:, None] * ramp)
    low = torch.linspace(0, 0.4, n)[:, None, None, None]
    high = torch.linspace(1, 0.6, n)[:, None, None, None]
    uint8 = ((low + images * (high - low)) * 255).to(torch.uint8)
    uint8[-1] = 77
    return uint8


def _full(value: float, n: int = 6) -> Tensor:
    return torch.full((n,), value)


def _assert_close(ours: Tensor, theirs: Tensor, tolerance: int) -> None:
    assert torch.equal(ours, ours.round())
    assert float((ours - theirs.float()).abs().max()) <= tolerance


def _assert_pixels_equal(ours: Tensor, theirs: Tensor, share_different: float) -> None:
    """Nearest-pixel maps agree but for positions that lie between two pixels."""
    assert float((ours != theirs.float()).float().mean()) <= share_different


# Operations without blending are equal; a blend may differ by one where a cut-off value lies
# within float rounding of a whole number (torchvision orders the same sum differently).


def test_invert_equals_torchvision() -> None:
    images = _images()
    _assert_close(ops.invert(images.float()), TF.invert(images), 0)


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8])
def test_posterize_equals_torchvision(bits: int) -> None:
    images = _images()
    _assert_close(ops.posterize(images.float(), _full(bits)), TF.posterize(images, bits), 0)


def test_posterize_to_more_than_8_bits_changes_nothing_and_to_0_bits_keeps_one() -> None:
    images = _images().float()
    assert torch.equal(ops.posterize(images, _full(10)), images)
    assert torch.equal(ops.posterize(images, _full(0)), ops.posterize(images, _full(1)))


@pytest.mark.parametrize("threshold", [0, 128, 230, 255])
def test_solarize_equals_torchvision(threshold: int) -> None:
    images = _images()
    ours = ops.solarize(images.float(), _full(threshold))
    _assert_close(ours, TF.solarize(images, float(threshold)), 0)


def test_solarize_above_255_changes_nothing() -> None:
    # magnitude 27: threshold int(27 / 10 * 256) = 691
    images = _images().float()
    assert torch.equal(ops.solarize(images, _full(691)), images)


def test_solarize_add_changes_values_below_128_only() -> None:
    images = torch.tensor([0.0, 27.0, 127.0, 128.0, 255.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    # 0 + 99, 27 + 99, 127 + 99
    assert ops.solarize_add(images, _full(99, 1))[0, 0, 0].tolist() == [99, 126, 226, 128, 255]
    # 127 + 297 is cut to 255
    assert ops.solarize_add(images, _full(297, 1))[0, 0, 0].tolist() == [255, 255, 255, 128, 255]


def test_autocontrast_equals_torchvision_within_one() -> None:
    images = _images()
    _assert_close(ops.autocontrast(images.float()), TF.autocontrast(images), 1)
    assert torch.equal(ops.autocontrast(images.float())[-1], images[-1].float())


@pytest.mark.parametrize("size", [4, 17, 32, 64])
def test_equalize_equals_torchvision(size: int) -> None:
    images = _images(size=size)
    _assert_close(ops.equalize(images.float()), TF.equalize(images), 0)


@pytest.mark.parametrize("factor", [0.1, 0.9, 1.0, 1.72, 4.96])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ops.color, TF.adjust_saturation),
        (ops.brightness, TF.adjust_brightness),
        (ops.sharpness, TF.adjust_sharpness),
    ],
)
def test_enhancements_equal_torchvision_within_one(ours: Any, theirs: Any, factor: float) -> None:
    images = _images()
    _assert_close(ours(images.float(), _full(factor)), theirs(images, factor), 1 + round(factor))


@pytest.mark.parametrize("factor", [0.1, 1.72, 4.96])
def test_contrast_equals_torchvision_up_to_the_cut_mean(factor: float) -> None:
    # We cut the mean grey value to a whole number, as 8-bit code must: |1 - factor| more at most.
    images = _images()
    tolerance = 1 + math.ceil(abs(1 - factor))
    _assert_close(
        ops.contrast(images.float(), _full(factor)), TF.adjust_contrast(images, factor), tolerance
    )


@pytest.mark.parametrize("degrees", [-27.0, 12.0, 81.0])
def test_rotation_equals_torchvision(degrees: float) -> None:
    images = _images()
    angle = _full(math.radians(degrees))
    cos, sin = torch.cos(angle), torch.sin(angle)
    linear = torch.stack((cos, -sin, sin, cos), dim=1).view(-1, 2, 2)
    ours = ops.move(images.float(), centered_maps(linear, torch.zeros(6, 2), 32, 32))
    _assert_pixels_equal(ours, TF.rotate(images, degrees, fill=[128.0]), 0.002)


@pytest.mark.parametrize("level", [-0.27, 0.1, 0.81])
@pytest.mark.parametrize("axis", [0, 1])
def test_shear_equals_torchvision(level: float, axis: int) -> None:
    images = _images()
    maps = identity_maps(6)
    maps[:, axis, 1 - axis] = level
    degrees = [0.0, 0.0]
    # both name the position that is read: torchvision shears the content by -tan
    degrees[axis] = math.degrees(math.atan(level))
    theirs = TF.affine(
        images, 0.0, [0, 0], 1.0, degrees, fill=[128.0], center=[0.5, 0.5]
    )  # the centre of the top left pixel
    _assert_pixels_equal(ops.move(images.float(), maps), theirs, 0.03)


@pytest.mark.parametrize("pixels", [-9, 0, 5, 40])
def test_translation_equals_torchvision(pixels: int) -> None:
    images = _images()
    maps = identity_maps(6)
    maps[:, 0, 2] = float(pixels)
    theirs = TF.affine(images, 0.0, [-pixels, 0], 1.0, [0.0, 0.0], fill=[128.0])
    _assert_pixels_equal(ops.move(images.float(), maps), theirs, 0.0)


def test_cut_out_fills_a_clipped_square() -> None:
    images = torch.zeros(2, 3, 8, 8)
    out = ops.cut_out(images, torch.tensor([[4, 4], [0, 7]]), _full(2, 2))
    # rows and columns 2..5: 16 pixels; at the corner rows 0..1, columns 5..7: 6 pixels
    assert (out == 128).sum((1, 2, 3)).tolist() == [48, 18]
    assert out[0, 0, 2:6, 2:6].eq(128).all()
    assert out[1, 0, 0:2, 5:8].eq(128).all()


def _draws(n: int, *, stream: int = 5, epoch: int = 0) -> Draws:
    keys = [f"shard/{i}" for i in range(n)]
    return input_draws(
        stream,
        key_hash_tensor(keys),
        torch.zeros(n, dtype=torch.int64),
        torch.full((n,), epoch),
    )


@pytest.mark.parametrize(("convention", "count"), [("tf_extrapolate", 16), ("clip10", 15)])
def test_operations_are_drawn_uniformly_in_every_layer(convention: Any, count: int) -> None:
    config = RandAugmentConfig(convention=convention, num_ops=3)
    assert num_operations(config) == count
    drawn = drawn_operations(config, _draws(20_000))
    for layer in range(3):
        frequency = torch.bincount(drawn[:, layer], minlength=count)
        assert len(frequency) == count
        # 20,000 / 16 = 1250, sigma = sqrt(20000 / 16 * 15 / 16) = 34.2; 5 sigma = 171 (15: 176)
        assert float((frequency - 20_000 / count).abs().max()) < 176


def test_layers_are_drawn_independently() -> None:
    drawn = drawn_operations(RandAugmentConfig(), _draws(20_000))
    # P(equal) = 1/16; sigma = sqrt(20000 * 1/16 * 15/16) = 34.2; 5 sigma = 171
    assert abs(int((drawn[:, 0] == drawn[:, 1]).sum()) - 1250) < 171


def test_operations_are_applied_with_their_probability() -> None:
    drawn = drawn_operations(RandAugmentConfig(op_prob=0.5), _draws(20_000))
    # 40,000 draws: sigma of the share = .5 / 200 = .0025; 5 sigma = .0125
    assert abs(float((drawn >= 0).float().mean()) - 0.5) < 0.0125
    assert (drawn_operations(RandAugmentConfig(op_prob=1.0), _draws(20_000)) >= 0).all()
    assert (drawn_operations(RandAugmentConfig(op_prob=0.0), _draws(20_000)) == -1).all()


def test_without_an_applied_operation_the_image_stays() -> None:
    images = _images().float()
    assert torch.equal(randaugment(images, RandAugmentConfig(op_prob=0.0), _draws(6)), images)


def test_the_input_is_not_written_to() -> None:
    images = _images(64).float()
    before = images.clone()
    randaugment(images, RandAugmentConfig(), _draws(64))
    assert torch.equal(images, before)


def test_translation_moves_by_the_magnitude_in_both_directions() -> None:
    # 32 pixels at magnitude 10: 32 // 8 = 4 pixels
    config = RandAugmentConfig(num_ops=1, magnitude=10)
    draws = _draws(600)
    chosen = (drawn_operations(config, draws)[:, 0] == Operation.TRANSLATE_X).nonzero()[:, 0]
    ramp = torch.arange(32.0).expand(len(chosen), 3, 32, 32)
    middles = randaugment(ramp, config, draws.select(chosen))[:, 0, 0, 16]
    assert set(middles.tolist()) == {12.0, 20.0}


@pytest.mark.parametrize(
    ("fields", "size", "shift"),
    [
        # 100 / 224 * 448 = 200 pixels at 10, times 1.8 at magnitude 18 = 360: extrapolated
        ({"magnitude": 18}, 448, 360),
        ({"magnitude": 5, "translate_pixels": 100}, 448, 50),
        # clip10: .45 * 40 = 18 at every magnitude from 10
        ({"magnitude": 27, "convention": "clip10"}, 40, 18),
        ({"magnitude": 5, "convention": "clip10"}, 40, 9),
    ],
)
def test_magnitude_conventions(fields: dict[str, Any], size: int, shift: int) -> None:
    config = RandAugmentConfig(num_ops=1, **fields)
    draws = _draws(300)
    chosen = (drawn_operations(config, draws)[:, 0] == Operation.TRANSLATE_Y).nonzero()[:, 0]
    images = torch.zeros(len(chosen), 3, size, 2)
    out = randaugment(images, config, draws.select(chosen))
    # as many rows of each image are filled as it was moved by
    assert set((out[:, 0, :, 0] == 128).sum(1).tolist()) == {shift}


def test_cutout_half_side_is_that_of_the_released_code() -> None:
    # magnitude 10 at 224 pixels: half side 40; away from the border 80 x 80 pixels
    config = RandAugmentConfig(num_ops=1, magnitude=10)
    draws = _draws(400)
    chosen = (drawn_operations(config, draws)[:, 0] == Operation.CUTOUT).nonzero()[:, 0]
    out = randaugment(torch.zeros(len(chosen), 3, 224, 224), config, draws.select(chosen))
    assert int((out[:, 0] == 128).sum((1, 2)).max()) == 6400


def test_a_float_image_is_rounded_to_eight_bits() -> None:
    images = _images(64)
    config = NoiseConfig(horizontal_flip=False, randaugment=RandAugmentConfig())
    draws = _draws(64)
    assert torch.equal(
        apply_input_noise(images.float() / 255, config, draws),
        apply_input_noise(images, config, draws),
    )


def test_pixels_that_clip10_would_ignore_are_refused() -> None:
    with pytest.raises(ValidationError, match="clip10 would ignore"):
        RandAugmentConfig(convention="clip10", cutout_pixels=4)


def test_images_laid_out_channels_last_give_the_same_result():
    # As batches are assembled: (B, H, W, 3) permuted, never copied.
    images = torch.randint(0, 256, (32, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    keys = key_hash_tensor([str(i) for i in range(32)])
    draws = input_draws(7, keys, torch.zeros(32), torch.zeros(32))
    config = NoiseConfig(horizontal_flip=False, randaugment=RandAugmentConfig())
    assert torch.equal(
        apply_input_noise(images, config, draws),
        apply_input_noise(images.contiguous(), config, draws),
    )
