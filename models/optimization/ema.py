"""Exponential moving average of the weights, BatchNorm statistics included."""

# torch's optimisers are built from its _foreach functions, which it exports without a public name.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class EmaConfig(BaseModel):
    """Moving average of the weights, which is what is evaluated, saved and used for labelling."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(
        default=0.9999, ge=0, lt=1, description="Share of the old average kept; 0 copies."
    )
    tf_ramp: bool = Field(
        default=True,
        description="At update n (from 0) use min(decay, (1 + n) / (10 + n)), so that the random "
        "initial weights are forgotten early.",
    )


def ema_decay(n: int, config: EmaConfig) -> float:
    """The decay of update number n, the first being 0."""
    return min(config.decay, (1 + n) / (10 + n)) if config.tf_ramp else config.decay


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `ema` towards `model` in place: ema <- decay * ema + (1 - decay) * model.

    Covers parameters and persistent buffers, so BatchNorm's running mean and variance are averaged
    too; integer buffers (the number of batches tracked) are copied.

    Source: noisystudent utils.py get_all_variable.
    """
    averages = ema.state_dict()
    floating_averages: list[torch.Tensor] = []
    floating_values: list[torch.Tensor] = []
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            floating_averages.append(averages[name])
            floating_values.append(value)
        else:
            averages[name].copy_(value)
    torch._foreach_lerp_(floating_averages, floating_values, 1 - decay)
