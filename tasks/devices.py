"""Which device a stage computes on."""

import os
from pathlib import Path
from typing import Literal

import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]
DeviceType = Literal["cpu", "cuda"]


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


def emulates_bf16(choice: DeviceChoice, *, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether bf16 is computed by a CPU without instructions for it.

    Such a CPU computes in bf16 many times more slowly than in fp32. Where the CPU's flags cannot be
    read it is taken to have them.
    """
    if wants_cuda(choice) or not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text().lower().splitlines()
    flags = {
        flag for line in lines if line.startswith(("flags", "features")) for flag in line.split()
    }
    return bool(flags) and flags.isdisjoint({"avx512f", "avx512_bf16", "amx_bf16", "bf16"})


def visible_gpus() -> list[str]:
    """Return this machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return [name.strip() for name in names][:count] if names[0] else [str(i) for i in range(count)]


def threads_of_labeler(choice: DeviceChoice, workers: int) -> int:
    """Return how many CPU threads a process is given that labels beside so many others.

    On the CPU one, since there is a process for each core. Beside a GPU its share of the cores:
    they decode what the GPU is to be fed with.
    """
    return max(1, len(os.sched_getaffinity(0)) // workers) if choice == "cuda" else 1


def gpus_of_machine(driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Return how many GPUs this machine has, also those that others are to use; at least one."""
    return max(1, len(list(driver.iterdir()) if driver.is_dir() else []))


def gpu_names() -> list[str]:
    """Return the models of this machine's GPUs, in torch's order."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
