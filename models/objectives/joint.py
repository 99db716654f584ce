"""The objective of Noisy Student: labelled and pseudo-labelled samples in one forward pass."""

from typing import Literal, assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.objectives.batch import Batch, Stream
from models.objectives.cross_entropy import smooth_labels, soft_cross_entropy
from models.objectives.objective import Models, ObjectiveState, StepLoss, StreamSizes

LossNormalization = Literal["labeled_batch", "concat_mean"]


class JointConfig(BaseModel):
    """Joint cross entropy of labels and pseudo-labels."""

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
        "code); concat_mean: / all samples (the paper's text), smaller by 1 + unlabeled_ratio.",
    )
    unlabeled_weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor on the pseudo-labelled loss; 0 leaves only the effect on BatchNorm.",
    )


class JointObjective:
    """One forward pass over the joint batch, so BatchNorm sees the mixture."""

    def __init__(self, config: JointConfig) -> None:
        self.config = config

    def streams(self, config: StreamSizes) -> tuple[Stream, ...]:
        """The streams in the order in which a batch joins them; only labelled at ratio 0."""
        labeled = Stream(role="labeled", samples_per_step=config.batch_size)
        if config.unlabeled_ratio == 0:
            return (labeled,)
        pseudo = Stream(
            role="pseudo_labeled",
            samples_per_step=config.batch_size * config.unlabeled_ratio,
            with_selection=True,
        )
        return (labeled, pseudo)

    def init_state(self, num_classes: int) -> ObjectiveState:
        """Empty: this objective remembers nothing between steps."""
        del num_classes
        return {}

    def next_state(self, state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
        """The same: there is nothing to remember."""
        del statistics
        return state

    def loss(
        self, models: Models, batch: Batch, state: ObjectiveState, step: int, total_steps: int
    ) -> StepLoss:
        """The loss and its logs.

        A pseudo-label's weight multiplies its loss and not the normaliser, so a sample of weight 0
        counts like one of loss 0. Logs: labeled_loss, labeled_accuracy and, with a pseudo-labelled
        stream, pseudo_loss (weighted mean before unlabeled_weight) and pseudo_accuracy (agreement
        with the pseudo-label, under noise).
        """
        del state, step, total_steps  # the joint objective has no schedule of its own
        num_labeled = len(batch.labels)
        logits: Tensor = models.student(batch.images)  # (B_l + B_u, C)
        labeled_logits, pseudo_logits = logits[:num_labeled], logits[num_labeled:]
        one_hot = torch.nn.functional.one_hot(batch.labels, logits.shape[1]).float()
        labeled = soft_cross_entropy(
            labeled_logits, smooth_labels(one_hot, self.config.label_smoothing)
        )  # (B_l,)
        with torch.no_grad():
            hits = (labeled_logits.argmax(dim=1) == batch.labels).float()
        logs = {"labeled_loss": labeled.detach().mean(), "labeled_accuracy": hits.mean()}
        if batch.pseudo_targets is None:
            return StepLoss(labeled.mean(), logs)

        targets = batch.pseudo_targets
        if batch.pseudo_is_hard:
            targets = smooth_labels(targets, self.config.label_smoothing)
        pseudo = soft_cross_entropy(pseudo_logits, targets)  # (B_u,)
        if batch.pseudo_weights is not None:
            pseudo = pseudo * batch.pseudo_weights
        with torch.no_grad():
            agrees = pseudo_logits.argmax(dim=1) == batch.pseudo_targets.argmax(dim=1)
        logs["pseudo_loss"] = pseudo.detach().mean()
        logs["pseudo_accuracy"] = agrees.float().mean()
        total = combine_losses(labeled, pseudo * self.config.unlabeled_weight, self.config)
        return StepLoss(total, logs)


def combine_losses(labeled: Tensor, pseudo: Tensor, config: JointConfig) -> Tensor:
    """The sum of (B_l,) and (B_u,) losses over the normaliser that `config` names."""
    total = labeled.sum() + pseudo.sum()
    match config.loss_normalization:
        case "labeled_batch":
            return total / len(labeled)
        case "concat_mean":
            return total / (len(labeled) + len(pseudo))
        case _:
            assert_never(config.loss_normalization)
