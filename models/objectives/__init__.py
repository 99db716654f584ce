"""Training objectives: what is computed from a batch, and which data streams that needs."""

from typing import assert_never

from torch import Tensor

from models.objectives.batch import Batch, Stream, ViewKind
from models.objectives.choice import (
    ObjectiveConfig,
    auxiliary_head,
    calls_teacher,
    labels_only,
    reads_class_prior,
    why_not_mixed,
)
from models.objectives.consistency import ConsistencyConfig
from models.objectives.cross_entropy import smooth_labels, soft_cross_entropy
from models.objectives.distillation import DistillationConfig, DistillationObjective
from models.objectives.fixmatch import DebiasConfig, FixMatchConfig, FixMatchObjective
from models.objectives.joint import DecoupledHeadConfig, JointConfig, JointObjective
from models.objectives.losses import PseudoLossConfig
from models.objectives.objective import Models, Objective, ObjectiveState, StepLoss

__all__ = [
    "Batch",
    "ConsistencyConfig",
    "DebiasConfig",
    "DecoupledHeadConfig",
    "DistillationConfig",
    "DistillationObjective",
    "FixMatchConfig",
    "FixMatchObjective",
    "JointConfig",
    "JointObjective",
    "Models",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveState",
    "PseudoLossConfig",
    "StepLoss",
    "Stream",
    "ViewKind",
    "auxiliary_head",
    "build_objective",
    "calls_teacher",
    "labels_only",
    "reads_class_prior",
    "smooth_labels",
    "soft_cross_entropy",
    "why_not_mixed",
]


def build_objective(config: ObjectiveConfig, class_prior: Tensor | None = None) -> Objective:
    """The objective that `config` describes.

    Args:
        config: the choice and its settings.
        class_prior: (C,), the mean of the teacher's probabilities over the unlabelled images, where
            `reads_class_prior`. Streams and initial state do not depend on it; a loss does.
    """
    match config:
        case JointConfig():
            return JointObjective(config, class_prior)
        case FixMatchConfig():
            return FixMatchObjective(config)
        case DistillationConfig():
            return DistillationObjective(config)
        case _ as unreachable:
            assert_never(unreachable)
