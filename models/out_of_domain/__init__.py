"""Out-of-domain gates: which images show none of the classes, judged by the teacher's outputs.

A gate comes before calibration, so it reads the outputs as they were stored: uncalibrated in the
full form of predictions; in the top_k form confidence, margin and entropy by the temperature that
calibrated it when it was labelled.
"""

from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain.configs import (
    EnergyConfig,
    EntropyConfig,
    MaxProbConfig,
    OutOfDomainConfig,
    OutOfDomainNoneConfig,
    PuConfig,
)
from models.out_of_domain.energy import energy_scores
from models.out_of_domain.entropy import entropy_scores
from models.out_of_domain.max_prob import max_prob_scores
from models.out_of_domain.outputs import Outputs
from models.out_of_domain.pu import PuModel, fit_pu

__all__ = [
    "EnergyConfig",
    "EntropyConfig",
    "FinishedGate",
    "MaxProbConfig",
    "OutOfDomainConfig",
    "OutOfDomainNoneConfig",
    "Outputs",
    "PuConfig",
    "finish_gate",
    "is_in_domain",
    "reads_corpus",
    "reads_dev",
]


@dataclass(frozen=True)
class FinishedGate:
    """A gate with all it learned.

    Attributes:
        config: the rule.
        threshold: of the score, which is high where an image is in domain.
        model: of a rule that fits one.
    """

    config: OutOfDomainConfig
    threshold: float
    model: PuModel | None = None


def reads_dev(config: OutOfDomainConfig) -> bool:
    """Return whether the gate learns from the dev predictions."""
    match config:
        case OutOfDomainNoneConfig():
            return False
        case MaxProbConfig() | EnergyConfig() | EntropyConfig():
            return config.keep_dev_fraction is not None
        case PuConfig():
            return True
        case _ as unreachable:
            assert_never(unreachable)


def reads_corpus(config: OutOfDomainConfig) -> bool:
    """Return whether the gate learns from a sample of the corpus."""
    return isinstance(config, PuConfig)


def finish_gate(
    config: OutOfDomainConfig, *, dev: Outputs | None = None, sample: Outputs | None = None
) -> FinishedGate:
    """Learn what the gate needs.

    Args:
        config: the rule.
        dev: outputs for the dev images, where `reads_dev`.
        sample: outputs for a part of the corpus, where `reads_corpus`.
    """
    match config:
        case OutOfDomainNoneConfig():
            return FinishedGate(config, -np.inf)
        case MaxProbConfig(min_confidence=float(least)):
            return FinishedGate(config, least)
        case EnergyConfig(max_energy=float(most)) | EntropyConfig(max_entropy=float(most)):
            return FinishedGate(config, -most)
        case MaxProbConfig() | EnergyConfig() | EntropyConfig():
            assert dev is not None, "the threshold is learned from dev"
            assert config.keep_dev_fraction is not None, "the config has one of the two"
            scores = _scores(FinishedGate(config, -np.inf), dev)
            return FinishedGate(config, _reached_by(scores, config.keep_dev_fraction))
        case PuConfig(prior=prior):
            assert dev is not None, "dev images are the positives"
            assert sample is not None, "the corpus is the unlabelled side"
            return FinishedGate(config, 0.0, fit_pu(dev, sample, prior=prior))
        case _ as unreachable:
            assert_never(unreachable)


def is_in_domain(gate: FinishedGate, outputs: Outputs) -> NDArray[np.bool_]:
    """Return which images are kept, (N,): those whose score reaches the threshold."""
    return _scores(gate, outputs) >= gate.threshold


def _scores(gate: FinishedGate, outputs: Outputs) -> NDArray[np.float64]:
    match gate.config:
        case OutOfDomainNoneConfig():
            return np.zeros(len(outputs.confidence))
        case MaxProbConfig():
            return max_prob_scores(outputs)
        case EnergyConfig():
            return energy_scores(outputs)
        case EntropyConfig():
            return entropy_scores(outputs)
        case PuConfig():
            assert gate.model is not None, "fitted when the gate was finished"
            return gate.model.scores(outputs)
        case _ as unreachable:
            assert_never(unreachable)


def _reached_by(scores: NDArray[np.float64], fraction: float) -> float:
    """Return the largest threshold that at least this share of the scores reaches."""
    num_kept = int(np.ceil(fraction * len(scores) - 1e-9))
    return float(np.sort(scores)[::-1][num_kept - 1])
