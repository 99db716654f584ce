"""Learning-rate schedules: closed forms of the step, with nothing to save or restore."""

import math
from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field

from models.durations import Duration


class CosineConfig(BaseModel):
    """Half a cosine from the peak, reached at the end of the warm-up, to a fraction of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cosine"] = "cosine"
    final_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Last over peak learning rate; 1 is constant."
    )


class StaircaseConfig(BaseModel):
    """A drop by a constant factor at regular intervals, counted from step 0 (so under warm-up too).

    Source: noisystudent utils.py build_learning_rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["staircase"] = "staircase"
    decay_rate: float = Field(default=0.97, gt=0, le=1, description="Factor at each drop.")
    decay_every: Duration = Field(
        default=Duration(labeled_epochs=2.4),
        description="Interval between drops; not rounded to whole steps.",
    )


class LinearConfig(BaseModel):
    """A straight line from the peak, reached at the end of the warm-up, to a fraction of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"] = "linear"
    final_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Last over peak learning rate."
    )


class FixMatchCosineConfig(BaseModel):
    """The first 7/8 of a quarter of a cosine: from the peak to 0.195 of it, never to 0.

    Source: Sohn et al. 2020, section 2.3: lr * cos(7 pi k / (16 K)).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fixmatch_cosine"] = "fixmatch_cosine"


class OneCycleConfig(BaseModel):
    """A rise to the peak and a longer fall far below the start; it is its own warm-up.

    Momentum is not cycled.

    Source: Smith and Topin 2018; torch's OneCycleLR, with its numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["one_cycle"] = "one_cycle"
    rise_fraction: float = Field(
        default=0.3, gt=0, lt=1, description="Share of the training in which the rate rises."
    )
    initial_fraction: float = Field(
        default=0.04, gt=0, le=1, description="First over peak learning rate."
    )
    final_fraction: float = Field(
        default=4e-6, ge=0, le=1, description="Last over peak learning rate."
    )
    anneal: Literal["cosine", "linear"] = Field(
        default="cosine", description="Shape of rise and fall."
    )


class ConstantConfig(BaseModel):
    """The peak learning rate throughout, after the warm-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"


ScheduleConfig = Annotated[
    CosineConfig
    | StaircaseConfig
    | LinearConfig
    | FixMatchCosineConfig
    | OneCycleConfig
    | ConstantConfig,
    Field(discriminator="kind"),
]


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: ScheduleConfig,
    warmup: Duration | None,
    total_steps: int,
    batch_size: int,
    num_labeled: int,
) -> float:
    """The learning rate of the update made at `step` (the first is step 0).

    During the warm-up it is peak * step / warmup_steps, so the very first update has rate 0, as in
    the release; from step warmup_steps on it is the schedule's.

    Args:
        step: in [0, total_steps]; a cosine ends at its final fraction at total_steps.
        peak: see `peak_learning_rate`.
        schedule: the shape after the warm-up.
        warmup: None for none.
        total_steps: all updates of the stage.
        batch_size: labelled images a step.
        num_labeled: labelled images in an epoch.
    Raises: ValueError if the warm-up is as long as the training.
    """
    warmup_steps = 0 if warmup is None else warmup.to_steps(batch_size, num_labeled)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup of {warmup_steps} steps must be shorter than the training of {total_steps} "
            "steps: shorten warmup or lengthen duration"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    match schedule:
        case CosineConfig():
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * cosine)
        case StaircaseConfig():
            interval = schedule.decay_every.exact_steps(
                batch_size=batch_size, num_labeled=num_labeled
            )
            return peak * schedule.decay_rate ** (step // interval)
        case LinearConfig():
            return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 - progress))
        case FixMatchCosineConfig():
            return peak * math.cos(7 * math.pi / 16 * progress)
        case OneCycleConfig():
            return peak * _one_cycle(progress, schedule)
        case ConstantConfig():
            return peak
        case _:
            assert_never(schedule)


def _one_cycle(progress: float, schedule: OneCycleConfig) -> float:
    """The learning rate over its peak, at a share of the training."""
    if progress < schedule.rise_fraction:
        start, end, done = schedule.initial_fraction, 1.0, progress / schedule.rise_fraction
    else:
        start, end = 1.0, schedule.final_fraction
        done = (progress - schedule.rise_fraction) / (1 - schedule.rise_fraction)
    if schedule.anneal == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return start + (end - start) * done
