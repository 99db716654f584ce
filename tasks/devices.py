"""Which device a stage computes on."""

import os
from typing import Literal

import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]


def resolve_device(choice: DeviceChoice) -> torch.device:
    """Return the device: `auto` takes CUDA where there is one.

    Raises: ValueError where CUDA is asked for and there is none.
    """
    if not wants_cuda(choice):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def wants_cuda(choice: DeviceChoice) -> bool:
    """Return whether a stage computes on CUDA, without taking memory of a device.

    Raises: ValueError where CUDA is asked for and there is none.
    """
    if choice == "cpu" or torch.cuda.is_available():
        return choice != "cpu"
    if choice == "cuda":
        raise ValueError(
            "device: cuda, but torch sees no CUDA device here; use device: auto or cpu"
        )
    return False


def visible_gpus() -> list[str]:
    """Return this machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return [name.strip() for name in names][:count] if names[0] else [str(i) for i in range(count)]
