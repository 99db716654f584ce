"""Stochastic depth: residual branches are dropped per sample, deeper ones more often."""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torchvision.ops import StochasticDepth  # pyright: ignore[reportMissingTypeStubs]

__all__ = ["StochasticDepth", "StochasticDepthConfig", "drop_rates", "set_drop_rates"]


class StochasticDepthConfig(BaseModel):
    """Drop whole residual branches per sample while training; survivors are scaled up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Largest drop rate; 0 drops nothing."
    )
    rule: Literal["linear_official", "linear_huang"] = Field(
        default="linear_official",
        description="Rate of block i of L: linear_official rate*(i-1)/L as in the released "
        "EfficientNet code, linear_huang rate*i/L as in Huang et al. 2016, i = 1..L.",
    )


def drop_rates(config: StochasticDepthConfig, num_blocks: int) -> tuple[float, ...]:
    """Return the drop rate of every residual block, first to last.

    Source: noisystudent efficientnet_model.py (linear_official); Huang et al. 2016, eq. 4.
    """
    first = 0 if config.rule == "linear_official" else 1
    return tuple(config.rate * (first + i) / num_blocks for i in range(num_blocks))


def set_drop_rates(
    branches: Sequence[StochasticDepth], config: StochasticDepthConfig | None
) -> None:
    """Set the rates of a network's branches, given first to last; None switches all off."""
    rates: Iterable[float] = (
        (0.0,) * len(branches) if config is None else drop_rates(config, len(branches))
    )
    for branch, rate in zip(branches, rates, strict=True):
        branch.p = rate
