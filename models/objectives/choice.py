"""The choice of an objective, and what each asks of the rest of a training."""

from collections.abc import Mapping
from typing import Annotated, Any, assert_never, cast

from pydantic import BeforeValidator, Field

from models.objectives.distillation import DistillationConfig
from models.objectives.fixmatch import FixMatchConfig
from models.objectives.joint import DecoupledHeadConfig, JointConfig


def _joint_by_default(value: object) -> object:
    """Read settings without a kind as of `joint`, which was the only one once."""
    if not isinstance(value, Mapping):
        return value
    settings = cast("Mapping[str, Any]", value)
    return {"kind": "joint", **settings}


ObjectiveConfig = Annotated[
    JointConfig | FixMatchConfig | DistillationConfig,
    Field(discriminator="kind"),
    BeforeValidator(_joint_by_default),
]


def calls_teacher(config: ObjectiveConfig) -> bool:
    """Whether the training needs the round's teacher itself, not only its labels."""
    match config:
        case JointConfig() | FixMatchConfig():
            return False
        case DistillationConfig():
            return True
        case _ as unreachable:
            assert_never(unreachable)


def reads_class_prior(config: ObjectiveConfig) -> bool:
    """Whether `build_objective` needs the teacher's mean prediction on the unlabelled images."""
    return isinstance(config, JointConfig) and config.margin is not None


def auxiliary_head(config: ObjectiveConfig, unlabeled_ratio: int) -> DecoupledHeadConfig | None:
    """The head that the student needs while it trains; none where there are no pseudo-labels."""
    if isinstance(config, JointConfig) and unlabeled_ratio > 0:
        return config.decoupled_head
    return None


def labels_only(config: ObjectiveConfig) -> JointConfig:
    """The objective of the same training on labels alone: for a baseline, at unlabeled_ratio 0.

    What concerns pseudo-labels is left as it is in `joint`, where it then has no effect; FixMatch
    and distillation become cross entropy with their own label smoothing, in strong views.
    """
    match config:
        case JointConfig():
            return config.model_copy(update={"labeled_images": True})
        case FixMatchConfig() | DistillationConfig():
            return JointConfig(label_smoothing=config.label_smoothing)
        case _ as unreachable:
            assert_never(unreachable)


def why_not_mixed(config: ObjectiveConfig, mixing: str) -> str | None:
    """Why an objective cannot take batches that `noise.mixing` has mixed; None if it can.

    Args:
        config: the objective.
        mixing: the kind of the mixing.
    """
    match config:
        case JointConfig():
            reasons = {
                "tsa": (config.tsa, "compares the student with the one label of an image"),
                "consistency": (config.consistency, "holds together views of one image"),
                "decoupled_head": (config.decoupled_head, "keeps labels and pseudo-labels apart"),
            }
            for name, (value, reason) in reasons.items():
                if value is not None:
                    return f"objective.{name} {reason}"
            return None
        case FixMatchConfig():
            return "objective.kind=fixmatch takes its labels from the weak view of the same image"
        case DistillationConfig():
            if mixing in ("manifold_mixup", "prob_pseudo_mixup"):
                return (
                    "objective.kind=distillation has no stored pseudo-labels, and its teacher is "
                    "shown mixed images: take mixup, cutmix or mixup_or_cutmix"
                )
            return None
        case _ as unreachable:
            assert_never(unreachable)
