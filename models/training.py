"""One trainer for teachers and students: a generator of step reports.

It neither logs, saves nor prints. All randomness comes from the batches and from a seed per step,
so a run restored from a checkpoint goes on exactly as the uninterrupted one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.objectives import Batch, Models, build_objective
from models.optimization import ema_decay, learning_rate, peak_learning_rate, update_ema
from models.randomness import derive_seed
from models.training_config import TrainingConfig
from models.training_state import TrainingState, initial_state

__all__ = [
    "NonFiniteTraining",
    "StepReport",
    "TrainingConfig",
    "TrainingState",
    "initial_state",
    "train",
]


@dataclass(frozen=True)
class StepReport:
    """What happened since the previous report.

    Attributes:
        step: updates made so far, equal to `TrainingState.step`: a checkpoint taken now is of it.
        loss: mean over the steps since the previous report.
        learning_rate: of the last of those steps.
        logs: of the objective, each the mean over those steps.
    """

    step: int
    loss: float
    learning_rate: float
    logs: dict[str, float]


class NonFiniteTraining(RuntimeError):
    """The loss or a weight became infinite or NaN; the state must not be saved."""

    def __init__(self, step: int, learning_rate: float, what: str) -> None:
        super().__init__(
            f"{what} is not finite at step {step}, learning rate {learning_rate:.3g}: lower the "
            "learning rate, set gradient_clip_norm, lengthen the warm-up, or look at the batches"
        )
        self.step = step
        self.learning_rate = learning_rate


def train(
    state: TrainingState,
    config: TrainingConfig,
    next_batch: Callable[[int, int, int], Batch],
    *,
    total_steps: int,
    num_labeled: int,
    layer_seed: int | Callable[[int], int],
    report_every: int = 1,
    forward_model: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Iterator[StepReport]:
    """Train `state` in place from its step to `total_steps`, yielding reports.

    A report comes after every step divisible by `report_every` and after the last one, so reports
    do not depend on where a run was resumed. Only then is the state known to be finite, and only
    then does the device wait; take checkpoints at reports.

    Args:
        state: where to start; `initial_state` or a restored one.
        config: what to train.
        next_batch: (step, part, num_parts) -> that part of the step's batch, on the state's
            device: steps and parts from 0, a step's images split evenly. Depends on these alone.
        total_steps: updates of the whole stage, not of this call.
        num_labeled: labelled images in an epoch; schedules count in them.
        layer_seed: a stream, from which step s has seed derive_seed(stream, s), or the seed of each
            step as a function (under several ranks: of step and rank). It drives dropout and
            stochastic depth only.
        report_every: in steps.
        forward_model: what the forward pass goes through, such as DistributedDataParallel around
            `state.model`; by default the model itself.
        teacher: frozen and in evaluation mode, for objectives that call it.
    Raises: NonFiniteTraining, at the report after it happened, naming the step of it.
    """
    if report_every < 1:
        raise ValueError(f"report_every={report_every} must be at least 1")
    model = state.model if forward_model is None else forward_model
    objective = build_objective(config.objective)
    device = next(state.model.parameters()).device
    peak = peak_learning_rate(config.optimizer, batch_size=config.batch_size)

    def rate_at(step: int) -> float:
        return learning_rate(
            step,
            peak=peak,
            schedule=config.schedule,
            warmup=config.warmup,
            total_steps=total_steps,
            batch_size=config.batch_size,
            num_labeled=num_labeled,
        )

    def seed_at(step: int) -> int:
        return layer_seed(step) if callable(layer_seed) else derive_seed(layer_seed, step)

    sums = _Sums(device)
    model.train()
    for step in range(state.step, total_steps):
        rate = rate_at(step)
        batch = next_batch(step, 0, 1)
        with (
            torch.random.fork_rng(_devices_to_fork(device)),  # pyright: ignore[reportUnknownMemberType]
            torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
        ):
            _seed_layers(seed_at(step), device)
            found = objective.loss(
                Models(model, teacher), batch, state.objective_state, step, total_steps
            )
        _update(state, config, found.loss, rate)
        state.objective_state = objective.next_state(state.objective_state, found.statistics)
        if state.ema is not None and config.ema is not None:
            update_ema(state.ema, state.model, ema_decay(step, config.ema))
        state.step = step + 1
        sums.add(step, found.loss, found.logs)
        if state.step % report_every == 0 or state.step == total_steps:
            report = sums.report(state.step, rate, rate_at)
            _refuse_non_finite(state, rate)
            yield report
            sums = _Sums(device)
            model.train()  # the caller may have evaluated


def _devices_to_fork(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _seed_layers(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _update(state: TrainingState, config: TrainingConfig, loss: Tensor, rate: float) -> None:
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    if config.gradient_clip_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()  # pyright: ignore[reportUnknownMemberType]


def _refuse_non_finite(state: TrainingState, rate: float) -> None:
    modules = {"weights": state.model, "weight average": state.ema}
    for what, module in modules.items():
        if module is None:
            continue
        floating = [t for t in module.state_dict().values() if t.is_floating_point()]
        # One number a tensor: NaN and infinity survive the sum of absolute values.
        norms: tuple[Tensor, ...] = torch._foreach_norm(floating, 1)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        if not torch.isfinite(torch.stack(list(norms))).all():
            raise NonFiniteTraining(state.step - 1, rate, what)


class _Sums:
    """Sums of loss and logs since the last report, kept on the device so that no step waits."""

    def __init__(self, device: torch.device) -> None:
        self.num_steps = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.logs: dict[str, Tensor] = {}
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, loss: Tensor, logs: dict[str, Tensor]) -> None:
        self.num_steps += 1
        detached = loss.detach()
        self.loss += detached
        for name, value in logs.items():
            self.logs[name] = self.logs.get(name, torch.zeros_like(self.loss)) + value.detach()
        is_first = (self.first_bad < 0) & ~torch.isfinite(detached)
        self.first_bad = torch.where(is_first, step, self.first_bad)

    def report(self, step: int, rate: float, rate_at: Callable[[int], float]) -> StepReport:
        loss = float(self.loss) / self.num_steps
        if not math.isfinite(loss):
            first_bad = int(self.first_bad)
            raise NonFiniteTraining(first_bad, rate_at(first_bad), "loss")
        logs = {name: float(value) / self.num_steps for name, value in self.logs.items()}
        return StepReport(step=step, loss=loss, learning_rate=rate, logs=logs)
