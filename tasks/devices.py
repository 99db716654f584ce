"""Which device a stage computes on."""

from typing import Literal

import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]


def resolve_device(choice: DeviceChoice) -> torch.device:
    """Return the device: `auto` takes CUDA where there is one.

    Raises: ValueError where CUDA is asked for and there is none.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "device: cuda, but torch sees no CUDA device here; use device: auto or cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())
