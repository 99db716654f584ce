"""Seeds and counter-based random numbers: what is drawn depends on names, never on order.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
A draw is a pure function of (stream, sample key, copy, epoch, block), so it is the same for every
batch composition, worker, resume and device.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_INDICES_PER_BLOCK = 256
"""Philox calls that one block may use for one sample: 1,024 words of 32 bits."""

_WORDS_PER_CALL = 4


class Block(IntEnum):
    """Fixed block numbers of the techniques; a new technique takes a new number, none is re-used.

    Legal range 0..255: a block spans 256 of the 65,536 counter values that one copy has.
    """

    CROP = 0
    FLIP = 1
    AFFINE = 2
    RANDAUGMENT = 3
    CUTOUT = 4
    AUTOAUGMENT = 5
    TRIVIAL_AUGMENT = 6
    AUGMIX = 7
    AUGMIX_WEIGHTS = 8
    RANDOM_ERASING = 9
    PATCH_GAUSSIAN = 10
    BALANCE = 64
    ORDER = 65
    OUT_OF_DOMAIN = 80


def hash64(text: str) -> int:
    """Return the first 8 bytes of BLAKE2b of the UTF-8 text as an integer in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_keys(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Return `hash64` of every key, (N,) uint64."""
    return hash_utf8_keys([key.encode() for key in keys])


def hash_utf8_keys(keys: Sequence[bytes], *, prefix: bytes = b"") -> npt.NDArray[np.uint64]:
    """Return `hash64` of every key that is given as UTF-8, (N,) uint64, each after the prefix."""
    # Copied in two thirds of the time of making it anew.
    copy = hashlib.blake2b(prefix, digest_size=8).copy
    digests: list[bytes] = []
    for key in keys:
        state = copy()
        state.update(key)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def key_hash_tensor(keys: Sequence[str]) -> Tensor:
    """Return `hash64` of every key as (N,) int64: the same 64 bits in two's complement."""
    return torch.as_tensor(hash_keys(keys).view(np.int64))


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part, its type and its position.

    Raises: TypeError for a part that is neither int nor str (floats have several spellings).
    """
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"derive_seed takes ints and strings, got {part!r}: convert it first")
    canonical = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()
    digest = hashlib.blake2b(canonical, digest_size=8, person=b"selftrain-seed").digest()
    return int.from_bytes(digest, "little") >> 1


def key_words(stream: int) -> tuple[int, int]:
    """Return the Philox key of a stream: its low and its high 32 bits.

    Raises: ValueError unless 0 <= stream < 2**64.
    """
    if not 0 <= stream < 1 << 64:
        raise ValueError(f"stream must lie in [0, 2**64), got {stream}: use derive_seed")
    return stream & _MASK32, stream >> 32


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return Philox4x32-10 of every counter.

    Args:
        counter: (..., 4) int64 holding words in [0, 2**32).
        key: two words in [0, 2**32).
    Returns: (..., 4) int64 holding words in [0, 2**32).
    Source: Random123 1.09, philox.h; int64 products wrap and the shifted halves are masked.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox4x32_numpy(
    counter: npt.NDArray[np.uint64], key: tuple[int, int]
) -> npt.NDArray[np.uint64]:
    """Return what `philox4x32` returns, for (..., 4) uint64 words."""
    mask, shift = np.uint64(_MASK32), np.uint64(32)
    multiplier0, multiplier1 = np.uint64(_MULTIPLIERS[0]), np.uint64(_MULTIPLIERS[1])
    c0, c1, c2, c3 = (counter[..., i] for i in range(_WORDS_PER_CALL))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & mask,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return np.stack((c0, c1, c2, c3), axis=-1)


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
        calls = -(-n // _WORDS_PER_CALL)
        assert 0 <= block < 256, f"block {block} outside [0, 256)"
        assert 1 <= calls <= _INDICES_PER_BLOCK, f"a block holds 1..1024 words, not {n}"
        base = (self.copies << 16) | (block << 8)
        call = torch.arange(calls, device=base.device)
        last = base[:, None] | call  # (B,) -> (B, calls)
        low = (self.key_hashes & _MASK32)[:, None].expand_as(last)
        high = ((self.key_hashes >> 32) & _MASK32)[:, None].expand_as(last)
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


def uniforms(
    stream: int,
    keys: Sequence[str] | npt.NDArray[np.uint64],
    *,
    copy: int = 0,
    epoch: int = 0,
    block: int = Block.BALANCE,
) -> npt.NDArray[np.float64]:
    """Return one float64 in [0, 1) per key with 53 random bits.

    Cut to 24 bits it is the first number of `Draws.uniform` for the same arguments.

    Args:
        stream: in [0, 2**64).
        keys: N sample keys, or their (N,) uint64 hashes.
        copy: in [0, 65535].
        epoch: in [0, 2**32).
        block: in [0, 255], see `Block`.
    Returns: (N,) float64.
    """
    hashes = keys.astype(np.uint64) if isinstance(keys, np.ndarray) else hash_keys(keys)
    assert 0 <= copy < 1 << 16, f"copy {copy} outside [0, 65536)"
    assert 0 <= epoch < 1 << 32, f"epoch {epoch} outside [0, 2**32)"
    assert 0 <= block < 256, f"block {block} outside [0, 256)"
    counter = np.empty((len(hashes), _WORDS_PER_CALL), dtype=np.uint64)
    counter[:, 0] = hashes & np.uint64(_MASK32)
    counter[:, 1] = hashes >> np.uint64(32)
    counter[:, 2] = epoch
    counter[:, 3] = copy << 16 | block << 8
    words = philox4x32_numpy(counter, key_words(stream))
    mantissa = (words[:, 0] << np.uint64(21)) | (words[:, 1] >> np.uint64(11))
    return mantissa.astype(np.float64) * 2.0**-53
