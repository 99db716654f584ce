"""Adaptive logit margin: a prior of the classes added to logits in training, never in use."""

import torch
from torch import Tensor

# Below any probability that a float16 holds: a class that was never predicted has a finite margin.
_SMALLEST_PRIOR = 1e-8


def log_prior(class_prior: Tensor) -> Tensor:
    """Return log p of the (C,) mean prediction p over the unlabelled images, p at least 1e-8.

    Raises: ValueError unless p is a distribution over at least two classes (sum 1 to 1e-3).
    """
    values = class_prior.detach()
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(
            f"class prior of shape {tuple(values.shape)}: must be (C,), the mean predicted "
            "probabilities of the C classes"
        )
    total = float(values.sum())
    if not bool((values >= 0).all()) or not abs(total - 1) <= 1e-3:
        raise ValueError(
            f"class prior with minimum {float(values.min())} and sum {total}: must be "
            "non-negative and sum to 1, as a mean of probabilities does"
        )
    return clamped_log(values)


def clamped_log(class_prior: Tensor) -> Tensor:
    """Return log max(p, 1e-8), of one dtype with p."""
    return class_prior.clamp_min(_SMALLEST_PRIOR).log()


def with_margin(logits: Tensor, log_class_prior: Tensor, tau: float) -> Tensor:
    """Return z + tau log p, in which frequent classes must be won by a larger margin.

    Under cross entropy the label of a frequent class then costs less and that of a rare one more,
    so that z alone predicts rare classes more often. (With a minus in its place it would be the
    debiased prediction, from which pseudo-labels are made.)

    Args:
        logits: (B, C).
        log_class_prior: (C,) from `log_prior`.
        tau: strength; 0 changes nothing.
    Source: Wang et al. 2022 (DebiasPL), eq. 6; Menon et al. 2021, eq. 10.
    """
    offset = tau * log_class_prior
    return logits + offset.to(
        device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32)
    )
