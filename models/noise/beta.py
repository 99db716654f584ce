"""Beta and Dirichlet draws from a fixed number of random words each.

A rejection sampler that reads as many numbers as it needs would tie a draw to those before it, so
each gamma draw owns `WORDS_PER_GAMMA` words: six attempts of Marsaglia and Tsang's method, which
accepts more than 95 % of proposals, and at shapes below 1 their power transform. Where all six are
refused (less than 2e-8 of the draws) a value in the middle stands in.

Source: Marsaglia and Tsang 2000, "A simple method for generating gamma variables".
"""

import math

import torch
from torch import Tensor

_ATTEMPTS = 6
WORDS_PER_GAMMA = 3 * _ATTEMPTS + 1
"""Random words of 32 bits that one gamma draw reads; a beta draw reads twice as many."""


def log_gamma_draws(words: Tensor, shape: float) -> Tensor:
    """Return logarithms of draws from Gamma(shape, 1); in logs small shapes do not underflow.

    Args:
        words: (..., WORDS_PER_GAMMA) int64 in [0, 2**32), independent and uniform.
        shape: > 0.
    Returns: (...) float64.
    """
    assert words.shape[-1] == WORDS_PER_GAMMA, f"{words.shape[-1]} words for one gamma draw"
    u = (words.double() + 0.5) * 2.0**-32  # inside (0, 1), so that no logarithm is infinite
    first, second, test = u[..., :-1].reshape(*u.shape[:-1], _ATTEMPTS, 3).unbind(-1)
    normal = (-2 * first.log()).sqrt() * torch.cos(2 * math.pi * second)
    d = (shape if shape >= 1 else shape + 1) - 1 / 3
    cube = (1 + normal / math.sqrt(9 * d)) ** 3
    log_cube = cube.clamp(min=1e-300).log()
    is_accepted = (cube > 0) & (test.log() < 0.5 * normal**2 + d - d * cube + d * log_cube)
    chosen = is_accepted.to(torch.int64).argmax(-1, keepdim=True)  # the first accepted
    log_draw = math.log(d) + log_cube.gather(-1, chosen)[..., 0]
    log_draw = torch.where(is_accepted.any(-1), log_draw, math.log(d))
    return log_draw if shape >= 1 else log_draw + u[..., -1].log() / shape


def beta_draws(words: Tensor, alpha: float) -> Tensor:
    """Return draws from Beta(alpha, alpha), in [0, 1].

    Args:
        words: (..., 2 * WORDS_PER_GAMMA) int64 in [0, 2**32).
        alpha: > 0; 1 is uniform, towards 0 draws are 0 or 1, towards infinity one half.
    Returns: (...) float64.
    """
    gammas = log_gamma_draws(words.reshape(*words.shape[:-1], 2, WORDS_PER_GAMMA), alpha)
    return torch.sigmoid(gammas[..., 0] - gammas[..., 1])


def dirichlet_draws(words: Tensor, alpha: float, size: int) -> Tensor:
    """Return draws from Dirichlet(alpha, ..., alpha), rows that sum to 1.

    Args:
        words: (..., size * WORDS_PER_GAMMA) int64 in [0, 2**32).
        alpha: > 0.
        size: numbers of a row.
    Returns: (..., size) float64.
    """
    words = words.reshape(*words.shape[:-1], size, WORDS_PER_GAMMA)
    return torch.softmax(log_gamma_draws(words, alpha), -1)
