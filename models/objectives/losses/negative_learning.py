"""Negative learning: teach which classes an image does not show."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.objectives.cross_entropy import at_least_float32


class NegativeLearningConfig(BaseModel):
    """`mean_c -log(1 - p_c)` over the classes that the pseudo-label all but excludes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["negative_learning"] = "negative_learning"
    max_probability: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Classes with a pseudo-label below it are negative; an image without any has "
        "loss 0. A hard pseudo-label, not smoothed here, excludes every other class.",
    )


def negative_learning(logits: Tensor, targets: Tensor, max_probability: float) -> Tensor:
    """Loss of each row.

    Args:
        logits: (B, C).
        targets: (B, C), rows sum to 1; they only say which classes are negative.
        max_probability: a class with exactly this target is not negative.
    Returns: (B,), 0 where no class is negative.
    Source: Rizve et al. 2021 (UPS), eq. 5; ups/utils/pseudo_labeling_util.py.
    """
    negative = (targets.detach() < max_probability).to(at_least_float32(logits).dtype)
    excluded = -log_one_minus_softmax(logits)
    return (negative * excluded).sum(dim=1) / negative.sum(dim=1).clamp_min(1)  # (B, C) -> (B,)


def log_one_minus_softmax(logits: Tensor) -> Tensor:
    """Return log(1 - softmax) of (B, C) logits, C >= 2, with a gradient even where p rounds to 1.

    UPS adds 1e-7 inside the logarithm; the gradient of the most wrong rows is then all but lost.
    """
    logits = at_least_float32(logits)
    probs = torch.softmax(logits, dim=1)
    top = torch.nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    # Only the largest probability can come near 1: there, the logarithm of the others' sum.
    others = torch.logsumexp(logits.masked_fill(top, -torch.inf), dim=1, keepdim=True)
    of_top = others - torch.logsumexp(logits, dim=1, keepdim=True)  # (B, 1)
    return torch.where(top, of_top, torch.log1p(-probs.masked_fill(top, 0.0)))
