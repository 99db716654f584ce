"""Consistency of a network over clean and noised views of an image (AugMix's loss)."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.objectives.cross_entropy import at_least_float32


class ConsistencyConfig(BaseModel):
    """`weight * JS(p_weak, p_strong, p_strong')` beside the cross entropy of the weak view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(
        default=12.0, gt=0, allow_inf_nan=False, description="12 in AugMix, on ImageNet and CIFAR."
    )


def js_consistency(logits: tuple[Tensor, ...]) -> Tensor:
    """Jensen-Shannon divergence of several predictions of each image.

    Args:
        logits: two or more of (B, C), a view each; gradients flow into all of them.
    Returns: (B,), the mean of KL(p_i || m) over the views with m the mean of the p_i, in
        [0, log(number of views)]; 0 where all views agree.
    Source: Hendrycks et al. 2020, section 3; augmix/imagenet.py, whose floor of 1e-7 under the
        mean is kept.
    """
    log_probs = torch.stack([torch.log_softmax(at_least_float32(z), dim=1) for z in logits])
    probs = log_probs.exp()  # (V, B, C)
    log_mixture = probs.mean(dim=0).clamp(1e-7, 1).log()
    return (probs * (log_probs - log_mixture)).sum(dim=2).mean(dim=0)  # (V, B, C) -> (B,)
