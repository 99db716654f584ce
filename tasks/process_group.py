"""The processes that train one model: torchrun starts them, here they join and agree.

What passes between them beside gradients are small Python objects and the first state, pickled by
torch.distributed: ranks trust each other, as they trust the rendezvous that brought them together.
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.ranks import ONE_PROCESS, Ranks
from models.training import TrainingState
from tasks import provenance
from tasks.devices import DeviceChoice, resolve_device

_T = TypeVar("_T")

# A lost rank is noticed when its connection closes; this is for ranks that hang. Longer than the
# storage's retries (600 s), during which one rank may hold up the others and still go on.
_TIMEOUT_SECONDS = 1800.0


class RanksDiffer(ValueError):
    """The ranks of one training run under different library versions or kinds of device."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train one model; every rank must make the same calls.

    Attributes:
        ranks: this rank and how many there are; one by default, and then nothing is exchanged.
    """

    ranks: Ranks = ONE_PROCESS

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes to the store."""
        return self.ranks.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if self.ranks.world_size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def wait(self) -> None:
        """Return once every rank has come here."""
        self.gather(None)

    def share(self, value: _T) -> _T:
        """Return rank 0's value, on all ranks; the others' is not looked at."""
        if self.ranks.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's value in the order of ranks, on all ranks."""
        if self.ranks.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(found, value)
        return found

    def share_state(self, state: TrainingState) -> None:
        """Give every rank rank 0's state, bit by bit, so that one choice of checkpoint counts."""
        if self.ranks.world_size == 1:
            return
        tensors = state.tensors()
        forms = {name: (value.dtype, value.shape) for name, value in tensors.items()}
        forms, scalars = self.share((forms, state.scalars()))
        received: dict[str, torch.Tensor] = {}
        for name, (dtype, shape) in forms.items():
            is_own = self.is_first
            received[name] = tensors[name] if is_own else torch.empty(shape, dtype=dtype)
            if received[name].numel():
                # As bytes: the exchange need not know the type.
                dist.broadcast(received[name].reshape(-1).view(torch.uint8), src=0)
        if not self.is_first:
            state.restore(received, scalars)

    def wrap(
        self, state: TrainingState, *, accumulation_steps: int, device: torch.device
    ) -> nn.Module | None:
        """Return what the forward pass goes through so that gradients are averaged over ranks.

        None for one process. Where a step is one joint batch (accumulation_steps 1), BatchNorm
        layers on CUDA are made to share their statistics; elsewhere each micro-batch is a group.
        Running statistics are not broadcast: the trainer averages them over all parts of a step.
        """
        if self.ranks.world_size == 1:
            return None
        if accumulation_steps == 1 and device.type == "cuda":
            # In place, for BatchNorm is never the outermost module; names and weights stay.
            nn.SyncBatchNorm.convert_sync_batchnorm(state.model)
        device_ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.15 prefers the name forward_sync_buffers, which 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(
                state.model, device_ids=device_ids, broadcast_buffers=False
            )


ALONE = ProcessGroup()
"""A training in one process."""


def world_size() -> int:
    """Return how many processes were started to train together with this one, itself included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined_group(choice: DeviceChoice) -> Iterator[tuple[ProcessGroup, torch.device]]:
    """Join the processes that torchrun started with this one; alone where it did not.

    Yields: the group and this rank's device: CUDA device LOCAL_RANK, or the CPU.
    Raises: ValueError if there are more ranks on this machine than CUDA devices; RanksDiffer.
    """
    if world_size() == 1:
        yield ALONE, resolve_device(choice)
        return
    device = _device_of_rank(choice)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=_timeout_seconds()),
    )
    try:
        group = ProcessGroup(Ranks(dist.get_rank(), dist.get_world_size()))
        _refuse_differences(group, device)
        yield group, device
    finally:
        dist.destroy_process_group()


def _device_of_rank(choice: DeviceChoice) -> torch.device:
    if choice == "cpu" or not torch.cuda.is_available():
        return resolve_device(choice)
    local_rank = int(os.environ["LOCAL_RANK"])
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ValueError(
            f"rank {local_rank} of this machine has no device: torch sees {num_devices} CUDA"
            f" devices; start {num_devices} processes here (--nproc-per-node), or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return resolve_device(choice)


def _refuse_differences(group: ProcessGroup, device: torch.device) -> None:
    """What differs between ranks would make the result depend on which of them did what."""
    facts = group.gather({"device": device.type} | provenance.versions())
    for rank, other in enumerate(facts):
        differing = [
            f"{name} {facts[0].get(name)} and {other.get(name)}"
            for name in sorted(facts[0] | other)
            if facts[0].get(name) != other.get(name)
        ]
        if differing:
            raise RanksDiffer(
                f"ranks 0 and {rank} differ: {', '.join(differing)}; install the same versions on"
                " all machines, and choose --device cpu or cuda for all of them"
            )


def _timeout_seconds() -> float:
    text = os.environ.get("SELFTRAIN_COLLECTIVE_TIMEOUT_SECONDS")
    if text is None:
        return _TIMEOUT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(
            f"SELFTRAIN_COLLECTIVE_TIMEOUT_SECONDS={text!r} must be a number of seconds above 0"
        )
    return seconds
