"""The processes that train one model together, and how a step's batch is split among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from models.objectives import ObjectiveConfig, build_objective
from models.objectives.objective import StreamSizes


class StepSettings(StreamSizes, Protocol):
    """The part of a training config that the division of a step depends on."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        ...

    @property
    def objective(self) -> ObjectiveConfig:
        """It declares the streams."""
        ...


@dataclass(frozen=True)
class Ranks:
    """One process among those that train a model.

    Attributes:
        rank: of this process, from 0.
        world_size: processes in all; above 1 torch.distributed's default group must be set up.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be in [0, world_size={self.world_size})")

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all ranks, the same bits on each of them.

        One collective for all tensors, in float64; every rank must call it with tensors of the same
        shapes. With one rank the tensors are given back as they are.
        """
        if self.world_size == 1 or not tensors:
            return list(tensors)
        joined = torch.cat([tensor.detach().flatten().to(torch.float64) for tensor in tensors])
        torch.distributed.all_reduce(joined)  # pyright: ignore[reportUnknownMemberType]
        parts = torch.split(joined / self.world_size, [tensor.numel() for tensor in tensors])
        return [
            part.view(tensor.shape).to(tensor.dtype)
            for part, tensor in zip(parts, tensors, strict=True)
        ]


ONE_PROCESS = Ranks()


def own_parts(config: StepSettings, ranks: Ranks) -> tuple[int, range]:
    """The number of equal parts of a step's batch, and those that this rank does.

    Raises: as `parts_of_step`.
    """
    num_parts, per_rank = parts_of_step(config, ranks.world_size)
    return num_parts, range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)


def parts_of_step(config: StepSettings, world_size: int = 1) -> tuple[int, int]:
    """The number of equal parts of a step's batch, and how many of them each rank does.

    Rank r does the parts r * n to (r + 1) * n of n parts a rank. `accumulation_steps` says how many
    parts there are, so that neither they nor the result depend on the number of ranks; where it is
    1, each of several ranks does one part.

    Raises: ValueError, naming the nearest legal values, where parts or images do not divide evenly.
    """
    accumulation = config.accumulation_steps
    if accumulation > 1 and accumulation % world_size != 0:
        fitting = [size for size in range(1, accumulation + 1) if accumulation % size == 0]
        raise ValueError(
            f"accumulation_steps={accumulation} micro-batches cannot be shared out evenly among "
            f"{world_size} ranks: start {_nearest(world_size, fitting)} ranks, or set "
            f"accumulation_steps to {_multiples_around(accumulation, world_size)}"
        )
    num_parts = max(accumulation, world_size)
    streams = build_objective(config.objective).streams(config)
    for stream in streams:
        if stream.samples_per_step % num_parts != 0:
            why = (
                f"accumulation_steps={accumulation}" if accumulation > 1 else f"{world_size} ranks"
            )
            sizes = [other.samples_per_step for other in streams]
            fitting = [
                parts
                for parts in range(1, min(sizes) + 1)
                if all(size % parts == 0 for size in sizes)
            ]
            raise ValueError(
                f"{stream.samples_per_step} {stream.role} images a step (batch_size="
                f"{config.batch_size}, unlabeled_ratio={config.unlabeled_ratio}) cannot be split "
                f"into {num_parts} equal parts ({why}): set batch_size to "
                f"{_multiples_around(config.batch_size, num_parts)}, or take "
                f"{_nearest(num_parts, fitting)} parts "
                f"({'accumulation_steps' if accumulation > 1 else 'ranks'})"
            )
    return num_parts, num_parts // world_size


def refuse_unsynchronised_batchnorm(
    model: nn.Module, *, accumulation_steps: int, world_size: int
) -> None:
    """Refuse BatchNorm that would see one rank's images only where a step is one joint batch.

    With accumulation_steps above 1 each micro-batch is a BatchNorm group wherever it is computed,
    and nothing needs to be synchronised. A layer in evaluation mode (frozen) is left alone.

    Raises: ValueError.
    """
    if world_size == 1 or accumulation_steps > 1:
        return
    for module in model.modules():
        is_active = isinstance(module, _BatchNorm) and module.training
        if is_active and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"the network's BatchNorm would see the images of one of {world_size} ranks only, "
                "and the result would depend on their number: set accumulation_steps to "
                f"{world_size} (or a multiple), which makes each micro-batch a BatchNorm group; or "
                "convert the layers to SyncBatchNorm, which runs on CUDA only; or take a network "
                "without BatchNorm"
            )


def _multiples_around(value: int, divisor: int) -> str:
    """The nearest positive multiples of `divisor` at both sides of `value`, in words."""
    below = value // divisor * divisor
    above = below if below == value else below + divisor
    return str(above) if below in (0, above) else f"{below} or {above}"


def _nearest(value: int, fitting: list[int]) -> str:
    """The nearest legal values at both sides of `value`, in words."""
    below = [candidate for candidate in fitting if candidate <= value]
    above = [candidate for candidate in fitting if candidate > value]
    return " or ".join(str(found) for found in (below[-1:] + above[:1]))
