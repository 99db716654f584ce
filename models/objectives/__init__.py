"""Training objectives: what is computed from a batch, and which data streams that needs."""

from models.objectives.batch import Batch, Stream, ViewKind
from models.objectives.cross_entropy import smooth_labels, soft_cross_entropy
from models.objectives.joint import JointConfig, JointObjective
from models.objectives.objective import Models, Objective, ObjectiveState, StepLoss

ObjectiveConfig = JointConfig

__all__ = [
    "Batch",
    "JointConfig",
    "JointObjective",
    "Models",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveState",
    "StepLoss",
    "Stream",
    "ViewKind",
    "build_objective",
    "smooth_labels",
    "soft_cross_entropy",
]


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `config` describes; a second kind becomes a case here."""
    return JointObjective(config)
