"""What differs between two honest computations of one result: kept beside it, never in it."""

import platform
import socket
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from storage.manifest import write_provenance
from storage.store import Store

_PACKAGES = ("selftrain", "torch", "torchvision", "numpy", "pyarrow", "pillow", "simplejpeg")


def versions() -> dict[str, str]:
    """Return the versions of all that computes results."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def record(
    store: Store, folder: str, *, seconds: float, device: torch.device | None, **facts: Any
) -> None:
    """Write `provenance.json` beside a manifest: when, where, how long, with which versions."""
    device_name = None if device is None else str(device)
    if device is not None and device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    write_provenance(
        store,
        folder,
        {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "host": socket.gethostname(),
            "device": device_name,
            "versions": versions(),
            **facts,
        },
    )
