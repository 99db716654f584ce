"""Monte-Carlo dropout: several predictions of one network, each with other units dropped."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def dropout_passes(network: nn.Module, *, passes: int, rate: float, seed: int) -> Generator[None]:
    """Let each call of a network in evaluation mode give `passes` rows for every image.

    What comes before the dropout is computed once; its output is repeated, and every repetition
    loses other units. The rows are those of the first pass for all images, then the second's, ...
    Nothing else of the network changes, and BatchNorm stays in evaluation mode.

    Args:
        network: its last dropout layer is meant, whatever its rate; all of `models.architectures`
            have one right before their last linear layer, and train with no other.
        passes: P.
        rate: share of units that is dropped, in (0, 1).
        seed: of the dropped units, the same on every device; each call goes on in their stream.
    Raises: ValueError if the network has no dropout layer.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    if not layers:
        raise ValueError(
            f"MC-dropout needs a dropout layer, and {type(network).__name__} has none: choose"
            " another architecture, or uncertainty=views"
        )
    generator = torch.Generator().manual_seed(seed)

    def repeat_and_drop(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        x: Tensor = inputs[0]
        repeated = x.repeat(passes, *(1,) * (x.dim() - 1))  # (B, ...) -> (P * B, ...)
        kept = torch.rand(repeated.shape, generator=generator) >= rate
        return repeated * kept.to(x.device) / (1 - rate)

    handle = layers[-1].register_forward_pre_hook(repeat_and_drop)
    try:
        yield
    finally:
        handle.remove()
