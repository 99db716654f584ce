"""What every objective offers, and what the trainer hands to it."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from models.objectives.batch import Batch, Stream

ObjectiveState = dict[str, Tensor]


class StreamSizes(Protocol):
    """The part of a training config that streams depend on."""

    @property
    def batch_size(self) -> int:
        """Labelled images a step."""
        ...

    @property
    def unlabeled_ratio(self) -> int:
        """Pseudo-labelled or unlabelled images for each labelled one."""
        ...


@dataclass(frozen=True)
class Models:
    """The networks that an objective may call, each from images to logits (B, C).

    Attributes:
        student: what is trained; call it once a batch, so that BatchNorm sees one joint batch.
        teacher: the round's frozen teacher in evaluation mode, where the objective reads it.
    """

    student: nn.Module
    teacher: nn.Module | None = None


@dataclass(frozen=True)
class StepLoss:
    """What an objective makes of one batch.

    Attributes:
        loss: 0-dimensional; the trainer averages the gradients of a step's batches, which are of
            one size.
        statistics: what `next_state` is to know of the batch, means over it, detached; the trainer
            averages them over the step's batches and over all ranks.
        logs: 0-dimensional, detached; averaged alike.
    """

    loss: Tensor
    logs: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Objective(Protocol):
    """A loss over the streams that it declares, with a state that is checkpointed."""

    def streams(self, config: StreamSizes) -> tuple[Stream, ...]:
        """The streams in the order in which a batch joins them."""
        ...

    def init_state(self, num_classes: int) -> ObjectiveState:
        """The state before the first step, on the CPU."""
        ...

    def loss(
        self, models: Models, batch: Batch, state: ObjectiveState, step: int, total_steps: int
    ) -> StepLoss:
        """The loss of one batch; the state is only read.

        Args:
            models: what may be called.
            batch: on the device of the student.
            state: from `init_state` or `next_state`.
            step: updates made so far.
            total_steps: of the whole training.
        """
        ...

    def next_state(self, state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
        """The state for the next step, from the statistics of all batches and ranks."""
        ...
