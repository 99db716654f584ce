"""What this machine can compute with and where it has room."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage import objects
from tasks.devices import emulates_bf16, visible_gpus, wants_cuda


@dataclass(frozen=True)
class Machine:
    """The devices of this machine.

    Attributes:
        gpus: CUDA devices that torch sees.
        cores: of the CPU that this process may use.
        has_bf16: whether bf16 is computed by instructions of the device, not emulated.
    """

    gpus: int
    cores: int
    has_bf16: bool

    @property
    def device(self) -> str:
        """What `device: auto` means here."""
        return "cuda" if self.gpus else "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the documented form."""
        return {**asdict(self), "device": self.device}


def this_machine() -> Machine:
    """Return the devices of this machine."""
    gpus = len(visible_gpus()) if wants_cuda("auto") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(gpus=gpus, cores=cores or 1, has_bf16=not emulates_bf16("auto"))


def free_bytes(url: str) -> int | None:
    """Return the room on the disk under a folder that may not be there yet; None if remote."""
    path = objects.local_path(url)
    if path is None:
        return None
    return shutil.disk_usage(nearest_folder(path)).free


def nearest_folder(path: Path) -> Path:
    """Return the nearest folder above a path that is there, itself among them."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
