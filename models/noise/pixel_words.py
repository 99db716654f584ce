"""Random words for single pixels, more than a sample's block of draws could hold."""

import torch
from torch import Tensor

from models.draws import Draws, philox4x32
from models.randomness import derive_seed, key_words


def pixel_words(draws: Draws, block: int, pixels: Tensor) -> Tensor:
    """Return four words in [0, 2**32) for each pixel, a function of sample, block and place.

    Counter words: two words of the sample's block, row << 16 | column, block.

    Args:
        draws: of the B samples.
        block: whose first two words of each sample name the field.
        pixels: (M, 3) int64: sample in [0, B), row and column in [0, 65536).
    Returns: (M, 4) int64 on the device of `pixels`.
    """
    sample, row, column = pixels.unbind(1)
    names = draws.words(block, 2).to(pixels.device)[sample]  # (M, 2)
    place = (row << 16) | column
    counter = torch.stack((names[:, 0], names[:, 1], place, torch.full_like(place, block)), dim=1)
    return philox4x32(counter, key_words(derive_seed(draws.stream, "pixels")))
