"""Knowledge distillation: divergence from the teacher's softened distribution."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.objectives.cross_entropy import at_least_float32


class KullbackLeiblerConfig(BaseModel):
    """`T^2 KL(q^(1/T) / Z || softmax(z / T))`; the factor keeps the gradient's size over T."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["kl"] = "kl"
    temperature: float = Field(
        default=1.0,
        ge=0.05,
        le=100,
        description="Softens teacher and student alike; 1 has the gradient of cross entropy.",
    )


def kl_divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Divergence of each row from its softened target, times temperature squared.

    Args:
        logits: (B, C) of the student.
        targets: (B, C) probabilities at temperature 1, rows sum to 1; no gradient flows into them.
            They are softened as p^(1/T), which is softmax(z / T) of the teacher's logits z.
        temperature: T > 0, of both sides.
    Returns: (B,), 0 exactly where the distributions agree.
    Source: Hinton et al. 2015, section 2.1; big_vision evaluators/proj/distill/distance.py.
    """
    log_probs = torch.log_softmax(at_least_float32(logits) / temperature, dim=1)
    # log 0 = -inf stays a probability of 0 under any temperature.
    softened = torch.softmax(targets.detach().to(log_probs.dtype).log() / temperature, dim=1)
    # kl_div takes 0 log 0 as 0, where a difference of logarithms would be infinite.
    divergence = torch.nn.functional.kl_div(log_probs, softened, reduction="none")
    return temperature**2 * divergence.sum(dim=1)  # (B, C) -> (B,)
