"""The generator against Random123's vectors, and what a draw may depend on."""

import itertools

import numpy as np
import pytest
import torch

from models.draws import Draws, input_draws, key_hash_tensor, philox4x32
from models.randomness import Block, derive_seed, hash64, hash_keys, philox4x32_numpy, uniforms

# Random123 1.09, tests/kat_vectors, philox4x32 10: counter, key, result.
_VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _draws(keys: list[str], *, stream: int = 11, copy: int = 0, epoch: int = 0) -> Draws:
    n = len(keys)
    return input_draws(
        stream, key_hash_tensor(keys), torch.full((n,), copy), torch.full((n,), epoch)
    )


@pytest.mark.parametrize(("counter", "key", "expected"), _VECTORS)
def test_philox_gives_the_published_vectors(counter: str, key: str, expected: str) -> None:
    k0, k1 = _words(key)
    result = philox4x32(torch.tensor(_words(counter)), (k0, k1))
    assert result.tolist() == _words(expected)
    result_numpy = philox4x32_numpy(np.array(_words(counter), dtype=np.uint64), (k0, k1))
    assert result_numpy.tolist() == _words(expected)


@pytest.mark.gpu
def test_draws_are_equal_on_the_accelerator() -> None:
    draws = _draws([f"s/{i}" for i in range(1000)], stream=derive_seed("gpu"))
    on_device = draws.to("cuda")
    assert torch.equal(on_device.words(Block.FLIP, 9).cpu(), draws.words(Block.FLIP, 9))
    assert torch.equal(on_device.uniform(Block.FLIP, 9).cpu(), draws.uniform(Block.FLIP, 9))


def test_hash64_is_the_stored_number() -> None:
    # blake2b of 8 bytes, read as little endian: f3976f958e1cfb8b (Python's hashlib). A changed
    # line here changes every run's noise.
    assert hash64("labeled-000000/000001") == 0x8BFB1C8E956F97F3
    assert hash_keys(["a/0", "b/1"]).tolist() == [hash64("a/0"), hash64("b/1")]
    signed = key_hash_tensor(["a/0"]).item()
    assert signed % 2**64 == hash64("a/0")


def test_derived_seeds_are_golden_and_within_63_bits() -> None:
    assert derive_seed(0, 1, "train") == 7606433520989735903
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))


def test_derived_seeds_depend_on_type_position_and_boundaries_of_parts() -> None:
    seeds = [
        derive_seed(1, 2),
        derive_seed(2, 1),
        derive_seed(12),
        derive_seed("1", 2),
        derive_seed("12"),
        derive_seed(1, "2"),
        derive_seed("1,2"),
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("part", [1.0, True, None, b"x"])
def test_a_seed_part_of_another_type_is_refused(part: object) -> None:
    with pytest.raises(TypeError, match="ints and strings"):
        derive_seed(part)  # pyright: ignore[reportArgumentType]


def test_draws_do_not_depend_on_batch_composition_or_order() -> None:
    keys = [f"shard-{i}/{i:06d}" for i in range(50)]
    whole = _draws(keys).uniform(Block.RANDAUGMENT, 13)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:17]
    part = _draws([keys[i] for i in order.tolist()]).uniform(Block.RANDAUGMENT, 13)
    assert torch.equal(part, whole[order])
    assert torch.equal(_draws(keys).select(order).uniform(Block.RANDAUGMENT, 13), part)


def test_the_first_numbers_of_a_block_do_not_depend_on_how_many_are_drawn() -> None:
    draws = _draws(["a/0", "a/1"])
    assert torch.equal(draws.words(Block.CROP, 3), draws.words(Block.CROP, 1024)[:, :3])


def test_the_draws_of_one_sample_are_the_stored_numbers() -> None:
    draws = _draws(["labeled-000000/000001"], stream=derive_seed(0, 1, "train"), copy=1, epoch=2)
    assert draws.words(Block.RANDAUGMENT, 5).tolist() == [
        [2487526640, 3637762639, 4039287216, 3840174516, 3772614790]
    ]


def test_every_part_of_the_address_changes_the_draw() -> None:
    # 2 streams x 2 keys x 2 copies x 2 epochs x 2 blocks x 2 words: 64 different words
    words = {
        int(word)
        for stream, key, copy, epoch, block in itertools.product(
            (1, 1 << 40), ("a/0", "a/1"), (0, 1), (0, 1), (Block.CROP, Block.FLIP)
        )
        for word in _draws([key], stream=stream, copy=copy, epoch=epoch).words(block, 2)[0]
    }
    assert len(words) == 64


def test_the_last_call_of_a_block_does_not_reach_into_the_next() -> None:
    draws = _draws(["a/0"])
    drawn = torch.cat([draws.words(block, 1024)[0] for block in (0, 1)])
    assert len(set(drawn.tolist())) == 2048


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    u = _draws([f"s/{i}" for i in range(2000)], stream=derive_seed("test")).uniform(Block.FLIP, 10)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    # mean 1/2, standard error sqrt(1/12/20000) = .00204; 5 sigma = .0102
    assert abs(float(u.mean()) - 0.5) < 0.0102
    assert (torch.tensor(0xFFFFFFFF) >> 8).to(torch.float32).item() * 2.0**-24 == 1 - 2.0**-24


def test_integers_cover_their_range_evenly() -> None:
    draws = _draws([f"s/{i}" for i in range(4000)], stream=derive_seed("integers"))
    counts = torch.bincount(draws.integers(Block.CROP, 4, 9).flatten(), minlength=9)
    # 16,000 / 9 = 1777.8; sigma = sqrt(16000 * 1/9 * 8/9) = 39.8; 5 sigma = 199
    assert counts.sum() == 16_000
    assert len(counts) == 9
    assert float((counts - 16_000 / 9).abs().max()) < 199


def test_numpy_uniforms_cut_to_24_bits_are_the_torch_ones() -> None:
    keys = [f"s/{i}" for i in range(100)]
    stream = derive_seed(3, "balance")
    doubles = uniforms(stream, keys, copy=2, epoch=5, block=Block.BALANCE)
    singles = _draws(keys, stream=stream, copy=2, epoch=5).uniform(Block.BALANCE, 1)[:, 0]
    assert np.array_equal(np.floor(doubles * 2**24), singles.numpy() * 2**24)
    assert np.array_equal(doubles, uniforms(stream, hash_keys(keys), copy=2, epoch=5))
    assert doubles.dtype == np.float64


def test_uniforms_of_no_keys_are_empty() -> None:
    assert uniforms(1, []).shape == (0,)


@pytest.mark.parametrize(
    ("copies", "epochs", "message"),
    [
        ([65536], [0], "copies"),
        ([-1], [0], "copies"),
        ([0], [1 << 32], "epochs"),
        ([0, 0], [0], "one length"),
    ],
)
def test_values_outside_the_counter_are_refused(
    copies: list[int], epochs: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        input_draws(1, key_hash_tensor(["a"]), torch.tensor(copies), torch.tensor(epochs))


@pytest.mark.parametrize("stream", [-1, 1 << 64])
def test_a_stream_that_is_no_64_bit_number_is_refused(stream: int) -> None:
    with pytest.raises(ValueError, match="stream"):
        input_draws(stream, key_hash_tensor(["a"]), torch.tensor([0]), torch.tensor([0]))
