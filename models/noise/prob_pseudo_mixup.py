"""Probabilistic pseudo-mixup: the more confident a pseudo-label, the more of its image is kept."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class ProbPseudoMixupConfig(BaseModel):
    """Pseudo-labelled images are mixed with each other in proportion to their confidences.

    Confident partners rescue unconfident samples, so a selection that drops the latter first leaves
    little to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prob_pseudo_mixup"] = "prob_pseudo_mixup"
    cutmix_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the pseudo-labelled images that are mixed by pasting a box instead "
        "of blending.",
    )
    labeled_alpha: float | None = Field(
        default=0.8,
        gt=0,
        le=100,
        description="Labelled images, which have no confidence, are mixed with each other by plain "
        "mixup of this alpha; null leaves them alone.",
    )


def confidence_shares(confidences: Tensor, partners: Tensor) -> Tensor:
    """Return (B,) lambda = c_i / (c_i + c_j) of each row i and its partner j.

    Confidences 0.9 and 0.6 give 0.6. Two confidences of 0 share equally.

    Args:
        confidences: (B,) in [0, 1].
        partners: (B,) int64.
    Source: semi-vit util/mixup.py, ProbPseudoMixup.
    """
    own, other = confidences.double(), confidences.double()[partners]
    total = own + other
    return torch.where(total > 0, own / total.clamp(min=1e-30), 0.5)


def mixed_confidences(confidences: Tensor, partners: Tensor) -> Tensor:
    """Return (B,) the larger confidence of each pair: what a threshold then reads."""
    return torch.maximum(confidences, confidences[partners])
