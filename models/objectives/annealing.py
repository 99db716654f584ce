"""Training-signal annealing: few labels are released only as fast as the threshold rises."""

import math
from typing import Literal, assert_never

import torch
from torch import Tensor

AnnealingSchedule = Literal["linear", "log", "exp"]


def annealing_threshold(schedule: AnnealingSchedule, progress: float, num_classes: int) -> float:
    """The probability of the true class above which a labelled image counts no longer.

    Args:
        schedule: linear releases evenly, log early (many labels), exp late (few labels).
        progress: share of the training done, in [0, 1].
        num_classes: C; the threshold starts near 1 / C.
    Source: Xie et al. 2019 (UDA), section 2.3; uda/image/main.py get_tsa_threshold.
    """
    match schedule:
        case "linear":
            released = progress
        case "log":
            released = 1 - math.exp(-5 * progress)
        case "exp":
            released = math.exp(5 * (progress - 1))
        case _:
            assert_never(schedule)
    return released * (1 - 1 / num_classes) + 1 / num_classes


def annealed(losses: Tensor, logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Drop the losses of well-known labels, so that the mean is over those which are left.

    Args:
        losses: (B,) of the labelled images.
        logits: (B, C) of the same; no gradient flows through the choice.
        labels: (B,) int64.
        threshold: an image with exactly this probability of its label is kept.
    Returns: (B,); the kept losses times B / max(1, number kept), the others 0. The number is that
        of this batch: where a step has several parts each divides by its own, as BatchNorm does.
    """
    with torch.no_grad():
        probs = torch.softmax(logits.detach().float(), dim=1)
        of_label = probs.gather(1, labels[:, None]).squeeze(1)  # (B, C) -> (B,)
        kept = (of_label <= threshold).to(losses.dtype)
        scale = len(losses) / kept.sum().clamp_min(1)
    return losses * kept * scale
