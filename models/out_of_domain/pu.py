"""A classifier of dev images against the corpus, of which an unknown part is like them.

The corpus cannot be called negative: a share `prior` of it is positive. The non-negative risk
(Kiryo et al. 2017, eq. 6) takes the positives' part out of the corpus's negative risk and stops
where that would fall below zero, which is where a classifier begins to learn the corpus by heart.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain.outputs import Outputs

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where it fits: processes that judge by a finished gate start without it.

_STEPS, _LEARNING_RATE, _WEIGHT_DECAY = 400, 0.05, 1e-3


@dataclass(frozen=True)
class PuModel:
    """A quadratic function of the four outputs; at least 0 is in domain.

    Attributes:
        means: (4,) by which outputs are centred.
        scales: (4,) by which they are divided then.
        weights: (14,) of the four, their squares and products.
        bias: of the function.
    """

    means: NDArray[np.float64]
    scales: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float

    def scores(self, outputs: Outputs) -> NDArray[np.float64]:
        """Return the log-odds of being in domain, (N,)."""
        return _features(outputs, self.means, self.scales) @ self.weights + self.bias


def nnpu_risk(positive: "Tensor", unlabeled: "Tensor", *, prior: float) -> "Tensor":
    """Return `prior * R_p+ + max(0, R_u- - prior * R_p-)` under the logistic loss.

    Args:
        positive: (P,) scores of positives.
        unlabeled: (U,) scores of unlabelled rows.
        prior: share of the unlabelled that is positive, in (0, 1).
    """
    import torch

    softplus = torch.nn.functional.softplus
    negative_part = softplus(unlabeled).mean() - prior * softplus(positive).mean()
    return prior * softplus(-positive).mean() + negative_part.clamp(min=0)


def fit_pu(positive: Outputs, unlabeled: Outputs, *, prior: float) -> PuModel:
    """Fit the classifier; the same rows in the same order give the same one.

    Args:
        positive: dev images.
        unlabeled: a sample of the corpus.
        prior: share of the corpus that is in domain, in (0, 1).
    """
    import torch

    both = np.concatenate([positive.table(), unlabeled.table()])
    means, scales = both.mean(axis=0), np.maximum(both.std(axis=0), 1e-6)
    rows = [torch.as_tensor(_features(some, means, scales)) for some in (positive, unlabeled)]
    weights = torch.zeros(rows[0].shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        risk = nnpu_risk(*(some @ weights + bias for some in rows), prior=prior)
        risk = risk + _WEIGHT_DECAY * weights.square().sum()
        risk.backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    return PuModel(means, scales, weights.detach().numpy(), float(bias.detach()))


def _features(
    outputs: Outputs, means: NDArray[np.float64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the centred, scaled outputs, clipped at 5, with all products of two, (N, 14)."""
    scaled = np.clip((outputs.table() - means) / scales, -5, 5)
    first, second = np.triu_indices(scaled.shape[1])
    return np.concatenate([scaled, scaled[:, first] * scaled[:, second]], axis=1)
