"""One trainer for teachers and students: a generator of step reports.

It neither logs, saves nor prints. All randomness comes from the batches and from a seed per step,
so a run restored from a checkpoint goes on exactly as the uninterrupted one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.compiling import compiled_or_not
from models.gradients import GradientPass, Step
from models.objectives import Batch, Models, StepLoss, build_objective
from models.optimization import (
    ema_decay,
    is_averaged,
    learning_rate,
    num_averaged,
    peak_learning_rate,
    recompute_batchnorm,
    update_ema,
    update_swa,
)
from models.ranks import (
    ONE_PROCESS,
    Ranks,
    own_parts,
    refuse_unsynchronised_batchnorm,
)
from models.scaling import has_collapsed
from models.training_config import TrainingConfig
from models.training_state import TrainingState, initial_state

__all__ = [
    "NonFiniteTraining",
    "StepReport",
    "TrainingConfig",
    "TrainingState",
    "finish",
    "initial_state",
    "train",
]

_RECOMPUTING_STEPS = 100
"""Whose batches give the mean of weights its BatchNorm statistics."""


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
    layer_seed: int,
    report_every: int = 1,
    forward_model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    class_prior: Tensor | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Iterator[StepReport]:
    """Train `state` in place from its step to `total_steps`, yielding reports.

    A report comes after every step divisible by `report_every` and after the last one, so reports
    do not depend on where a run was resumed. Only then is the state known to be finite, and only
    then does the device wait; take checkpoints at reports.

    Args:
        state: where to start; `initial_state` or a restored one.
        config: what to train.
        next_batch: (step, part, num_parts) -> that part of the step's batch, on the state's
            device: steps and parts from 0, a step's images split evenly. Depends on these alone,
            and is asked for the parts of this rank only.
        total_steps: updates of the whole stage, not of this call.
        num_labeled: labelled images in an epoch; schedules count in them.
        layer_seed: a stream; step s has seed derive_seed(stream, s), part p of several parts
            derive_seed(stream, s, p). It drives dropout, stochastic depth and mixing only.
        report_every: in steps.
        forward_model: what the forward pass goes through, such as DistributedDataParallel around
            `state.model`; by default the model itself.
        teacher: frozen and in evaluation mode, for objectives that call it.
        class_prior: (C,), the teacher's mean prediction, for objectives that read it.
        ranks: this process among those that train together, each with an equal state, which stay
            equal; losses and logs of the reports are means over all of them.
    Raises: NonFiniteTraining, at the report after it happened, naming the step of it; ValueError
        where parts or BatchNorm do not fit the number of ranks.
    """
    if report_every < 1:
        raise ValueError(f"report_every={report_every} must be at least 1")
    model = state.model if forward_model is None else forward_model
    objective = build_objective(config.objective, class_prior)
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

    if (
        config.swa is not None
        and num_averaged(total_steps, config.swa, total_steps=total_steps) < 1
    ):
        raise ValueError(
            f"swa.every_steps={config.swa.every_steps} after swa.start_fraction="
            f"{config.swa.start_fraction} of {total_steps} steps averages no weights: lower one"
        )
    gradient_pass = GradientPass(
        config,
        objective,
        Models(model, teacher),
        ranks=ranks,
        layer_stream=layer_seed,
        device=device,
        scaler=state.scaler,
    )
    is_compiled = not config.compile
    sums = _Sums(device)
    model.train()
    refuse_unsynchronised_batchnorm(
        model, accumulation_steps=config.accumulation_steps, world_size=ranks.world_size
    )
    for step in range(state.step, total_steps):
        rate = rate_at(step)
        state.optimizer.zero_grad(set_to_none=True)
        place = Step(step, total_steps, state.objective_state)
        if is_compiled:
            found = gradient_pass(place, next_batch)
        else:
            found = _first_compiled_step(state, gradient_pass, place, next_batch)
            is_compiled = True
        _update(state, config, rate)
        state.objective_state = objective.next_state(state.objective_state, found.statistics)
        if state.ema is not None and config.ema is not None:
            update_ema(state.ema, state.model, ema_decay(step, config.ema))
        state.step = step + 1
        _update_swa(state, config, total_steps)
        sums.add(step, found.loss, found.logs)
        if state.step % report_every == 0 or state.step == total_steps:
            report = sums.report(state.step, rate, rate_at)
            _refuse_non_finite(state, rate)
            _refuse_collapsed_scale(state, rate)
            yield report
            sums = _Sums(device)
            model.train()  # the caller may have evaluated


def finish(
    state: TrainingState,
    config: TrainingConfig,
    next_batch: Callable[[int, int, int], Batch],
    *,
    total_steps: int,
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Make the final model of a training that has reached its last step, in place.

    The mean of weights gets BatchNorm statistics of its own, from the batches of the last 100 steps
    (a function of the state and the data, so that a training which was interrupted before it gives
    the same). Each rank reads the parts that it trains on. Without `swa` there is nothing to do.
    """
    if state.swa is None:
        return
    assert state.step == total_steps, "the mean of weights is complete after the last step only"
    num_parts, parts = own_parts(config, ranks)
    first = max(0, total_steps - _RECOMPUTING_STEPS)
    recompute_batchnorm(
        state.swa,
        (
            _all_images(next_batch(step, part, num_parts))
            for step in range(first, total_steps)
            for part in parts
        ),
        ranks=ranks,
    )


def _all_images(batch: Batch) -> Tensor:
    return torch.cat([batch.images, *batch.views.values()])


def _first_compiled_step(
    state: TrainingState,
    gradient_pass: GradientPass,
    place: Step,
    next_batch: Callable[[int, int, int], Batch],
) -> StepLoss:
    found, fallback = compiled_or_not(state.model, lambda: gradient_pass(place, next_batch))
    if fallback is not None:
        state.fallbacks.append(fallback)
    return found


def _update(state: TrainingState, config: TrainingConfig, rate: float) -> None:
    if config.gradient_clip_norm is not None:
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    if state.scaler is None:
        state.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    else:
        # A gradient that overflowed is the scale's fault: weights stay, and the scale is halved.
        state.scaler.step(state.optimizer)  # pyright: ignore[reportUnknownMemberType]
        state.scaler.update()


def _update_swa(state: TrainingState, config: TrainingConfig, total_steps: int) -> None:
    if state.swa is None or config.swa is None:
        return
    if is_averaged(state.step, config.swa, total_steps=total_steps):
        before = num_averaged(state.step - 1, config.swa, total_steps=total_steps)
        update_swa(state.swa, state.model, before)


def _refuse_collapsed_scale(state: TrainingState, rate: float) -> None:
    if state.scaler is not None and has_collapsed(state.scaler):
        raise NonFiniteTraining(state.step - 1, rate, "gradient, at any scale of the loss,")


def _refuse_non_finite(state: TrainingState, rate: float) -> None:
    modules = {"weights": state.model, "weight average": state.ema, "mean of weights": state.swa}
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
