"""Counter-based random numbers of a batch of samples, as tensors: see `models/randomness.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.randomness import (
    INDICES_PER_BLOCK,
    MASK32,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    WORDS_PER_CALL,
    hash_keys,
    key_words,
)


def key_hash_tensor(keys: Sequence[str]) -> Tensor:
    """Return `hash64` of every key as (N,) int64: the same 64 bits in two's complement."""
    return torch.as_tensor(hash_keys(keys).view(np.int64))


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return what `philox4x32_numpy` returns, for tensors on any device.

    Args:
        counter: (..., 4) int64 holding words in [0, 2**32).
        key: two words in [0, 2**32).
    Returns: (..., 4) int64 holding words in [0, 2**32).
    Int64 products wrap and the shifted halves are masked.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of samples, by technique.

    Counter words: key hash low, key hash high, epoch, copy << 16 | block << 8 | call.
    """

    stream: int
    key_hashes: Tensor
    """(B,) int64: 64-bit hashes of the sample keys (see `key_hash_tensor`)."""
    copies: Tensor
    """(B,) int64 in [0, 65535]: which copy of the sample this is."""
    epochs: Tensor
    """(B,) int64 in [0, 2**32)."""

    def __len__(self) -> int:
        return self.key_hashes.shape[0]

    def words(self, block: int, n: int) -> Tensor:
        """Return (B, n) int64 words in [0, 2**32); the first n of a block do not depend on n."""
        calls = -(-n // WORDS_PER_CALL)
        assert 0 <= block < 256, f"block {block} outside [0, 256)"
        assert 1 <= calls <= INDICES_PER_BLOCK, f"a block holds 1..1024 words, not {n}"
        base = (self.copies << 16) | (block << 8)
        call = torch.arange(calls, device=base.device)
        last = base[:, None] | call  # (B,) -> (B, calls)
        low = (self.key_hashes & MASK32)[:, None].expand_as(last)
        high = ((self.key_hashes >> 32) & MASK32)[:, None].expand_as(last)
        epoch = self.epochs[:, None].expand_as(last)
        words = philox4x32(torch.stack((low, high, epoch, last), dim=-1), key_words(self.stream))
        return words.flatten(1)[:, :n]  # (B, calls, 4) -> (B, n)

    def uniform(self, block: int, n: int) -> Tensor:
        """Return (B, n) float32 in [0, 1): the upper 24 bits of `words`, exact on every device."""
        return (self.words(block, n) >> 8).to(torch.float32) * 2.0**-24

    def integers(self, block: int, n: int, high: int) -> Tensor:
        """Return (B, n) int64 in [0, high), 1 <= high < 2**31, by multiply and shift.

        Reads the same words as `uniform` of that block.
        """
        return scaled_integers(self.words(block, n), high)

    def select(self, indices: Tensor) -> "Draws":
        """Return the draws of some of the samples, in the order of the (M,) indices."""
        return Draws(
            self.stream, self.key_hashes[indices], self.copies[indices], self.epochs[indices]
        )

    def to(self, device: torch.device | str) -> "Draws":
        """Return the same draws made on another device."""
        return Draws(
            self.stream,
            self.key_hashes.to(device),
            self.copies.to(device),
            self.epochs.to(device),
        )


def scaled_integers(words: Tensor, high: int) -> Tensor:
    """Return int64 in [0, high) from words in [0, 2**32), 1 <= high < 2**31; bias below 2**-31."""
    assert 1 <= high < 1 << 31, f"high {high} outside [1, 2**31)"
    return (words * high) >> 32


def input_draws(stream: int, key_hashes: Tensor, copies: Tensor, epochs: Tensor) -> Draws:
    """Return the draws of a batch after checking its shapes and ranges.

    Args:
        stream: in [0, 2**64), from `derive_seed(seed, round, stage)`.
        key_hashes: (B,) int64, from `key_hash_tensor`.
        copies: (B,) integers in [0, 65535].
        epochs: (B,) integers in [0, 2**32).
    Raises: ValueError for unequal shapes or a value outside its range.
    """
    key_words(stream)
    if not key_hashes.shape == copies.shape == epochs.shape or key_hashes.dim() != 1:
        raise ValueError(
            "key_hashes, copies and epochs must be (B,) of one length, got "
            f"{tuple(key_hashes.shape)}, {tuple(copies.shape)}, {tuple(epochs.shape)}"
        )
    copies, epochs = copies.to(torch.int64), epochs.to(torch.int64)
    for name, values, limit in (("copies", copies, 1 << 16), ("epochs", epochs, 1 << 32)):
        # On an accelerator the check would wait for the device; batches are assembled on the CPU.
        if values.device.type == "cpu" and bool(((values < 0) | (values >= limit)).any()):
            raise ValueError(
                f"{name} must lie in [0, {limit}), got {int(values.min())}..{int(values.max())}"
            )
    return Draws(stream, key_hashes.to(torch.int64), copies, epochs)
