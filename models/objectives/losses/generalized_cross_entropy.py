"""Generalised cross entropy: between cross entropy and absolute error, robust to wrong labels."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.objectives.cross_entropy import at_least_float32


class GeneralizedCrossEntropyConfig(BaseModel):
    """`sum_c t_c (1 - p_c^q) / q`, for a hard label (1 - p_y^q) / q."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gce"] = "gce"
    q: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Towards 0: cross entropy; 1: 1 - p_y. Its gradient is that of cross entropy "
        "times p_y^q, so labels that the student finds unlikely pull less.",
    )


def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float) -> Tensor:
    """Loss of each row.

    Args:
        logits: (B, C).
        targets: (B, C), rows sum to 1; no gradient flows into them.
        q: in (0, 1].
    Returns: (B,), between 0 and 1 / q.
    Source: Zhang and Sabuncu 2018, eq. 6; bethgelab/robustness examples/selflearning/main.py.
    """
    log_probs = torch.log_softmax(at_least_float32(logits), dim=1)
    # 1 - p^q without the cancellation at p near 1.
    losses = -torch.expm1(q * log_probs) / q
    return (targets.detach().to(log_probs.dtype) * losses).sum(dim=1)  # (B, C) -> (B,)
