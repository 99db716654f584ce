"""Near-duplicates: 96 numbers say what an image looks like, and a few crops find its copies.

A descriptor is made of the low frequencies of a small thumbnail, so another file format, size or
aspect ratio hardly moves it. A copy from which a few pixels at the borders were cut off is shifted
and stretched, so the images that copies are looked for of (the references: few) are compared in
crops and mirrored, those that are searched (the corpus: many) as they are.

Two steps: images are compared with six crops of every reference by one product of matrices; the
few pairs that come near each other are compared again in 81 crops, which decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.leak_guard_config import CANDIDATE_SIMILARITY

THUMBNAIL_SIZE = 32
"""Pixels of a side of the thumbnails that descriptors are made of: means over areas, any aspect."""

_CELLS = 16  # a side, that a thumbnail or a crop of it is averaged to before the transform
_LUMA, _CHROMA = 8, 4  # frequencies a side
NUM_COEFFICIENTS = _LUMA**2 + 2 * _CHROMA**2
"""Of a descriptor: cosine coefficients of luma (8 x 8), blue and red chroma (4 x 4 each)."""

# JPEG's colours (ITU-R BT.601).
_COLORS = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

# Shares of a side's length that a crop leaves out at its beginning and at its end.
_Cuts = tuple[float, float]
_CUTS: tuple[_Cuts, ...] = tuple((a, b) for a in (0, 0.025, 0.05) for b in (0, 0.025, 0.05))
"""Of the crops that decide, down and across: 9 times 9."""
_AT_ONE_END: tuple[_Cuts, ...] = ((0.045, 0), (0, 0.045))
_FIRST_CUTS: tuple[tuple[_Cuts, _Cuts], ...] = (
    ((0, 0), (0, 0)),
    *((down, across) for down in _AT_ONE_END for across in _AT_ONE_END),
    ((0.045, 0.045), (0.045, 0.045)),
)
"""The whole image, its four corners and its middle: any other crop is nearly one of them."""

_MAX_CANDIDATES = 32  # of one image: where all references look alike, the nearest ones
_ROWS, _COLUMNS, _PAIRS = 1024, 4096, 512  # compared at a time: a few MB each


@dataclass(frozen=True)
class References:
    """Images that copies are looked for of.

    Attributes:
        first_crops: (R * 6, 93) unit descriptors without means, six of each reference.
        thumbnails: (R, 32, 32, 3) uint8, from which crops are described.
    """

    first_crops: Tensor
    thumbnails: NDArray[np.uint8]

    @classmethod
    def of(cls, thumbnails: NDArray[np.uint8]) -> "References":
        """Describe the references, from (R, 32, 32, 3) thumbnails, R at least 1."""
        if len(thumbnails) == 0:
            raise ValueError("no references: near-duplicates of nothing cannot be looked for")
        _check_thumbnails(thumbnails)
        crops = torch.empty(len(thumbnails), len(_FIRST_CUTS), NUM_COEFFICIENTS)
        for some in _pieces(np.arange(len(thumbnails)), _ROWS):
            for number, (down, across) in enumerate(_FIRST_CUTS):
                crops[some, number] = _crops(thumbnails[some], (down,), (across,))[:, 0]
        return cls(_unit(crops).flatten(0, 1), thumbnails)


@dataclass(frozen=True)
class Matches:
    """For each image with a near-duplicate among the references, the most similar one.

    Attributes:
        rows: (M,) int64, ascending, of the descriptors that were searched.
        references: (M,) int64; of equally similar ones the first.
        similarities: (M,) float64, at least the threshold, at most 1.
    """

    rows: NDArray[np.int64]
    references: NDArray[np.int64]
    similarities: NDArray[np.float64]


def describe(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return descriptors (N, 96) of (N, 32, 32, 3) RGB thumbnails.

    In rows: luma's 64 cosine coefficients, then 16 of blue and 16 of red chroma, each with its mean
    first; vertical frequency by horizontal frequency.
    """
    _check_thumbnails(thumbnails)
    described = np.empty((len(thumbnails), NUM_COEFFICIENTS), np.float32)
    for some in _pieces(np.arange(len(thumbnails)), _ROWS):
        described[some] = _crops(thumbnails[some], ((0, 0),), ((0, 0),))[:, 0].numpy()
    return described


def find_near_duplicates(
    descriptors: NDArray[np.floating], references: References, *, threshold: float
) -> Matches:
    """Find the images that are copies of a reference.

    Args:
        descriptors: (N, 96), as `describe` gives them.
        references: what they may be copies of.
        threshold: similarity from which on an image is a copy, in [0.92, 1]. The similarity is the
            cosine between descriptors without means: 1 for copies, also brighter or paler ones.
            An image of one colour is similar to none.
    """
    if descriptors.ndim != 2 or descriptors.shape[1] != NUM_COEFFICIENTS:
        raise ValueError(
            f"descriptors must be (N, {NUM_COEFFICIENTS}), not {tuple(descriptors.shape)}"
        )
    if not CANDIDATE_SIMILARITY <= threshold <= 1:
        raise ValueError(f"threshold must be in [{CANDIDATE_SIMILARITY}, 1], not {threshold}")
    searched = _unit(torch.as_tensor(descriptors.astype(np.float32)))
    rows, found, is_mirrored = _candidates(searched, references.first_crops)
    similarities = _best_similarities(searched[rows], references, found, is_mirrored)
    is_copy = similarities >= threshold
    # Nearest first, and of equally near ones the first reference: then one for each row.
    order = np.lexsort((found[is_copy], -similarities[is_copy], rows[is_copy]))
    ordered = rows[is_copy][order]
    unique, first = np.unique(ordered, return_index=True)
    best = order[first]
    return Matches(unique, found[is_copy][best], similarities[is_copy][best])


def _candidates(
    searched: Tensor, first_crops: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return row, reference and whether it is mirrored, of pairs that may be copies."""
    odd = _is_odd()
    even_crops, odd_crops = first_crops[:, ~odd].T.contiguous(), first_crops[:, odd].T.contiguous()
    found = [np.zeros((3, 0), np.int64)]
    for start in range(0, len(searched), _ROWS):
        block = searched[start : start + _ROWS]
        even_rows, odd_rows = block[:, ~odd], block[:, odd]
        near: list[Tensor] = []
        for first in range(0, len(first_crops), _COLUMNS):
            columns = slice(first, first + _COLUMNS)
            # Mirroring turns the sign of the odd horizontal frequencies: one product does both.
            odd_part = odd_rows @ odd_crops[:, columns]
            similarities = odd_part.abs().addmm_(even_rows, even_crops[:, columns])
            row, column = (similarities >= CANDIDATE_SIMILARITY).nonzero(as_tuple=True)
            reference = (column + first) // len(_FIRST_CUTS)
            is_mirrored = odd_part[row, column] < 0
            values = (row, reference, is_mirrored, similarities[row, column])
            near.append(torch.stack([value.double() for value in values]))
        rows, references, is_mirrored, similarities = torch.cat(near, dim=1).numpy()
        nearest = _nearest(rows, references, is_mirrored, similarities)
        pairs = np.stack([rows[nearest] + start, references[nearest], is_mirrored[nearest]])
        found.append(pairs.astype(np.int64))
    rows, references, is_mirrored = np.concatenate(found, axis=1)
    return rows, references, is_mirrored.astype(np.bool_)


def _nearest(
    rows: NDArray[np.float64],
    references: NDArray[np.float64],
    is_mirrored: NDArray[np.float64],
    similarities: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return positions: each pair once, and of each row's the `_MAX_CANDIDATES` most similar."""
    order = np.lexsort((-similarities, is_mirrored, references, rows))
    pairs = np.stack([rows, references, is_mirrored])[:, order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    once = order[is_first]
    by_similarity = once[np.lexsort((-similarities[once], rows[once]))]
    ordered = rows[by_similarity]
    ranks = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    return by_similarity[ranks < _MAX_CANDIDATES]


def _best_similarities(
    searched: Tensor,
    references: References,
    found: NDArray[np.int64],
    is_mirrored: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return the similarity of each pair at the crop of the reference that fits best, (M,)."""
    similarities = np.empty(len(found), np.float64)
    signs = 1 - 2 * _is_odd().float()
    by_reference = np.argsort(found, kind="stable")
    for pairs in _pieces(by_reference, _PAIRS):
        needed, position = np.unique(found[pairs], return_inverse=True)
        crops = _unit(_crops(references.thumbnails[needed], _CUTS, _CUTS))  # (R', 81, 93)
        mirrored = torch.as_tensor(is_mirrored[pairs])[:, None]
        images = torch.where(mirrored, searched[pairs] * signs, searched[pairs])
        products = crops[torch.as_tensor(position)] @ images[:, :, None]  # (M', 81, 1)
        similarities[pairs] = products.amax(dim=(1, 2)).clamp(max=1).double().numpy()
    return similarities


def _pieces(values: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _crops(
    thumbnails: NDArray[np.uint8], down: tuple[_Cuts, ...], across: tuple[_Cuts, ...]
) -> Tensor:
    """Return the descriptors of every crop down with every crop across, (N, D * A, 96)."""
    colors = torch.as_tensor(thumbnails).float() @ torch.tensor(_COLORS).T  # (N, 32, 32, 3)
    described: list[Tensor] = []
    for channel, frequencies in enumerate((_LUMA, _CHROMA, _CHROMA)):
        rows, columns = (
            torch.as_tensor(np.stack([_cosines(frequencies) @ _averaging(*one) for one in cuts]))
            for cuts in (down, across)
        )  # (D, F, 32), (A, F, 32)
        both = rows.flatten(0, 1) @ colors[..., channel] @ columns.flatten(0, 1).T
        split = both.reshape(len(thumbnails), *rows.shape[:2], *columns.shape[:2])
        described.append(split.transpose(2, 3).flatten(3).flatten(1, 2))  # (N, D * A, F * F)
    return torch.cat(described, dim=2)


def _cosines(frequencies: int) -> NDArray[np.float32]:
    """Return the first rows of the orthonormal cosine transform (DCT-II), (F, 16)."""
    angles = np.pi * np.arange(frequencies)[:, None] * (np.arange(_CELLS) + 0.5) / _CELLS
    transform = np.sqrt(2 / _CELLS) * np.cos(angles)
    transform[0] = np.sqrt(1 / _CELLS)
    return transform.astype(np.float32)


def _averaging(low: float, high: float) -> NDArray[np.float32]:
    """Return the matrix (16, 32) of means over equal parts of a line without its ends."""
    edges = THUMBNAIL_SIZE * (low + (1 - low - high) * np.arange(_CELLS + 1) / _CELLS)
    pixels = np.arange(THUMBNAIL_SIZE)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) / (edges[1] - edges[0])).astype(np.float32)


def _unit(descriptors: Tensor) -> Tensor:
    """Return descriptors (.., 96) without means at length 1, (.., 93); of one colour: zeros."""
    without_means = descriptors[..., _is_no_mean()]
    lengths = without_means.square().sum(dim=-1, keepdim=True).sqrt()
    # Half a grey level, as a mean over the cells, is noise of the file format.
    return torch.where(lengths > _CELLS / 2, without_means / lengths, torch.zeros(()))


def _is_no_mean() -> Tensor:
    is_no_mean = torch.ones(NUM_COEFFICIENTS, dtype=torch.bool)
    is_no_mean[[0, _LUMA**2, _LUMA**2 + _CHROMA**2]] = False
    return is_no_mean


def _is_odd() -> Tensor:
    """Return which of the 93 coefficients are of odd horizontal frequency."""
    parities = [torch.arange(f).repeat(f) % 2 == 1 for f in (_LUMA, _CHROMA, _CHROMA)]
    return torch.cat(parities)[_is_no_mean()]


def _check_thumbnails(thumbnails: NDArray[np.uint8]) -> None:
    wanted = (THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3)
    if thumbnails.ndim != 4 or thumbnails.shape[1:] != wanted or thumbnails.dtype != np.uint8:
        raise ValueError(
            f"thumbnails must be (N, {wanted[0]}, {wanted[1]}, 3) uint8, not"
            f" {tuple(thumbnails.shape)} {thumbnails.dtype}"
        )
