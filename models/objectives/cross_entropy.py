"""Cross entropy against a distribution, and label smoothing."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class CrossEntropyConfig(BaseModel):
    """Cross entropy against the pseudo-label, soft or hard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ce"] = "ce"


def at_least_float32(values: Tensor) -> Tensor:
    """Return half precision as float32 and the rest as it is: no loss is computed in 16 bits."""
    return values if values.dtype == torch.float64 else values.float()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each row; its gradient by the logits is p - q.

    Args:
        logits: (B, C).
        targets: (B, C), rows sum to 1; held constant, no gradient flows into them. A target that
            is the model's own detached prediction gives a zero gradient.
    Returns: (B,) float32, float64 for float64 logits.
    """
    log_probs = torch.log_softmax(at_least_float32(logits), dim=1)
    return -(targets.detach().to(log_probs.dtype) * log_probs).sum(dim=1)  # (B, C) -> (B,)


def smooth_labels(one_hot: Tensor, smoothing: float) -> Tensor:
    """Mix (B, C) one-hot rows with the uniform distribution over all C classes (TensorFlow's form).

    With smoothing 0.1 and C = 10 the true class has 0.91 and each other 0.01. (The other form,
    e / (C - 1) off the true class, gives 0.9 and 0.0111.)
    """
    return one_hot * (1 - smoothing) + smoothing / one_hot.shape[1]
