"""The gradient of one step: forward and backward of a step's parts, averaged over all ranks."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parallel import DistributedDataParallel

from models.mixing import mixed
from models.objectives import Batch, Models, Objective, ObjectiveState, StepLoss
from models.randomness import derive_seed
from models.ranks import Ranks, own_parts
from models.scaling import autocast
from models.training_config import TrainingConfig


@dataclass(frozen=True)
class Step:
    """Where in a training a gradient is taken."""

    number: int
    total_steps: int
    objective_state: ObjectiveState


class GradientPass:
    """Forward and backward passes of this rank's parts of a step, which leave gradients behind.

    A step's loss is the mean over its parts, and so are its gradient, its logs, its statistics and
    the movement of BatchNorm's running averages: every part starts from the averages that the step
    began with. Which rank did which part therefore leaves no trace.
    """

    def __init__(
        self,
        config: TrainingConfig,
        objective: Objective,
        models: Models,
        *,
        ranks: Ranks,
        layer_stream: int,
        device: torch.device,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._config = config
        self._objective = objective
        self._models = models
        self._ranks = ranks
        self._layer_stream = layer_stream
        self._device = device
        self._scaler = scaler
        self._num_parts, self._own_parts = own_parts(config, ranks)

    def __call__(self, step: Step, next_batch: Callable[[int, int, int], Batch]) -> StepLoss:
        """Add the step's gradient to the parameters' and return the means over parts and ranks."""
        if self._num_parts == 1:
            return self._part(step, next_batch(step.number, 0, 1), 0)
        running = _RunningAverages(self._models.student)
        found: list[StepLoss] = []
        for part in self._own_parts:
            batch = next_batch(step.number, part, self._num_parts)
            with running.of_one_part(), self._synchronised(part == self._own_parts[-1]):
                found.append(self._part(step, batch, part))
        mean = _mean(found, self._ranks, running.means())
        running.set(mean.running_averages)
        return mean.loss

    def _part(self, step: Step, batch: Batch, part: int) -> StepLoss:
        place = (step.number,) if self._num_parts == 1 else (step.number, part)
        seed = derive_seed(self._layer_stream, *place)
        with (
            torch.random.fork_rng(_devices_to_fork(self._device)),  # pyright: ignore[reportUnknownMemberType]
            autocast(self._config.precision, self._device),
        ):
            _seed_layers(seed, self._device)
            with mixed(
                self._models.student,
                batch,
                self._config.noise.mixing,
                seed=derive_seed(seed, "mixing"),
                label_smoothing=self._config.objective.label_smoothing,
            ) as batch:
                found = self._objective.loss(
                    self._models, batch, step.objective_state, step.number, step.total_steps
                )
        # DistributedDataParallel takes the mean over ranks, which leaves the mean over own parts.
        loss = found.loss if len(self._own_parts) == 1 else found.loss / len(self._own_parts)
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return StepLoss(found.loss.detach(), found.logs, found.statistics)

    def _synchronised(self, is_last: bool) -> AbstractContextManager[None]:
        student = self._models.student
        if isinstance(student, DistributedDataParallel) and not is_last:
            return student.no_sync()
        return nullcontext()


class _RunningAverages:
    """BatchNorm's running mean and variance, moved once a step by the mean over its parts."""

    def __init__(self, model: nn.Module) -> None:
        layers = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
        ]
        buffers = [buffer for layer in layers for buffer in layer.buffers()]
        self._averages = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._buffers = buffers
        self._before = [buffer.clone() for buffer in buffers]
        self._sums = [torch.zeros_like(average) for average in self._averages]
        self._num_parts = 0

    @contextmanager
    def of_one_part(self) -> Generator[None]:
        """Begin with the step's averages, and note where the part has moved them."""
        _copy(self._buffers, self._before)
        yield
        for total, average in zip(self._sums, self._averages, strict=True):
            total += average
        self._num_parts += 1

    def means(self) -> list[Tensor]:
        """The averages after the parts so far, meant over them."""
        return [total / self._num_parts for total in self._sums]

    def set(self, averages: Sequence[Tensor]) -> None:
        """Take over the averages of all parts and ranks."""
        _copy(self._averages, averages)


@dataclass(frozen=True)
class _Mean:
    loss: StepLoss
    running_averages: list[Tensor]


def _mean(found: Sequence[StepLoss], ranks: Ranks, running_averages: list[Tensor]) -> _Mean:
    """The mean over parts and ranks, in one collective."""
    log_names, statistic_names = list(found[0].logs), list(found[0].statistics)
    values = [
        torch.stack([part.loss for part in found]).mean(),
        *(torch.stack([part.logs[name] for part in found]).mean(0) for name in log_names),
        *(
            torch.stack([part.statistics[name] for part in found]).mean(0)
            for name in statistic_names
        ),
    ]
    reduced = ranks.all_reduce_mean([*values, *running_averages])
    loss, rest = reduced[0], reduced[1:]
    logs = dict(zip(log_names, rest[: len(log_names)], strict=True))
    rest = rest[len(log_names) :]
    statistics = dict(zip(statistic_names, rest[: len(statistic_names)], strict=True))
    return _Mean(StepLoss(loss, logs, statistics), rest[len(statistic_names) :])


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _devices_to_fork(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _seed_layers(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
