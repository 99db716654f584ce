"""Seeds and counter-based random numbers: what is drawn depends on names, never on order.

In numpy, so that a process that needs no torch does not wait for it; `models/draws.py` has the same
numbers as tensors.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
A draw is a pure function of (stream, sample key, copy, epoch, block), so it is the same for every
batch composition, worker, resume and device.
"""

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
INDICES_PER_BLOCK = 256
"""Philox calls that one block may use for one sample: 1,024 words of 32 bits."""

WORDS_PER_CALL = 4

_Words = npt.NDArray[np.uint64]
"""Words of counters: one each, or one for all."""

_HASHED_TOGETHER = 512  # whose states, half a kilobyte each, stay in a core's cache


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
    # Copied in two thirds of the time of making it anew, and called by `map` in four fifths of that
    # of a loop.
    copy = hashlib.blake2b(prefix, digest_size=8).copy
    digests: list[bytes] = []
    for start in range(0, len(keys), _HASHED_TOGETHER):
        some = keys[start : start + _HASHED_TOGETHER]
        states = [copy() for _ in some]
        deque(map(hashlib.blake2b.update, states, some), maxlen=0)
        digests += map(hashlib.blake2b.digest, states)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


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
    return stream & MASK32, stream >> 32


def philox4x32_numpy(
    counter: npt.NDArray[np.uint64], key: tuple[int, int]
) -> npt.NDArray[np.uint64]:
    """Return Philox4x32-10 of every counter.

    Args:
        counter: (..., 4) uint64 holding words in [0, 2**32).
        key: two words in [0, 2**32).
    Returns: (..., 4) uint64 holding words in [0, 2**32).
    Source: Random123 1.09, philox.h.
    """
    c0, c1, c2, c3 = (counter[..., i] for i in range(WORDS_PER_CALL))
    return np.stack(_philox_words(c0, c1, c2, c3, key), axis=-1)


def _philox_words(
    c0: _Words, c1: _Words, c2: _Words, c3: _Words, key: tuple[int, int]
) -> tuple[_Words, _Words, _Words, _Words]:
    mask, shift = np.uint64(MASK32), np.uint64(32)
    multiplier0, multiplier1 = np.uint64(PHILOX_MULTIPLIERS[0]), np.uint64(PHILOX_MULTIPLIERS[1])
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & mask,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


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
    first, second, _, _ = _philox_words(
        hashes & np.uint64(MASK32),
        hashes >> np.uint64(32),
        np.array([epoch], dtype=np.uint64),
        np.array([copy << 16 | block << 8], dtype=np.uint64),
        key_words(stream),
    )
    mantissa = (first << np.uint64(21)) | (second >> np.uint64(11))
    return mantissa.astype(np.float64) * 2.0**-53
