"""Random erasing and Patch Gaussian: where they act, on how many images, and by how much."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import RandomErasing

from models.draws import Draws, input_draws, key_hash_tensor
from models.noise import (
    NoiseConfig,
    PatchGaussianConfig,
    RandomErasingConfig,
    apply_input_noise,
)
from models.noise.patch_gaussian import patch_gaussian
from models.noise.pixel_words import pixel_words
from models.noise.random_erasing import erased_boxes, random_erasing


def _draws(n: int, *, epoch: int = 0) -> Draws:
    keys = key_hash_tensor([f"shard/{i}" for i in range(n)])
    return input_draws(5, keys, torch.zeros(n), torch.full((n,), epoch))


def _grey(n: int, size: int = 32) -> Tensor:
    return torch.full((n, 3, size, size), 0.5)


def test_boxes_are_distributed_as_torchvisions() -> None:
    n = 4000
    config = RandomErasingConfig(prob=1.0)
    left, top, right, bottom = erased_boxes(config, _draws(n), 48, 64).double().unbind(1)
    assert float(left.min()) == 0
    assert float(top.min()) == 0
    assert float(right.max()) == 64
    assert float(bottom.max()) == 48
    heights, widths = bottom - top, right - left
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = torch.tensor(
        [
            RandomErasing.get_params(torch.zeros(3, 48, 64), (0.02, 0.33), (0.3, 3.3), [0.0])[:4]
            for _ in range(n)
        ]
    ).double()
    torch.set_rng_state(generator_state)
    for ours, other in (
        (heights, theirs[:, 2]),
        (widths, theirs[:, 3]),
        (top + heights / 2, theirs[:, 0] + theirs[:, 2] / 2),
        (left + widths / 2, theirs[:, 1] + theirs[:, 3] / 2),
        (heights * widths, theirs[:, 2] * theirs[:, 3]),
    ):
        sigma = float(other.std()) * math.sqrt(2 / n)
        assert abs(float(ours.mean() - other.mean())) < 5 * sigma
        assert abs(float(ours.std() / other.std()) - 1) < 0.08


def test_images_are_erased_with_their_probability_and_only_in_their_box() -> None:
    config = RandomErasingConfig(prob=0.25)
    draws = _draws(2000)
    out = random_erasing(_grey(2000), config, draws)
    boxes = erased_boxes(config, draws, 32, 32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # 500; sigma = sqrt(2000 * .25 * .75) = 19.4; 5 sigma = 97
    assert abs(int((areas > 0).sum()) - 500) < 97
    changed = (out != 0.5).all(1)  # a channel is .5 again once in 2**24
    assert torch.equal(changed.sum((1, 2)), areas)
    row = int((areas > 0).nonzero()[0])
    left, top, right, bottom = boxes[row].tolist()
    assert bool(changed[row, top:bottom, left:right].all())


def test_erased_pixels_are_uniform_and_independent_over_pixels_channels_and_images() -> None:
    config = RandomErasingConfig(prob=1.0)
    out = random_erasing(_grey(500), config, _draws(500))
    pixels = out.permute(0, 2, 3, 1)[(out != 0.5).all(1)].double()  # (M, 3)
    assert len(pixels) > 50_000
    sigma = 1 / math.sqrt(12 * len(pixels))
    assert bool(((pixels.mean(0) - 0.5).abs() < 5 * sigma).all())
    # correlations: sigma 1 / sqrt(M)
    correlation = torch.corrcoef(pixels.T) - torch.eye(3, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(pixels))
    neighbours = torch.corrcoef(torch.stack((pixels[:-1, 0], pixels[1:, 0])))[0, 1]
    assert abs(float(neighbours)) < 5 / math.sqrt(len(pixels))
    # Broken variant: one field of pixels for all images.
    assert len(torch.unique(pixels[:, 0])) > 0.99 * len(pixels)


def test_grey_erasing_is_grey() -> None:
    out = random_erasing(torch.zeros(50, 3, 32, 32), RandomErasingConfig(fill="grey"), _draws(50))
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0.0, 128 / 255])


def test_where_no_box_fits_nothing_is_erased() -> None:
    # an area share of 1 at ratio 1 is as high as the image and not below it
    config = RandomErasingConfig(prob=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), fill="grey")
    assert torch.equal(random_erasing(_grey(20), config, _draws(20)), _grey(20))


def test_patch_gaussian_has_the_deviations_of_the_config_and_stays_in_its_square() -> None:
    config = PatchGaussianConfig(patch_pixels=9, max_sigma=0.1)
    n = 3000
    noise = (patch_gaussian(_grey(n), config, _draws(n)) - 0.5).double()
    is_noised = (noise != 0).any(1)
    assert int(is_noised.sum((1, 2)).max()) == 81
    rows, columns = is_noised.any(2).sum(1), is_noised.any(1).sum(1)
    assert set(rows.tolist()) <= {5, 6, 7, 8, 9}  # centre at the border: 4 + 1 or 5 + 0
    assert set(columns.tolist()) <= {5, 6, 7, 8, 9}
    assert bool(is_noised.any(0).all())
    # s ~ U(0, .1): the mean of s**2 is .01 / 3. Broken variant: one fixed s gives .01.
    values = noise.permute(0, 2, 3, 1)[is_noised]
    assert abs(float(values.square().mean()) / (0.01 / 3) - 1) < 0.08
    assert abs(float(values.mean())) < 5 * 0.058 / math.sqrt(values.numel())


def test_standard_deviations_are_uniform_up_to_the_largest() -> None:
    noise = patch_gaussian(_grey(400, 16), PatchGaussianConfig(patch_pixels=64), _draws(400)) - 0.5
    ordered = noise.double().flatten(1).std(1).sort().values
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * 0.1
    # Kolmogorov-Smirnov, exceeded once in 1,000: 1.95 / sqrt(400) of the range; a deviation of 768
    # numbers is off by 1 / sqrt(2 * 768) = 2.6 %
    assert float((ordered - grid).abs().max()) < 0.1 * (1.95 / 20 + 0.026)


def test_patch_gaussian_is_gaussian_and_independent_over_channels() -> None:
    config = PatchGaussianConfig(patch_pixels=64, max_sigma=0.1)
    draws = _draws(60)
    noise = (patch_gaussian(_grey(60), config, draws) - 0.5).double()
    standard = noise / noise.flatten(1).std(1)[:, None, None, None]
    values = standard.permute(1, 0, 2, 3).flatten(1)  # (3, M)
    m = values.shape[1]
    # a normal's kurtosis is 3; sigma of its estimate = sqrt(24 / M)
    assert abs(float(values.pow(4).mean()) - 3) < 5 * math.sqrt(24 / (3 * m)) + 0.01
    correlation = torch.corrcoef(values) - torch.eye(3, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(m)


def test_patch_gaussian_is_clipped_to_0_and_1() -> None:
    config = PatchGaussianConfig(max_sigma=2.0)
    out = patch_gaussian(
        torch.cat((torch.zeros(20, 3, 16, 16), torch.ones(20, 3, 16, 16))), config, _draws(40)
    )
    assert float(out.min()) == 0
    assert float(out.max()) == 1
    assert float(out[:20].max()) > 0.5


def test_words_of_a_pixel_depend_on_sample_epoch_and_place_alone() -> None:
    pixels = torch.tensor([[0, 3, 4], [1, 3, 4], [0, 4, 3], [2, 3, 4]])
    words = pixel_words(_draws(3), 10, pixels)
    assert words.shape == (4, 4)
    assert len(words.unique()) == 16
    part = torch.tensor([2, 0])
    again = pixel_words(_draws(3).select(part), 10, torch.tensor([[1, 4, 3], [0, 3, 4]]))
    assert torch.equal(again, words[torch.tensor([2, 3])])
    assert not torch.equal(pixel_words(_draws(3, epoch=1), 10, pixels), words)
    assert not torch.equal(pixel_words(_draws(3), 9, pixels), words)


_NOISES: tuple[dict[str, Any], ...] = (
    {"random_erasing": RandomErasingConfig()},
    {"patch_gaussian": PatchGaussianConfig(patch_pixels=7)},
)


@pytest.mark.parametrize("noise", _NOISES)
def test_erasing_does_not_depend_on_the_batch_and_writes_to_no_input(noise: dict[str, Any]) -> None:
    config = NoiseConfig(horizontal_flip=False, **noise)
    draws = _draws(64)
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    whole = apply_input_noise(images, config, draws)
    assert torch.equal(images, before)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[:0]):
        alone = apply_input_noise(images[part], config, draws.select(part))
        assert torch.equal(alone, whole[part])
    laid_out = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_input_noise(laid_out, config, draws), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("noise", _NOISES)
def test_erasing_on_the_accelerator_is_that_of_the_cpu(noise: dict[str, Any]) -> None:
    config = NoiseConfig(horizontal_flip=False, **noise)
    draws = _draws(64)
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    on_cpu = apply_input_noise(images, config, draws)
    for where in (draws, draws.to("cuda")):
        on_device = apply_input_noise(images.cuda(), config, where).cpu()
        assert torch.allclose(on_device, on_cpu, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"random_erasing": {"scale": (0.5, 0.1)}}, "random_erasing.scale"),
        ({"random_erasing": {"ratio": (0.0, 1.0)}}, "random_erasing.ratio"),
        ({"random_erasing": {"prob": 0}}, "greater than 0"),
        ({"patch_gaussian": {"patch_pixels": 0}}, "greater than or equal to 1"),
        ({"patch_gaussian": {"max_sigma": 0}}, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NoiseConfig.model_validate(fields)
