"""A fast network for images of 32 pixels: whitening, three groups, no residuals (airbench)."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

_PATCH = 2
_NUM_FILTERS = 2 * 3 * _PATCH**2
_WHITENING_EPS = 5e-4

# Second moments of 2x2 patches of natural images, each channel shifted and scaled to mean 0 and
# variance about 1: rows by the (vertical, horizontal) distance of two pixels, columns by their
# channels RR, GG, BB, RG, RB, GB. Measured on CIFAR-10's 50,000 training images (without labels),
# averaged over mirror images.
_MOMENTS: dict[tuple[int, int], tuple[float, ...]] = {
    (0, 0): (0.97688, 0.98530, 0.98195, 0.90209, 0.78663, 0.89966),
    (0, 1): (0.90782, 0.91453, 0.92122, 0.83336, 0.72382, 0.83516),
    (1, 0): (0.89710, 0.90396, 0.91189, 0.82322, 0.71472, 0.82557),
    (1, 1): (0.84689, 0.85257, 0.86788, 0.77346, 0.66947, 0.77892),
}


class AirbenchConfig(BaseModel):
    """A plain convolutional network that learns CIFAR-10 in a few epochs; for 16 to 64 pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["airbench"] = "airbench"
    widths: tuple[int, int, int] = Field(
        default=(64, 256, 256),
        description="Channels of the three groups; (32, 128, 256) is cheaper, (128, 384, 384) "
        "and wider learns better.",
    )
    batch_norm_momentum: float = Field(
        default=0.4,
        gt=0.0,
        le=1.0,
        description="Share of the new batch in the running statistics (the source's 0.6 is 0.4 "
        "here): made for trainings of a thousand steps.",
    )
    whitening: Literal["natural_images", "learned"] = Field(
        default="natural_images",
        description="First layer's filters. natural_images: frozen, they decorrelate 2x2 patches "
        "of natural images. learned: fresh ones, for images that are not natural.",
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse widths outside 1 to 4,096."""
        if min(self.widths) < 1 or max(self.widths) > 4096:
            raise ValueError(f"airbench.widths must lie in 1 to 4096, got {self.widths}")


class AirbenchGroup(nn.Module):
    """Convolution, pooling, norm, GELU, convolution, norm, GELU; halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, momentum=momentum)
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)  # always 1; only the shift is learnt
        for conv in (self.conv1, self.conv2):
            # As far as there are inputs, a filter starts as the identity: an implicit residual.
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H // 2, W // 2) of (B, in, H, W)."""
        x = F.gelu(self.norm1(self.pool(self.conv1(x))))
        return F.gelu(self.norm2(self.conv2(x)))


class Airbench(nn.Module):
    """Source: Jordan 2024; airbench94.py, whose BatchNorm eps 1e-12 is torch's 1e-5 here."""

    def __init__(self, config: AirbenchConfig, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, _NUM_FILTERS, _PATCH)
        channels = (_NUM_FILTERS, *config.widths)
        self.groups = nn.Sequential(
            *(
                AirbenchGroup(channels[i], channels[i + 1], config.batch_norm_momentum)
                for i in range(3)
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels[-1], num_classes, bias=False)
        nn.init.zeros_(self.whiten.bias)  # pyright: ignore[reportArgumentType] (it has a bias)
        if config.whitening == "natural_images":
            self.whiten.weight.requires_grad_(False).copy_(
                whitening_filters(natural_patch_moments())
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of normalised images (B, 3, H, W)."""
        features = self.groups(F.gelu(self.whiten(x))).amax((2, 3))
        return self.fc(self.dropout(features)) / 9


def natural_patch_moments() -> Tensor:
    """Return E[p p^T], (12, 12) float64, of natural 2x2 patches p in the order (channel, y, x)."""
    moments = torch.empty(3, _PATCH**2, 3, _PATCH**2, dtype=torch.float64)
    for a in range(_PATCH**2):
        for b in range(_PATCH**2):
            distance = abs(a // _PATCH - b // _PATCH), abs(a % _PATCH - b % _PATCH)
            rr, gg, bb, rg, rb, gb = _MOMENTS[distance]
            moments[:, a, :, b] = torch.tensor([[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]])
    return moments.reshape(3 * _PATCH**2, 3 * _PATCH**2)


def whitening_filters(moments: Tensor) -> Tensor:
    """Return filters (24, 3, 2, 2) float32 whose outputs on such patches are uncorrelated.

    The 12 eigenvectors by falling eigenvalue e, each divided by sqrt(e + 5e-4), then their
    negatives.

    Args:
        moments: (12, 12), E[p p^T] of patches in the order (channel, y, x).
    Source: Page 2019, "How to train your ResNet" 7; airbench94.py, init_whitening_conv.
    """
    decomposed = torch.linalg.eigh(moments.to(torch.float64))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    values, vectors = cast(tuple[Tensor, Tensor], decomposed)
    # An eigenvector's sign is the library's choice: make its first large entry positive, so that
    # the filters come in the same order everywhere. "Large", for in antisymmetric vectors the
    # largest entries are equal but for their signs and rounding.
    sizes = vectors.abs()
    first_large = (sizes > 0.9 * sizes.amax(0)).int().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, first_large).sign()
    filters = (vectors / torch.sqrt(values + _WHITENING_EPS)).T.flip(0)
    return torch.cat([filters, -filters]).to(torch.float32).reshape(-1, 3, _PATCH, _PATCH)


def build_airbench(config: AirbenchConfig, num_classes: int, *, dropout: float) -> Airbench:
    """Return the network with fresh weights."""
    return Airbench(config, num_classes, dropout=dropout)
