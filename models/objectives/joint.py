"""The objective of Noisy Student: labelled and pseudo-labelled samples in one forward pass."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.objectives.annealing import AnnealingSchedule, annealed, annealing_threshold
from models.objectives.batch import Batch, Stream
from models.objectives.consistency import ConsistencyConfig, js_consistency
from models.objectives.cross_entropy import at_least_float32, smooth_labels, soft_cross_entropy
from models.objectives.losses import CrossEntropyConfig, PseudoLossConfig, pseudo_label_losses
from models.objectives.margin import log_prior, with_margin
from models.objectives.normalization import (
    LossNormalization,
    averaged,
    combine_losses,
    initial_averages,
)
from models.objectives.objective import Models, ObjectiveState, StepLoss, StreamSizes


class DecoupledHeadConfig(BaseModel):
    """A second head, of two layers, that alone learns from pseudo-labels; dropped after training.

    Wrong pseudo-labels then shape the features, but not the classifier that is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int | None = Field(
        default=None, ge=1, description="Width of its hidden layer; null: that of the features."
    )


class JointConfig(BaseModel):
    """Losses of labels and pseudo-labels over one joint batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["joint"] = "joint"
    label_smoothing: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the uniform distribution mixed into labels and hard pseudo-labels; "
        "soft pseudo-labels are never smoothed.",
    )
    loss_normalization: LossNormalization = Field(
        default="labeled_batch",
        description="labeled_batch: the sum over all samples / labelled samples (the released "
        "code); concat_mean: / all samples (the paper's text), smaller by 1 + unlabeled_ratio; "
        "moving_average: the weighted mean of both mean losses, the pseudo-labelled one scaled to "
        "the labelled one by their moving averages.",
    )
    unlabeled_weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor on the pseudo-labelled loss; 0 leaves only the effect on BatchNorm.",
    )
    pseudo_loss: PseudoLossConfig = Field(
        default=CrossEntropyConfig(),
        description="Loss of the pseudo-labelled images.",
        json_schema_extra={"absent_means": {"kind": "ce"}},
    )
    margin: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Strength tau of the adaptive margin: tau * log(mean prediction of the teacher "
        "on the unlabelled corpus) is added to the logits of pseudo-labelled images in training.",
        json_schema_extra={"absent_means": None},
    )
    tsa: AnnealingSchedule | None = Field(
        default=None,
        description="Training-signal annealing: labels that the student knows better than a rising "
        "threshold do not count; null counts all.",
        json_schema_extra={"absent_means": None},
    )
    decoupled_head: DecoupledHeadConfig | None = Field(
        default=None,
        description="A head of its own for pseudo-labels; null teaches both to one head.",
        json_schema_extra={"absent_means": None},
    )
    consistency: ConsistencyConfig | None = Field(
        default=None,
        description="Labelled images in one weak and two strong views, held together by a "
        "Jensen-Shannon divergence.",
        json_schema_extra={"absent_means": None},
    )
    labeled_images: bool = Field(
        default=True,
        description="False: pseudo-labelled images alone, as many a step as with labels; all three "
        "normalisations are then their mean.",
        json_schema_extra={"absent_means": True},
    )

    @model_validator(mode="after")
    def _options_take_effect(self) -> Self:
        if self.labeled_images:
            return self
        needing_labels = {
            "tsa": self.tsa is not None,
            "consistency": self.consistency is not None,
            "decoupled_head": self.decoupled_head is not None,
            "loss_normalization: moving_average": self.loss_normalization == "moving_average",
        }
        found = [name for name, is_set in needing_labels.items() if is_set]
        if found:
            raise ValueError(
                f"{', '.join(found)} with labeled_images=false: needs labelled images, of which "
                "there are none; leave it out or set labeled_images: true"
            )
        return self


@dataclass(frozen=True)
class _Logits:
    """What the student says of a batch: (B_l, C), (B_u, C), and (B_l, C) of each further view."""

    labeled: Tensor
    pseudo: Tensor
    further: tuple[Tensor, ...]


class JointObjective:
    """One forward pass over the joint batch, so BatchNorm sees the mixture."""

    def __init__(self, config: JointConfig, class_prior: Tensor | None = None) -> None:
        self.config = config
        self._log_prior = None if class_prior is None else log_prior(class_prior)

    def streams(self, config: StreamSizes) -> tuple[Stream, ...]:
        """The streams in the order in which a batch joins them; only labelled at ratio 0."""
        labeled = Stream(role="labeled", samples_per_step=config.batch_size)
        if self.config.consistency is not None:
            views = ("weak", "strong", "strong")
            labeled = Stream(role="labeled", samples_per_step=config.batch_size, views=views)
        if config.unlabeled_ratio == 0:
            if not self.config.labeled_images:
                raise ValueError(
                    "objective.labeled_images=false with unlabeled_ratio=0 leaves no images: set "
                    "unlabeled_ratio to at least 1"
                )
            return (labeled,)
        pseudo = Stream(
            role="pseudo_labeled",
            samples_per_step=config.batch_size * config.unlabeled_ratio,
            with_selection=True,
        )
        return (labeled, pseudo) if self.config.labeled_images else (pseudo,)

    def init_state(self, num_classes: int) -> ObjectiveState:
        """The loss averages of moving_average; else this objective remembers nothing."""
        del num_classes
        return initial_averages() if self.config.loss_normalization == "moving_average" else {}

    def next_state(self, state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
        """The averages after a step; the same state where there are none or labels alone."""
        return averaged(state, statistics) if state and statistics else state

    def loss(
        self, models: Models, batch: Batch, state: ObjectiveState, step: int, total_steps: int
    ) -> StepLoss:
        """The loss and its logs.

        A pseudo-label's weight multiplies its loss and not the normaliser, so a sample of weight 0
        counts like one of loss 0. Logs: labeled_loss, labeled_accuracy and, with a pseudo-labelled
        stream, pseudo_loss (weighted mean before unlabeled_weight) and pseudo_accuracy (agreement
        with the pseudo-label, under noise); consistency with it. What mixing has mixed is
        compared with the class that it has most of.
        """
        logits = self._forward(models.student, batch)
        logs: dict[str, Tensor] = {}
        labeled = self._labeled_losses(logits, batch, step / total_steps, logs)  # (B_l,)
        pseudo = self._pseudo_losses(logits.pseudo, batch, logs)  # (B_u,)
        statistics: dict[str, Tensor] = {}
        if self.config.loss_normalization == "moving_average" and len(pseudo) > 0:
            statistics = {
                "labeled_loss": labeled.detach().mean(),
                "pseudo_loss": pseudo.detach().mean(),
            }
        total = combine_losses(
            labeled,
            pseudo,
            self.config.loss_normalization,
            weight=self.config.unlabeled_weight,
            state=state,
        )
        return StepLoss(total, logs, statistics)

    def _forward(self, student: nn.Module, batch: Batch) -> _Logits:
        num_labeled, num_images = len(batch.labels), len(batch.images)
        images = batch.images
        if self.config.consistency is not None:
            images = torch.cat([images, batch.views["labeled_2"], batch.views["labeled_3"]])
        if self.config.decoupled_head is not None and num_images > num_labeled:
            both: Tensor = student(images, with_auxiliary_head=True)  # (2, B, C)
            logits, of_pseudo_labels = both[0], both[1]
        else:
            logits: Tensor = student(images)  # (B, C)
            of_pseudo_labels = logits
        further = logits[num_images:]
        return _Logits(
            logits[:num_labeled],
            of_pseudo_labels[num_labeled:num_images],
            torch.split(further, num_labeled) if len(further) > 0 else (),
        )

    def _labeled_losses(
        self, logits: _Logits, batch: Batch, progress: float, logs: dict[str, Tensor]
    ) -> Tensor:
        """Losses (B_l,), empty without labels; fills in the logs."""
        found = logits.labeled
        if len(found) == 0:
            return at_least_float32(found).sum(dim=1)
        num_classes = found.shape[1]
        if batch.label_targets is None:
            one_hot = nn.functional.one_hot(batch.labels, num_classes)
            targets = smooth_labels(
                one_hot.to(at_least_float32(found).dtype), self.config.label_smoothing
            )
            classes = batch.labels
        else:  # mixed, and smoothed before it
            targets, classes = batch.label_targets, batch.label_targets.argmax(dim=1)
        losses = soft_cross_entropy(found, targets)
        with torch.no_grad():
            hits = (found.argmax(dim=1) == classes).float()
        logs["labeled_loss"] = losses.detach().mean()
        logs["labeled_accuracy"] = hits.mean()
        if self.config.tsa is not None:
            if batch.label_targets is not None:
                raise ValueError(
                    "objective.tsa compares the student with the one label of an image, and "
                    "noise.mixing leaves it two: leave one of them out"
                )
            threshold = annealing_threshold(self.config.tsa, progress, num_classes)
            losses = annealed(losses, found, batch.labels, threshold)
        if self.config.consistency is not None:
            divergence = js_consistency((found, *logits.further))
            logs["consistency"] = divergence.detach().mean()
            losses = losses + self.config.consistency.weight * divergence
        return losses

    def _pseudo_losses(self, logits: Tensor, batch: Batch, logs: dict[str, Tensor]) -> Tensor:
        """Weighted losses (B_u,), empty without pseudo-labels; fills in the logs."""
        if batch.pseudo_targets is None:
            return at_least_float32(logits).sum(dim=1)  # no rows
        targets = batch.pseudo_targets
        # Negative learning only reads which classes are excluded; smoothed, few would be.
        if batch.pseudo_is_hard and self.config.pseudo_loss.kind != "negative_learning":
            targets = smooth_labels(targets, self.config.label_smoothing)
        losses = pseudo_label_losses(self.config.pseudo_loss, self._with_margin(logits), targets)
        if batch.pseudo_weights is not None:
            losses = losses * batch.pseudo_weights
        with torch.no_grad():
            agrees = logits.argmax(dim=1) == batch.pseudo_targets.argmax(dim=1)
        logs["pseudo_loss"] = losses.detach().mean()
        logs["pseudo_accuracy"] = agrees.float().mean()
        return losses

    def _with_margin(self, logits: Tensor) -> Tensor:
        if self.config.margin is None:
            return logits
        if self._log_prior is None:
            raise ValueError(
                f"objective.margin={self.config.margin} needs the mean prediction of the teacher "
                "on the unlabelled images: pass class_prior to build_objective"
            )
        # Kept on the device of the logits: a copy at every step would make an accelerator wait.
        self._log_prior = self._log_prior.to(logits.device)
        return with_margin(logits, self._log_prior, self.config.margin)
