"""Clean predictions of a classifier."""

from typing import Literal

import torch
from torch import Tensor, nn


def log_probabilities(
    model: nn.Module, images: Tensor, precision: Literal["fp32", "bf16"] = "fp32"
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of images in eval mode; the model's mode is put back.

    Args:
        model: images in [0, 1] -> logits.
        images: (B, 3, H, W), uint8 or float in [0, 1], on the model's device.
        precision: bf16 runs the network under autocast; the softmax is always float32.
    Returns: (B, C) float32 log-probabilities, and (B,) float32 logsumexp of the logits; their sum
        is the logits.
    Raises: ValueError if a logit is not finite.
    """
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            scaled = images if images.is_floating_point() else images.float() / 255
            logits: Tensor = model(scaled)  # (B, C)
            logits = logits.float()
            log_sums = torch.logsumexp(logits, dim=1)  # (B, C) -> (B,)
            log_probs = torch.log_softmax(logits, dim=1)
    finally:
        model.train(was_training)
    if not bool(torch.isfinite(log_sums).all()):
        is_bad = ~torch.isfinite(log_sums)
        raise ValueError(
            f"logits of {int(is_bad.sum())} of {len(images)} images are not finite (first: row "
            f"{int(is_bad.int().argmax())}): "
            "the model is broken, or precision is too low for it"
        )
    return log_probs, log_sums
