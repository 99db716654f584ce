"""Squared error of probabilities: bounded, and kinder to wrong labels than cross entropy."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.objectives.cross_entropy import at_least_float32


class SquaredErrorConfig(BaseModel):
    """`mean_c (t_c - p_c)^2`; small beside cross entropy: MixMatch weights it with 75."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mse_prob"] = "mse_prob"


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes of the squared difference of each row.

    Args:
        logits: (B, C).
        targets: (B, C), rows sum to 1; no gradient flows into them.
    Returns: (B,), at most 2 / C.
    Source: Berthelot et al. 2019 (MixMatch), eq. 4; fixmatch/mixmatch.py.
    """
    probs = torch.softmax(at_least_float32(logits), dim=1)
    return (targets.detach().to(probs.dtype) - probs).square().mean(dim=1)  # (B, C) -> (B,)
