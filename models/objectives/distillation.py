"""Distillation from a teacher that runs beside the student and sees the same images."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.objectives.batch import Batch, Stream
from models.objectives.cross_entropy import at_least_float32, smooth_labels, soft_cross_entropy
from models.objectives.losses.kullback_leibler import kl_divergence
from models.objectives.objective import Models, ObjectiveState, StepLoss, StreamSizes


class DistillationConfig(BaseModel):
    """Function matching: the teacher answers for the very crop, noise and mixture of the student.

    Stored pseudo-labels are of one clean view; where student and teacher are to agree on views that
    cannot be stored, such as mixtures of two images, the teacher must run in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["distillation"] = "distillation"
    temperature: float = Field(
        default=1.0, ge=0.05, le=100, description="Softens teacher and student alike."
    )
    label_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share a of the cross entropy of labelled images, beside 1 - a of "
        "distillation; 0 reads no labels.",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Of the labels.")

    def model_post_init(self, context: object, /) -> None:
        """Refuse smoothing of labels that are not read."""
        if self.label_smoothing > 0 and self.label_share == 0:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing} with label_share=0 smooths "
                "nothing: leave it out or set label_share above 0"
            )


class DistillationObjective:
    """One forward pass of the student and one of the teacher over the same images."""

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config

    def streams(self, config: StreamSizes) -> tuple[Stream, ...]:
        """Unlabelled images in a strong view, and labelled ones where they have a share."""
        if config.unlabeled_ratio == 0:
            raise ValueError(
                "objective.kind=distillation with unlabeled_ratio=0 has no unlabelled images: set "
                "unlabeled_ratio to at least 1, or kind: joint for labels alone"
            )
        unlabeled = Stream(
            role="unlabeled", samples_per_step=config.batch_size * config.unlabeled_ratio
        )
        if self.config.label_share == 0:
            return (unlabeled,)
        return (Stream(role="labeled", samples_per_step=config.batch_size), unlabeled)

    def init_state(self, num_classes: int) -> ObjectiveState:
        """Empty: the teacher is frozen, and nothing else is remembered."""
        del num_classes
        return {}

    def next_state(self, state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
        """The same: there is nothing to remember."""
        del statistics
        return state

    def loss(
        self, models: Models, batch: Batch, state: ObjectiveState, step: int, total_steps: int
    ) -> StepLoss:
        """`(1 - a) mean_u T^2 KL(teacher || student) + a mean_l CE`.

        Logs: pseudo_loss (the divergence), pseudo_accuracy (agreement with the teacher), and with
        labels labeled_loss and labeled_accuracy (of a mixed image: the class it has most of).
        Raises: ValueError without a teacher or with one in training mode.
        Source: Beyer et al. 2022; big_vision configs/proj/distill/bit_i1k.py; Chen et al. 2020
            (SimCLRv2), eq. 3.
        """
        del state, step, total_steps
        if models.teacher is None or models.teacher.training:
            found = "no teacher" if models.teacher is None else "a teacher in training mode"
            raise ValueError(
                f"objective.kind=distillation was given {found}: it needs the round's teacher, "
                "frozen and in evaluation mode"
            )
        unlabeled, num_labeled = batch.views["unlabeled_strong"], len(batch.labels)
        images = torch.cat([batch.images, unlabeled]) if num_labeled > 0 else unlabeled
        logits: Tensor = models.student(images)  # (B_l + B_u, C)
        with torch.no_grad():
            teacher_logits: Tensor = models.teacher(unlabeled)  # (B_u, C)
            targets = torch.softmax(at_least_float32(teacher_logits), dim=1)
        student_logits = logits[num_labeled:]
        divergence = kl_divergence(student_logits, targets, self.config.temperature)  # (B_u,)
        with torch.no_grad():
            agrees = (student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).float()
        logs = {"pseudo_loss": divergence.detach().mean(), "pseudo_accuracy": agrees.mean()}
        share = self.config.label_share
        if num_labeled == 0:
            return StepLoss(divergence.mean(), logs)
        labeled = self._labeled_losses(logits[:num_labeled], batch)
        classes = batch.labels if batch.label_targets is None else batch.label_targets.argmax(dim=1)
        with torch.no_grad():
            hits = (logits[:num_labeled].argmax(dim=1) == classes).float()
        logs |= {"labeled_loss": labeled.detach().mean(), "labeled_accuracy": hits.mean()}
        return StepLoss((1 - share) * divergence.mean() + share * labeled.mean(), logs)

    def _labeled_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch.label_targets is not None:  # mixed, and smoothed before it
            return soft_cross_entropy(logits, batch.label_targets)
        one_hot = nn.functional.one_hot(batch.labels, logits.shape[1])
        targets = smooth_labels(
            one_hot.to(at_least_float32(logits).dtype), self.config.label_smoothing
        )
        return soft_cross_entropy(logits, targets)
