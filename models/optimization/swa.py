"""Stochastic weight averaging: the plain mean of the weights along the end of a training."""

# torch's optimisers are built from its _foreach functions, which it exports without a public name.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from collections.abc import Iterable
from fractions import Fraction

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.ranks import ONE_PROCESS, Ranks


class SwaConfig(BaseModel):
    """Mean of the weights at regular steps of the last part of the training.

    It is meant for a learning rate that stays up at the end (a cosine with a final_fraction).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_fraction: float = Field(
        default=0.75,
        ge=0,
        lt=1,
        description="Share of the training before it, rounded down to a step; 0 takes all.",
    )
    every_steps: int = Field(
        default=1,
        ge=1,
        description="Distance of the weights that are averaged, an epoch in the paper.",
    )


def num_averaged(updates: int, config: SwaConfig, *, total_steps: int) -> int:
    """How many sets of weights the mean holds after so many updates of all.

    Weights are taken every `every_steps` updates after the first floor(start_fraction * N).
    """
    # The decimal that the user wrote, not its binary neighbour.
    start = int(Fraction(repr(config.start_fraction)) * total_steps)
    return max(0, updates - start) // config.every_steps


def is_averaged(updates: int, config: SwaConfig, *, total_steps: int) -> bool:
    """Whether the weights after so many updates enter the mean."""
    before = num_averaged(updates - 1, config, total_steps=total_steps)
    return num_averaged(updates, config, total_steps=total_steps) > before


@torch.no_grad()
def update_swa(mean: nn.Module, model: nn.Module, num_before: int) -> None:
    """Take the weights of `model` into the mean of `num_before` others, in place.

    mean <- mean + (w - mean) / (n + 1). Buffers are copied: the mean has statistics of its own only
    after `recompute_batchnorm`.

    Source: Izmailov et al. 2018, algorithm 1.
    """
    torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 / (num_before + 1))
    for target, value in zip(mean.buffers(), model.buffers(), strict=True):
        target.copy_(value)


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module, images: Iterable[Tensor], *, ranks: Ranks = ONE_PROCESS
) -> None:
    """Replace BatchNorm's running statistics by the mean of those of the given batches, in place.

    All else is in evaluation mode, so that neither dropout nor stochastic depth acts and nothing is
    random. Frozen layers keep their statistics. The mode of the model is put back. Without
    BatchNorm nothing happens, and no batch is asked for.

    Args:
        model: images to logits, such as the mean of `update_swa`, whose statistics fit no weights.
        images: batches (B, 3, H, W), on the model's device, all of one size.
        ranks: this process among those that each give as many batches of their own; the mean is
            over the batches of all.
    Source: Izmailov et al. 2018, section 3.2.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    was_training = model.training
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches, each counting the same
        layer.train()
    try:
        for batch in images:
            model(batch)
        averages = [
            average
            for layer in layers
            for average in (layer.running_mean, layer.running_var)
            if average is not None
        ]
        for average, mean in zip(averages, ranks.all_reduce_mean(averages), strict=True):
            average.copy_(mean)
        for layer in layers:
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked *= ranks.world_size
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.train(was_training)
