"""Losses between a prediction and a pseudo-label, one a file: the choice of `pseudo_loss`."""

from typing import Annotated, assert_never

from pydantic import Field
from torch import Tensor

from models.objectives.cross_entropy import CrossEntropyConfig, soft_cross_entropy
from models.objectives.losses.generalized_cross_entropy import (
    GeneralizedCrossEntropyConfig,
    generalized_cross_entropy,
)
from models.objectives.losses.jensen_shannon import JensenShannonConfig, js_divergence
from models.objectives.losses.kullback_leibler import KullbackLeiblerConfig, kl_divergence
from models.objectives.losses.negative_learning import NegativeLearningConfig, negative_learning
from models.objectives.losses.squared_error import SquaredErrorConfig, squared_error

PseudoLossConfig = Annotated[
    CrossEntropyConfig
    | KullbackLeiblerConfig
    | GeneralizedCrossEntropyConfig
    | JensenShannonConfig
    | SquaredErrorConfig
    | NegativeLearningConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "CrossEntropyConfig",
    "GeneralizedCrossEntropyConfig",
    "JensenShannonConfig",
    "KullbackLeiblerConfig",
    "NegativeLearningConfig",
    "PseudoLossConfig",
    "SquaredErrorConfig",
    "pseudo_label_losses",
]


def pseudo_label_losses(config: PseudoLossConfig, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each pseudo-labelled image.

    Args:
        config: which loss.
        logits: (B, C).
        targets: (B, C), rows sum to 1; no gradient flows into them.
    Returns: (B,) float32, float64 for float64 logits.
    """
    match config:
        case CrossEntropyConfig():
            return soft_cross_entropy(logits, targets)
        case KullbackLeiblerConfig():
            return kl_divergence(logits, targets, config.temperature)
        case GeneralizedCrossEntropyConfig():
            return generalized_cross_entropy(logits, targets, config.q)
        case JensenShannonConfig():
            return js_divergence(logits, targets, config.w)
        case SquaredErrorConfig():
            return squared_error(logits, targets)
        case NegativeLearningConfig():
            return negative_learning(logits, targets, config.max_probability)
        case _ as unreachable:
            assert_never(unreachable)
