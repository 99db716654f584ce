"""AugMix: chains, shares, and its operations against PIL, in which the released code computes."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor

from models.draws import Draws, input_draws, key_hash_tensor
from models.noise import AugMixConfig
from models.noise.augmix import augment_and_mix, augmix, drawn_chains, mixture_weights
from models.noise.operations import NOTHING, Operation


def _images(n: int, size: int = 32) -> Tensor:
    ramp = torch.linspace(0, 1, size)
    waves = torch.sin(torch.arange(n * 3).view(n, 3, 1, 1) + 4 * ramp[:, None] + 3 * ramp)
    return ((waves + 1) * 127.5).to(torch.uint8).float()


def _draws(n: int) -> Draws:
    keys = key_hash_tensor([f"shard/{i}" for i in range(n)])
    return input_draws(5, keys, torch.zeros(n), torch.zeros(n))


def test_shares_of_image_and_chains_are_those_of_beta_and_dirichlet() -> None:
    shares = mixture_weights(AugMixConfig(), _draws(40_000)).double()
    assert shares.shape == (40_000, 4)
    assert torch.allclose(shares.sum(1), torch.ones(40_000, dtype=torch.float64), atol=1e-6)
    # 1 - m ~ U(0, 1): mean 1/2, variance 1/12. m * w_i, independent, E = 1/2 * 1/3 = 1/6 and
    # E[square] = 1/3 * 2/12 = 1/18, so the variance is 1/18 - 1/36 = 1/36
    mean = torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)
    variance = torch.tensor([1 / 12, 1 / 36, 1 / 36, 1 / 36], dtype=torch.float64)
    assert bool(((shares.mean(0) - mean).abs() < 5 * (variance / 40_000).sqrt()).all())
    assert torch.allclose(shares.var(0), variance, rtol=0.04)


def test_depths_are_1_to_3_and_operations_uniform_without_those_of_imagenet_c() -> None:
    operations, _ = drawn_chains(AugMixConfig(), _draws(10_000), height=32, width=32)
    assert operations.shape == (10_000, 3, 3)
    depths = (operations != NOTHING).sum(2).flatten()
    # 30,000 chains: 10,000 of each depth; sigma = sqrt(30000 * 2/9) = 82; 5 sigma = 408
    assert float((torch.bincount(depths, minlength=4)[1:] - 10_000).abs().max()) < 408
    drawn = torch.bincount(operations[operations != NOTHING], minlength=16)
    unused = {"INVERT", "COLOR", "CONTRAST", "BRIGHTNESS", "SHARPNESS", "SOLARIZE_ADD", "CUTOUT"}
    assert {operation.name for operation in Operation if drawn[operation] == 0} == unused
    # 60,000 / 9 = 6667; sigma = sqrt(60000 * 8/81) = 77; 5 sigma = 385 (their number varies too)
    assert float((drawn[drawn > 0] - drawn.sum() / 9).abs().max()) < 385


def test_all_ops_adds_the_four_of_imagenet_c() -> None:
    config = AugMixConfig(all_ops=True, depth=2)
    operations, arguments = drawn_chains(config, _draws(4000), height=32, width=32)
    assert operations.shape == (4000, 3, 2)
    assert bool((operations != NOTHING).all())
    assert len(operations.unique()) == 13
    # severity 3: factors U(.01, .3) * 1.8 + .1
    factors = arguments[operations == Operation.CONTRAST]
    assert 0.118 - 1e-6 <= float(factors.min()) < 0.13
    assert 0.63 < float(factors.max()) <= 0.64 + 1e-6


def test_strengths_are_those_of_the_released_code() -> None:
    # severity 3: level U(.1, 3). posterize 4 - int(level * .4): 4 or 3 bits. rotate int(level * 3):
    # 0..8 degrees. solarize 256 - int(level * 25.6): 180..254. shear to .09. translate at 32 pixels
    # int(level * 32/3 / 10): 0..3 pixels. Broken variant: every operation at full severity.
    operations, arguments = drawn_chains(AugMixConfig(), _draws(20_000), height=32, width=64)

    def found(operation: Operation) -> Tensor:
        return arguments[operations == operation]

    assert sorted(set(found(Operation.POSTERIZE).tolist())) == [3, 4]
    degrees = found(Operation.ROTATE).double().rad2deg()
    assert sorted(set(degrees.round().int().tolist())) == list(range(-8, 9))
    assert torch.allclose(degrees, degrees.round(), atol=1e-4)
    solarize = found(Operation.SOLARIZE)
    assert (float(solarize.min()), float(solarize.max())) == (180, 254)
    assert 0.0895 < float(found(Operation.SHEAR_X).max()) <= 0.09
    assert -0.09 <= float(found(Operation.SHEAR_Y).min()) < -0.0895
    assert sorted(set(found(Operation.TRANSLATE_Y).tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    assert sorted(set(found(Operation.TRANSLATE_X).abs().tolist())) == [0, 1, 2, 3, 4, 5, 6]


def _by_pil(image: Tensor, operation: int, argument: float) -> Tensor:
    pil = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
    affine = {
        Operation.SHEAR_X: (1, argument, 0, 0, 1, 0),
        Operation.SHEAR_Y: (1, 0, 0, argument, 1, 0),
        Operation.TRANSLATE_X: (1, 0, argument, 0, 1, 0),
        Operation.TRANSLATE_Y: (1, 0, 0, 0, 1, argument),
    }
    match Operation(operation):
        case Operation.AUTOCONTRAST:
            pil = ImageOps.autocontrast(pil)
        case Operation.EQUALIZE:
            pil = ImageOps.equalize(pil)
        case Operation.POSTERIZE:
            pil = ImageOps.posterize(pil, int(argument))
        case Operation.SOLARIZE:
            pil = ImageOps.solarize(pil, int(argument))
        case Operation.ROTATE:
            pil = pil.rotate(np.rad2deg(argument), resample=Image.Resampling.BILINEAR)
        case other:
            pil = pil.transform(
                pil.size,
                Image.Transform.AFFINE,
                affine[other],
                resample=Image.Resampling.BILINEAR,
            )
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1).float()


def test_every_operation_computes_what_pil_does() -> None:
    n, config = 400, AugMixConfig(severity=10, width=1, depth=1)
    images, draws = _images(n), _draws(n)
    operations, arguments = drawn_chains(config, draws, height=32, width=32)
    chained = augmented(images, operations[:, 0], arguments[:, 0])
    assert len(operations.unique()) == 9
    for i in range(n):
        expected = _by_pil(images[i], int(operations[i]), float(arguments[i]))
        if operations[i] not in (Operation.ROTATE, Operation.SHEAR_X, Operation.SHEAR_Y):
            assert torch.equal(chained[i], expected)
            continue
        # PIL rounds its weights, and where the image ends it repeats the last pixel before black
        # begins, a line of pixels in which we blend the two
        error = (chained[i] - expected).abs()[:, 1:-1, 1:-1]
        assert float((error > 2).float().mean()) < 0.05
        assert float(error.median()) <= 1


def augmented(images: Tensor, operations: Tensor, arguments: Tensor) -> Tensor:
    """Return the ends of (B, depth) chains: the mixture with a share of 1 for them."""
    shares = torch.tensor([[0.0, 1.0]]).expand(len(images), 2)
    return augment_and_mix(images, operations[:, None], arguments[:, None], shares)


def test_the_mixture_is_that_of_the_image_and_of_chains_that_each_begin_with_it() -> None:
    # Broken variants: chains that go on from each other instead of from the image; one chain for
    # all; shares that do not belong to their chains.
    n, config = 60, AugMixConfig(severity=5)
    images, draws = _images(n), _draws(n)
    operations, arguments = drawn_chains(config, draws, height=32, width=32)
    shares = mixture_weights(config, draws)
    expected = images * shares[:, 0, None, None, None]
    for chain in range(3):
        image = images
        for layer in range(3):
            one = slice(layer, layer + 1)
            image = augmented(image, operations[:, chain, one], arguments[:, chain, one])
        expected = expected + image * shares[:, chain + 1, None, None, None]
    assert torch.allclose(augmix(images, config, draws), expected, atol=1e-3)


@pytest.mark.parametrize(
    "fields", [{"severity": 0}, {"width": 0}, {"depth": 0}, {"alpha": 0}, {"op_prob": 1}]
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AugMixConfig(**fields)
