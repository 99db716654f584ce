"""mixup: convex combinations of pairs of images and of their targets (Zhang et al. 2018)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class MixupConfig(BaseModel):
    """Each image is blended with another image of its batch, lambda ~ Beta(alpha, alpha)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mixup"] = "mixup"
    alpha: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Of the Beta distribution; 1 draws lambda uniformly (CIFAR), 0.2 keeps one of "
        "the images in the foreground (ImageNet).",
    )
    prob: float = Field(
        default=1.0, gt=0, le=1, description="Probability that a batch is mixed at all."
    )


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return (B,) values in the type and on the device of `like`, shaped (B, 1, ..., 1)."""
    return values.to(like).view(-1, *(1,) * (like.dim() - 1))


def mix_rows(rows: Tensor, partners: Tensor, lam: Tensor) -> Tensor:
    """Return lam * row + (1 - lam) * partner: of images, hidden states or targets.

    Args:
        rows: (B, ...) float.
        partners: (B,) int64, the row that each is mixed with.
        lam: (B,) in [0, 1], the share that a row keeps; 1 leaves it exactly as it is.
    Source: mixup-cifar10 train.py, which draws one lambda a batch.
    """
    share = per_row(lam, rows)
    return rows * share + rows[partners.to(rows.device)] * (1 - share)
