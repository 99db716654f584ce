"""FixMatch, online: the student labels a weak view of each image and learns from a strong one."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.objectives.batch import Batch, Stream
from models.objectives.cross_entropy import at_least_float32, smooth_labels, soft_cross_entropy
from models.objectives.margin import clamped_log, with_margin
from models.objectives.objective import Models, ObjectiveState, StepLoss, StreamSizes

_PRIOR = "class_prior"


class DebiasConfig(BaseModel):
    """DebiasPL: pseudo-labels from `z - tau log p`, the loss on `z + tau log p`, p averaged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tau: float = Field(default=0.4, gt=0, allow_inf_nan=False, description="Strength of both.")
    momentum: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Of the moving average p of the raw predictions on weak views, uniform at "
        "first; the authors use 0.99 where labels are very few.",
    )


class FixMatchConfig(BaseModel):
    """Hard pseudo-labels made in every step; no selection is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fixmatch"] = "fixmatch"
    threshold: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="Least probability of a pseudo-label; 0.95 for CIFAR, 0.7 for ImageNet.",
    )
    unlabeled_weight: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor on the unlabelled loss; 1 for CIFAR, 10 for ImageNet.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Of labels and pseudo-labels; FixMatch has none."
    )
    debias: DebiasConfig | None = Field(
        default=None, description="Correct pseudo-labels and loss for favoured classes; null: no."
    )


class FixMatchObjective:
    """One forward pass over labelled weak, unlabelled weak and unlabelled strong views."""

    def __init__(self, config: FixMatchConfig) -> None:
        self.config = config

    def streams(self, config: StreamSizes) -> tuple[Stream, ...]:
        """Labelled images in a weak view, unlabelled ones in a weak and a strong view."""
        if config.unlabeled_ratio == 0:
            raise ValueError(
                "objective.kind=fixmatch with unlabeled_ratio=0 has no unlabelled images: set "
                "unlabeled_ratio to at least 1 (FixMatch uses 7), or kind: joint for labels alone"
            )
        return (
            Stream(role="labeled", samples_per_step=config.batch_size, views=("weak",)),
            Stream(
                role="unlabeled",
                samples_per_step=config.batch_size * config.unlabeled_ratio,
                views=("weak", "strong"),
            ),
        )

    def init_state(self, num_classes: int) -> ObjectiveState:
        """The uniform class prior (C,) with debias; else nothing is remembered."""
        if self.config.debias is None:
            return {}
        return {_PRIOR: torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)}

    def next_state(self, state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
        """The prior moved towards the mean prediction of the step, over all ranks."""
        debias = self.config.debias
        if debias is None:
            return state
        old = state[_PRIOR]
        new = statistics[_PRIOR].to(old)
        return {_PRIOR: debias.momentum * old + (1 - debias.momentum) * new}

    def loss(
        self, models: Models, batch: Batch, state: ObjectiveState, step: int, total_steps: int
    ) -> StepLoss:
        """`mean_l CE + w mean_u m CE(y, z_strong)`, y and m from the weak view.

        The unlabelled mean is over the whole batch, kept or not. Pseudo-labels and margin take the
        prior as it was before this step. Logs: labeled_loss, labeled_accuracy, pseudo_loss (that
        mean), pseudo_accuracy (strong predictions that agree with the pseudo-label) and
        pseudo_kept (share of images at the threshold or above).
        Source: Sohn et al. 2020, eqs. 3 and 4; fixmatch/fixmatch.py.
        """
        del step, total_steps
        weak, strong = batch.views["unlabeled_weak"], batch.views["unlabeled_strong"]
        num_labeled, num_unlabeled = len(batch.labels), len(weak)
        assert len(batch.images) == num_labeled, "FixMatch reads no stored pseudo-labels"
        logits: Tensor = models.student(torch.cat([batch.images, weak, strong]))
        labeled_logits, weak_logits, strong_logits = torch.split(
            logits, [num_labeled, num_unlabeled, num_unlabeled]
        )
        smoothing = self.config.label_smoothing
        label_targets = smooth_labels(_one_hot(batch.labels, labeled_logits), smoothing)
        labeled = soft_cross_entropy(labeled_logits, label_targets)  # (B_l,)

        raw_probs = torch.softmax(at_least_float32(weak_logits.detach()), dim=1)
        confidences, classes = self._pseudo_labels(weak_logits.detach(), state).max(dim=1)
        kept = (confidences >= self.config.threshold).to(confidences.dtype)
        learned = strong_logits
        if self.config.debias is not None:
            learned = with_margin(strong_logits, clamped_log(state[_PRIOR]), self.config.debias.tau)
        targets = smooth_labels(_one_hot(classes, strong_logits), smoothing)
        unlabeled = kept * soft_cross_entropy(learned, targets)  # (B_u,)

        with torch.no_grad():
            hits = (labeled_logits.argmax(dim=1) == batch.labels).float()
            agrees = (strong_logits.argmax(dim=1) == classes).float()
        logs = {
            "labeled_loss": labeled.detach().mean(),
            "labeled_accuracy": hits.mean(),
            "pseudo_loss": unlabeled.detach().mean(),
            "pseudo_accuracy": agrees.mean(),
            "pseudo_kept": kept.mean(),
        }
        # Raw, not debiased: an average of corrected predictions would drift to uniform, and the
        # correction with it.
        statistics = {} if self.config.debias is None else {_PRIOR: raw_probs.mean(dim=0)}
        total = labeled.mean() + self.config.unlabeled_weight * unlabeled.mean()
        return StepLoss(total, logs, statistics)

    def _pseudo_labels(self, weak_logits: Tensor, state: ObjectiveState) -> Tensor:
        """Probabilities (B_u, C) that pseudo-labels are read from, debiased where that is set."""
        logits = at_least_float32(weak_logits)
        if self.config.debias is not None:
            logits = with_margin(logits, clamped_log(state[_PRIOR]), -self.config.debias.tau)
        return torch.softmax(logits, dim=1)


def _one_hot(classes: Tensor, logits: Tensor) -> Tensor:
    one_hot = nn.functional.one_hot(classes, logits.shape[1])
    return one_hot.to(at_least_float32(logits).dtype)
