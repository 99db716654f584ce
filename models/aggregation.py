"""One prediction from several: of several teachers, of several views, of several dropout passes.

All of them are the members of an ensemble, (T, V, P): teachers, views, passes. With one member
there is nothing to combine.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Aggregate = Literal["mean_prob", "mean_logit"]


class NoUncertaintyConfig(BaseModel):
    """Nothing is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none"] = "none"


class McDropoutConfig(BaseModel):
    """Over passes with dropout left on, whose mean is the prediction.

    Source: Gal and Ghahramani 2016; Rizve et al. 2021 (UPS), pseudo_labeling_util.py.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mc_dropout"] = "mc_dropout"
    passes: int = Field(default=10, ge=2, le=1000, description="Forward passes of every view.")
    rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of the dropout before the last layer; null: the teacher's own in training.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the dropped units.")


class ViewsUncertaintyConfig(BaseModel):
    """Over the views of an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["views"] = "views"


class TeachersUncertaintyConfig(BaseModel):
    """Over the teachers of an ensemble."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["teachers"] = "teachers"


UncertaintyConfig = Annotated[
    NoUncertaintyConfig | McDropoutConfig | ViewsUncertaintyConfig | TeachersUncertaintyConfig,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class Combined:
    """What the members say together of B images.

    Attributes:
        log_probs: (B, C).
        log_sums: (B,) logsumexp of the mean logits; under mean_prob, which has no logits, the mean
            of the members'.
        uncertainty: (B,) standard deviation of the probability of the predicted class, over what
            the config names; None where it names nothing.
        agreement: (B,) share of the members whose class is the predicted one.
    """

    log_probs: Tensor
    log_sums: Tensor
    uncertainty: Tensor | None
    agreement: Tensor


def combine(
    log_probs: Tensor, log_sums: Tensor, *, aggregate: Aggregate, uncertainty: UncertaintyConfig
) -> Combined:
    """Combine the members' predictions.

    Args:
        log_probs: (T, V, P, B, C) log-probabilities.
        log_sums: (T, V, P, B) logsumexp of the logits; their sum is the logits.
        aggregate: mean_prob averages probabilities, mean_logit logits.
        uncertainty: over which of T, V and P a standard deviation is taken, of what the others
            give together; n - 1 in the denominator.
    Raises: ValueError if that axis has one member only.
    """
    axis = _axis(uncertainty)
    together, sums = mean_prediction(log_probs.flatten(0, 2), log_sums.flatten(0, 2), aggregate)
    labels = together.argmax(dim=1)  # (B, C) -> (B,)
    spread = None
    if axis is not None:
        if log_probs.shape[axis] < 2:
            raise ValueError(
                f"uncertainty={uncertainty.kind} is a standard deviation, of one member only: "
                "label with several of them, or leave it out"
            )
        moved = log_probs.movedim(axis, 0).flatten(1, 2)  # (A, others, B, C)
        moved_sums = log_sums.movedim(axis, 0).flatten(1, 2)  # (A, others, B)
        each = torch.stack(
            [
                mean_prediction(one, one_sums, aggregate)[0]
                for one, one_sums in zip(moved, moved_sums, strict=True)
            ]
        )  # (A, B, C)
        spread = standard_deviation(each, labels)
    votes = log_probs.flatten(0, 2).argmax(dim=2)  # (M, B)
    agreement = (votes == labels).to(together.dtype).mean(dim=0)
    return Combined(together, sums, spread, agreement)


def mean_prediction(
    log_probs: Tensor, log_sums: Tensor, aggregate: Aggregate
) -> tuple[Tensor, Tensor]:
    """Return (B, C) log-probabilities and (B,) logsumexp of (M, B, C) and (M, B) of the members."""
    match aggregate:
        case "mean_prob":
            num_members = torch.tensor(len(log_probs), dtype=log_probs.dtype)
            total = torch.logsumexp(log_probs, dim=0)
            return total - num_members.log().to(total.device), log_sums.mean(dim=0)
        case "mean_logit":
            logits = (log_probs + log_sums[..., None]).mean(dim=0)
            return logits.log_softmax(dim=1), logits.logsumexp(dim=1)
        case _:
            assert_never(aggregate)


def standard_deviation(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return (B,) the deviation of the labels' probability over the first axis of (A, B, C).

    Source: UPS, pseudo_labeling_util.py: torch.std, which divides by A - 1.
    """
    rows = torch.arange(len(labels), device=labels.device)
    return log_probs[:, rows, labels].exp().std(dim=0)  # (A, B) -> (B,)


def _axis(uncertainty: UncertaintyConfig) -> int | None:
    match uncertainty:
        case NoUncertaintyConfig():
            return None
        case TeachersUncertaintyConfig():
            return 0
        case ViewsUncertaintyConfig():
            return 1
        case McDropoutConfig():
            return 2
        case _:
            assert_never(uncertainty)
