"""Parts of steps as they wait to be used: all but their targets is laid out already."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from models.objectives import Batch


@dataclass(frozen=True)
class WaitingTargets:
    """Pseudo-targets that list few of their classes, on the device where they will be used.

    Attributes:
        positions: (M,) int64 of the listed probabilities in the flattened (B_u, C).
        probs: (M,) float32.
        rest: (B_u,) float32, of each class of a row that is not listed.
        num_classes: C.
    """

    positions: Tensor
    probs: Tensor
    rest: Tensor
    num_classes: int

    def dense(self) -> Tensor:
        """Return (B_u, C), rows summing to 1."""
        targets = self.rest.unsqueeze(1).repeat(1, self.num_classes)  # (B_u,) -> (B_u, C)
        targets.view(-1).scatter_(0, self.positions, self.probs)
        return targets


@dataclass(frozen=True)
class WaitingBatch:
    """A batch whose pseudo-targets become dense when it is taken.

    Several parts wait at a time, on the device; a dense target is as large as a row of logits.
    Fields: see `Batch`.
    """

    images: Tensor
    labels: Tensor
    pseudo_targets: WaitingTargets | None
    pseudo_weights: Tensor | None
    pseudo_is_hard: bool
    pseudo_confidences: Tensor | None
    views: Mapping[str, Tensor]

    def batch(self) -> Batch:
        """Return the batch."""
        targets = self.pseudo_targets
        return Batch(
            self.images,
            self.labels,
            pseudo_targets=None if targets is None else targets.dense(),
            pseudo_weights=self.pseudo_weights,
            pseudo_is_hard=self.pseudo_is_hard,
            pseudo_confidences=self.pseudo_confidences,
            views=self.views,
        )
