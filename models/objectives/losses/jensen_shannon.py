"""Generalised Jensen-Shannon divergence between label and prediction: bounded."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.objectives.cross_entropy import at_least_float32


class JensenShannonConfig(BaseModel):
    """`(w KL(y || m) + (1 - w) KL(p || m)) / -(1 - w) log(1 - w)` with `m = w y + (1 - w) p`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["js"] = "js"
    w: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Weight of the label: towards 0 cross entropy, towards 1 absolute error; 0.5 "
        "is symmetric in label and prediction.",
    )


def js_divergence(logits: Tensor, targets: Tensor, w: float) -> Tensor:
    """Divergence of each row.

    Args:
        logits: (B, C).
        targets: (B, C), rows sum to 1; no gradient flows into them.
        w: in (0, 1).
    Returns: (B,); for w = 0.5 in [0, 2], 2 where the supports are disjoint.
    Source: Englesson and Azizpour 2021, eqs. 3 and 4.
    """
    log_probs = torch.log_softmax(at_least_float32(logits), dim=1)
    probs = log_probs.exp()
    labels = targets.detach().to(log_probs.dtype)
    mixture = w * labels + (1 - w) * probs
    # A class without label and with an underflown probability: 0 log 0 = 0, and no NaN gradient.
    log_mixture = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    from_label = torch.xlogy(labels, labels) - labels * log_mixture
    from_prediction = probs * (log_probs - log_mixture)
    divergence = (w * from_label + (1 - w) * from_prediction).sum(dim=1)  # (B, C) -> (B,)
    return divergence / (-(1 - w) * math.log1p(-w))
