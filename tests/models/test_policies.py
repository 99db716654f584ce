"""AutoAugment, TrivialAugment and FixMatch's RandAugment: each sample against torchvision."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import (
    AutoAugment,
    AutoAugmentPolicy,
    TrivialAugmentWide,
    _apply_op,
)

from models.draws import Draws, input_draws, key_hash_tensor
from models.noise import (
    AutoAugmentConfig,
    NoiseConfig,
    RandAugmentConfig,
    TrivialAugmentConfig,
    apply_input_noise,
)
from models.noise.autoaugment import autoaugment, drawn_pairs, policy_rows
from models.noise.fixmatch_augment import fixmatch_operations
from models.noise.magnitudes import OPERATIONS, argument_table
from models.noise.operations import MOVES, NOTHING, Operation, apply_operations_
from models.noise.randaugment import randaugment
from models.noise.trivial_augment import drawn_trivial, trivial_augment

_NAMES = {number: name for name, number in OPERATIONS.items()}


def _images(n: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(n * 1000 + size)
    noise = torch.rand(n, 3, size, size, generator=generator)
    ramp = torch.linspace(0, 1, size)
    return ((0.5 * noise + 0.5 * (ramp[:, None] * ramp)) * 255).to(torch.uint8)


def _draws(n: int, *, stream: int = 5) -> Draws:
    keys = key_hash_tensor([f"shard/{i}" for i in range(n)])
    return input_draws(stream, keys, torch.zeros(n), torch.zeros(n))


def _assert_as_torchvision(ours: Tensor, theirs: Tensor) -> None:
    """Two operations: a pixel off by a rounding, or read from a neighbour, is rare."""
    different = (ours - theirs.float()).abs() > 3
    assert float(different.float().mean()) < 0.01
    assert float(different.flatten(1).float().mean(1).max()) < 0.08


class _Scripted:
    """torchvision's policies with our draws in place of their own."""

    def __init__(self, operations: Tensor, bins: Tensor, negative: Tensor) -> None:
        self.rows = list(zip(operations.tolist(), bins.tolist(), negative.tolist(), strict=True))

    def apply(self, images: Tensor, space: dict[str, Any]) -> Tensor:
        out: list[Tensor] = []
        for image, (operation, bin_, is_negative) in zip(images, self.rows, strict=True):
            name = _NAMES[operation]
            magnitudes, signed = space[name]
            magnitude = float(magnitudes[bin_]) if magnitudes.ndim > 0 else 0.0
            if signed and is_negative:
                magnitude = -magnitude
            out.append(_apply_op(image, name, magnitude, InterpolationMode.NEAREST, [128.0] * 3))
        return torch.stack(out)


@pytest.mark.parametrize("num_bins", [10, 31])
@pytest.mark.parametrize("is_negative", [False, True])
def test_every_operation_and_strength_is_torchvisions(num_bins: int, is_negative: bool) -> None:
    # Broken variants that this fails: a translation by a fraction of a pixel, or the wrong way; a
    # shear about the middle of the first pixel instead of the corner; bits kept instead of dropped.
    space = (
        AutoAugment()._augmentation_space(num_bins, (32, 32))
        if num_bins == 10
        else TrivialAugmentWide()._augmentation_space(num_bins)
    )
    sizes: dict[str, Any] = (
        {
            "shear": 0.3,
            "pixels_x": 150 / 331 * 32,
            "pixels_y": 150 / 331 * 32,
            "degrees": 30.0,
            "enhancement": 0.9,
            "posterize_bits": 4,
        }
        if num_bins == 10
        else {
            "shear": 0.99,
            "pixels_x": 32.0,
            "pixels_y": 32.0,
            "degrees": 135.0,
            "enhancement": 0.99,
            "posterize_bits": 6,
        }
    )
    table = argument_table(num_bins, **sizes)
    for name in space:
        operations = torch.full((num_bins,), OPERATIONS[name])
        bins = torch.arange(num_bins)
        negative = torch.full((num_bins,), int(is_negative))
        images = _images(num_bins)
        ours = images.float()
        arguments = table[operations.clamp(min=0), bins, negative]
        apply_operations_(ours, operations, arguments, shear_about_corner=True)
        theirs = _Scripted(operations, bins, negative).apply(images, space)
        _assert_as_torchvision(ours, theirs)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_autoaugment_is_torchvisions_under_the_same_draws(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 200
    images, draws = _images(n), _draws(n)
    config = AutoAugmentConfig(policy=policy)
    ours = autoaugment(images.float(), config, draws)
    words = draws.words(5, 5)  # Block.AUTOAUGMENT: a changed number would change every run
    theirs = AutoAugment(AutoAugmentPolicy(policy), fill=[128.0] * 3)
    out: list[Tensor] = []
    for image, word in zip(images, words, strict=True):
        pair = int(word[0]) * 25 >> 32
        signs = (word[2::2] < 1 << 31).int()  # 0 is negative there
        drawn = (pair, word[1::2].double() / 2**32, signs)
        monkeypatch.setattr(AutoAugment, "get_params", staticmethod(lambda _, drawn=drawn: drawn))
        out.append(theirs(image))
    _assert_as_torchvision(ours, torch.stack(out))


def test_trivial_augment_is_torchvisions_under_the_same_draws() -> None:
    n = 300
    images, draws = _images(n), _draws(n)
    ours = trivial_augment(images.float(), draws)
    operations, _ = drawn_trivial(draws)
    words = draws.words(6, 3)  # Block.TRIVIAL_AUGMENT
    scripted = _Scripted(operations, words[:, 1] * 31 >> 32, words[:, 2] >> 31)
    space = TrivialAugmentWide()._augmentation_space(31)
    _assert_as_torchvision(ours, scripted.apply(images, space))


def test_trivial_augment_draws_14_operations_uniformly() -> None:
    operations, _ = drawn_trivial(_draws(20_000))
    frequency = torch.bincount(operations + 1, minlength=17)
    assert frequency[Operation.INVERT + 1] == 0
    assert int((frequency > 0).sum()) == 14
    # 20,000 / 14 = 1428.6; sigma = sqrt(20000 / 14 * 13 / 14) = 36.4; 5 sigma = 182
    assert float((frequency[frequency > 0] - 20_000 / 14).abs().max()) < 182


def test_pairs_are_drawn_uniformly_and_applied_with_their_probabilities() -> None:
    config = AutoAugmentConfig(policy="cifar10")
    operations, _ = drawn_pairs(config, _draws(50_000), height=32, width=32)
    rows, probs, _ = policy_rows(config)
    # expected share of applied operations: the mean of all 50 probabilities; sigma < .5 / sqrt(1e5)
    expected = float(probs.mean())
    assert abs(float((operations != NOTHING).double().mean()) - expected) < 5 * 0.0016
    inverted = float((operations[:, 0] == Operation.INVERT).double().mean())
    # pair 0 alone begins with Invert, probability .1: 1/25 * .1 = .004; sigma = .00028
    assert rows[:, 0].eq(Operation.INVERT).sum() == 1
    assert abs(inverted - 0.004) < 0.0014


def test_probability_zero_never_happens_and_one_always_does() -> None:
    config = AutoAugmentConfig(policy="imagenet")
    rows, probs, _ = policy_rows(config)
    operations, _ = drawn_pairs(config, _draws(20_000), height=32, width=32)
    pair = _draws(20_000).words(5, 1)[:, 0] * 25 >> 32
    always, never = (probs == 1).nonzero(), (probs == 0).nonzero()
    assert len(always) == 7
    assert len(never) == 1
    for index, layer in always.tolist():
        assert operations[pair == index, layer].eq(rows[index, layer]).all()
    for index, layer in never.tolist():
        assert operations[pair == index, layer].eq(NOTHING).all()


# FixMatch's form of RandAugment.


def test_fixmatch_strengths_are_uniform_over_each_operations_own_range() -> None:
    # Broken variants: one shared magnitude, which RandAugment proper has; one drawn per image.
    operations, arguments = fixmatch_operations(2, 1.0, _draws(20_000), height=20, width=40)
    frequency = torch.bincount(operations.flatten() + 1, minlength=17)
    unused = (Operation.INVERT, Operation.SOLARIZE_ADD, Operation.CUTOUT)
    assert all(frequency[operation + 1] == 0 for operation in unused)
    # 40,000 / 14 = 2857; sigma = sqrt(40000 / 14 * 13 / 14) = 51.5; 5 sigma = 258
    assert float((frequency[frequency > 0] - 40_000 / 14).abs().max()) < 258
    ranges = {
        Operation.BRIGHTNESS: (0.05, 0.95),
        Operation.ROTATE: (-math.pi / 6, math.pi / 6),
        Operation.SHEAR_Y: (-0.3, 0.3),
        Operation.SOLARIZE: (0.0, 256.0),
        Operation.TRANSLATE_X: (-12.0, 12.0),  # .3 * 40
        Operation.TRANSLATE_Y: (-6.0, 6.0),  # .3 * 20
    }
    for operation, (low, high) in ranges.items():
        values = arguments[operations == operation]
        width = high - low
        assert low <= float(values.min()) < low + 0.01 * width
        assert high - 0.01 * width < float(values.max()) <= high
        # sigma of the mean = width / sqrt(12 * 2857) = .0054 width; 5 sigma = .027
        assert abs(float(values.mean()) - (low + high) / 2) < 0.027 * width
    # Some 20,000 * (4 / 14)**2 = 1,633 images are enhanced twice: the two factors are uncorrelated,
    # sigma 1 / sqrt(1633) = .025
    enhancing = (Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS)
    is_enhanced = torch.isin(operations, torch.tensor(enhancing)).all(1)
    assert abs(float(torch.corrcoef(arguments[is_enhanced].T)[0, 1])) < 0.125
    # int(U(4, 8)): 4, 5, 6, 7
    bits = arguments[operations == Operation.POSTERIZE]
    assert sorted(set(bits.tolist())) == [4.0, 5.0, 6.0, 7.0]


def test_fixmatch_always_ends_with_a_square_of_up_to_half_the_side() -> None:
    config = RandAugmentConfig(op_prob=0.0, magnitude_per_op="uniform")
    cut = randaugment(torch.zeros(4000, 3, 32, 32), config, _draws(4000))[:, 0] == 128
    sides = cut.any(1).sum(1)
    assert int(sides.max()) == 16  # half of 32
    rows = cut.any(2).sum(1)
    is_whole = (sides == rows) & (sides > 0)
    # most squares are clipped by no border; half sides 0..8 are uniform but for the two ends
    assert float(is_whole.float().mean()) > 0.5
    assert bool(cut.any(0).all())  # everywhere
    # half side 0 is drawn for U(0, 8) below .5: 1/16; sigma = .0038
    assert abs(float((sides == 0).float().mean()) - 1 / 16) < 0.02


@pytest.mark.parametrize(
    "fields",
    [
        {"magnitude": 10},
        {"convention": "clip10"},
        {"translate_pixels": 3},
        {"cutout_pixels": 3},
    ],
)
def test_what_fixmatchs_form_would_not_read_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(fields))}=.* has no effect with"):
        RandAugmentConfig(magnitude_per_op="uniform", **fields)


# All of them.

_POLICIES: tuple[dict[str, Any], ...] = (
    {"autoaugment": AutoAugmentConfig()},
    {"autoaugment": AutoAugmentConfig(policy="cifar10")},
    {"trivial_augment": TrivialAugmentConfig()},
    {"randaugment": RandAugmentConfig(magnitude_per_op="uniform")},
    {"augmix": {"severity": 5, "all_ops": True}},
)


@pytest.mark.parametrize("policy", _POLICIES)
def test_a_policy_does_not_depend_on_the_batch_and_writes_to_no_input(
    policy: dict[str, Any],
) -> None:
    config = NoiseConfig(horizontal_flip=False, **policy)
    images, draws = _images(97, 16), _draws(97)
    before = images.clone()
    whole = apply_input_noise(images, config, draws)
    assert torch.equal(images, before)
    assert whole.dtype == torch.float32
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    for part in (order, order[:1], order[40:43], order[:0]):
        alone = apply_input_noise(images[part], config, draws.select(part))
        assert torch.equal(alone, whole[part])
    floats = images.float() / 255
    assert torch.equal(apply_input_noise(floats, config, draws), whole)
    assert torch.equal(floats, before.float() / 255)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_input_noise(laid_out, config, draws), whole)


@pytest.mark.parametrize("policy", _POLICIES)
def test_a_policy_changes_most_images_and_follows_its_stream(policy: dict[str, Any]) -> None:
    config = NoiseConfig(horizontal_flip=False, **policy)
    images = _images(200, 16)
    out = apply_input_noise(images, config, _draws(200))
    changed = (out != images.float() / 255).flatten(1).any(1)
    assert float(changed.float().mean()) > 0.6
    other = apply_input_noise(images, config, _draws(200, stream=6))
    assert float((out != other).flatten(1).any(1).float().mean()) > 0.6


@pytest.mark.gpu
@pytest.mark.parametrize("policy", _POLICIES)
def test_policies_on_the_accelerator_are_those_of_the_cpu(policy: dict[str, Any]) -> None:
    config = NoiseConfig(horizontal_flip=False, **policy)
    images, draws = _images(256, 16), _draws(256)
    on_cpu = apply_input_noise(images, config, draws)
    for where in (draws, draws.to("cuda")):
        on_device = apply_input_noise(images.cuda(), config, where).cpu()
        # cosines differ in their last bit: a pixel may be read from its neighbour
        assert float((on_device - on_cpu).abs().gt(0.01).float().mean()) < 0.01


def test_two_policies_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="randaugment and noise\\.autoaugment are all"):
        NoiseConfig(randaugment=RandAugmentConfig(), autoaugment=AutoAugmentConfig())


def test_moves_are_the_operations_with_a_sign() -> None:
    table = argument_table(
        10, shear=1, pixels_x=9, pixels_y=9, degrees=9, enhancement=0.5, posterize_bits=4
    )
    for operation in Operation:
        is_signed = bool((table[operation, :, 0] == -table[operation, :, 1]).all())
        if operation in MOVES:
            assert is_signed
    # factors 1 +- .5, and no effect at bin 0
    assert table[Operation.COLOR, -1].tolist() == [1.5, 0.5]
    assert table[Operation.COLOR, 0].tolist() == [1.0, 1.0]
    # bits: 8 - round(i * 4 / 9)
    kept = [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert table[Operation.POSTERIZE, :, 0].tolist() == kept
