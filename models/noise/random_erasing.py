"""Random erasing: a box of random area and shape is overwritten (Zhong et al. 2020)."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import Draws
from models.noise.pixel_words import pixel_words
from models.randomness import Block

_ATTEMPTS = 10
_WORDS_PER_ATTEMPT = 4
_FIRST_WORD = 4
"""Words 0 and 1 name the field of pixels, word 2 says whether anything is erased."""

_GREY = 128 / 255


class RandomErasingConfig(BaseModel):
    """With a probability, a box is erased that lies wholly inside the image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prob: float = Field(default=0.5, gt=0, le=1, description="Probability for each image.")
    scale: tuple[float, float] = Field(
        default=(0.02, 0.33), description="Smallest and largest share of the area, in (0, 1]."
    )
    ratio: tuple[float, float] = Field(
        default=(0.3, 3.3), description="Smallest and largest height / width, > 0."
    )
    fill: Literal["noise", "grey"] = Field(
        default="noise",
        description="noise: every channel of every pixel uniform in [0, 1), the paper's best; "
        "grey: 128 / 255.",
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse intervals that are empty or out of range."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"random_erasing.scale must be 0 < smallest <= largest <= 1, got {self.scale}"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"random_erasing.ratio must be 0 < smallest <= largest, got {self.ratio}"
            )


def erased_boxes(config: RandomErasingConfig, draws: Draws, height: int, width: int) -> Tensor:
    """Return (B, 4) int64: left, top, right, bottom (exclusive); empty where nothing is erased.

    Ten attempts at an area and a ratio; where no box is smaller than the image, nothing is erased.

    Source: torchvision v2 RandomErasing.
    """
    n = len(draws)
    words = draws.words(Block.RANDOM_ERASING, _FIRST_WORD + _ATTEMPTS * _WORDS_PER_ATTEMPT)
    u = (words[:, _FIRST_WORD:].double() * 2.0**-32).view(n, _ATTEMPTS, _WORDS_PER_ATTEMPT)
    low, high = config.scale
    area = height * width * (low + u[..., 0] * (high - low))  # (B, attempts)
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = torch.exp(log_low + u[..., 1] * (log_high - log_low))
    box_height, box_width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    top = (u[..., 2] * (height - box_height + 1)).floor()
    left = (u[..., 3] * (width - box_width + 1)).floor()
    boxes = torch.stack((left, top, left + box_width, top + box_height), dim=-1).to(torch.int64)
    fits = (box_height < height) & (box_width < width)
    first = fits.to(torch.int64).argmax(dim=1)
    is_erased = fits.any(dim=1) & (words[:, 2] < round(config.prob * 2**32))
    chosen = boxes[torch.arange(n, device=boxes.device), first]
    return torch.where(is_erased[:, None], chosen, 0)


def random_erasing(images: Tensor, config: RandomErasingConfig, draws: Draws) -> Tensor:
    """Return float images (B, 3, H, W) in [0, 1], a box erased in some of them."""
    height, width = images.shape[-2:]
    boxes = erased_boxes(config, draws, height, width).to(images.device)
    left, top, right, bottom = boxes.view(-1, 4, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    is_erased = (x >= left) & (x < right) & (y >= top) & (y < bottom)  # (B, H, W)
    if config.fill == "grey":
        return images.masked_fill(is_erased[:, None], _GREY)
    pixels = is_erased.nonzero()  # (M, 3): sample, row, column
    words = pixel_words(draws, Block.RANDOM_ERASING, pixels)[:, :3]
    images = images.clone()
    images.permute(0, 2, 3, 1)[pixels.unbind(1)] = (words >> 8).to(images.dtype) * 2.0**-24
    return images
