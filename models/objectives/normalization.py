"""How the losses of labelled and pseudo-labelled images become one number."""

from typing import Literal, assert_never

import torch
from torch import Tensor

from models.objectives.objective import ObjectiveState

LossNormalization = Literal["labeled_batch", "concat_mean", "moving_average"]

_DECAY = 0.99


def combine_losses(
    labeled: Tensor,
    pseudo: Tensor,
    normalization: LossNormalization,
    *,
    weight: float,
    state: ObjectiveState,
) -> Tensor:
    """The loss of a batch; batches of one size average to that of their union.

    Args:
        labeled: (B_l,), may be empty: then the loss is the weighted mean of the others.
        pseudo: (B_u,), may be empty: then the loss is the mean of the others.
        normalization: labeled_batch: (sum_l + w sum_u) / B_l; concat_mean: the same / (B_l + B_u);
            moving_average: (mean_l + w (a_l / a_u) mean_u) / (1 + w) with a the moving averages.
        weight: w, of the pseudo-labelled images.
        state: holds the averages for moving_average, without this batch.
    Source: noisystudent main.py; Xie et al. 2020, section 2.1; Zoph et al. 2020, appendix D.
    """
    if len(labeled) == 0:
        return (pseudo * weight).mean()
    if len(pseudo) == 0:
        return labeled.mean()
    match normalization:
        case "labeled_batch":
            return (labeled.sum() + (pseudo * weight).sum()) / len(labeled)
        case "concat_mean":
            return (labeled.sum() + (pseudo * weight).sum()) / (len(labeled) + len(pseudo))
        case "moving_average":
            ratio = balance(state).to(pseudo.dtype)
            return (labeled.mean() + weight * ratio * pseudo.mean()) / (1 + weight)
        case _:
            assert_never(normalization)


def initial_averages() -> ObjectiveState:
    """The averages before the first step, which is taken without balance (ratio 1)."""
    return {
        "labeled_loss": torch.zeros((), dtype=torch.float64),
        "pseudo_loss": torch.zeros((), dtype=torch.float64),
    }


def averaged(state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
    """The averages after a step whose mean losses are `statistics`, decay 0.99.

    Both start at 0 and are pulled alike, so that their ratio needs no correction of the start.
    """
    return {
        name: _DECAY * average + (1 - _DECAY) * statistics[name].to(average)
        for name, average in state.items()
    }


def balance(state: ObjectiveState) -> Tensor:
    """The ratio of the labelled to the pseudo-labelled average, 1 before the first step."""
    labeled, pseudo = state["labeled_loss"], state["pseudo_loss"]
    return torch.where(pseudo > 0, labeled / pseudo, 1.0)
