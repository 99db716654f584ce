"""Training objectives: what is computed from a batch, and which data streams that needs."""

from models.objectives.batch import Batch, Stream
from models.objectives.cross_entropy import smooth_labels, soft_cross_entropy
from models.objectives.joint import JointObjective, ObjectiveConfig

__all__ = [
    "Batch",
    "JointObjective",
    "ObjectiveConfig",
    "Stream",
    "build_objective",
    "smooth_labels",
    "soft_cross_entropy",
]


def build_objective(config: ObjectiveConfig) -> JointObjective:
    """The objective that `config` describes; a second kind becomes a case here."""
    return JointObjective(config)
