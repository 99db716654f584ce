"""Checks of this machine: versions, devices, room on disks, limits."""

import importlib.metadata
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from prefect.settings import PREFECT_HOME

from flows.checks import Check
from flows.config import SelfTrainingConfig
from flows.engine_config import LocalEngine
from flows.first_choices import bytes_in_words
from flows.input_checks import trainings_of
from flows.machine import nearest_folder, this_machine
from storage import objects
from tasks.devices import emulates_bf16, gpu_names

_MIN_FREE = 2**30
_MIN_OPEN_FILES = 1024


def check_versions(config: SelfTrainingConfig | None) -> Iterator[Check]:
    """Compare what is installed with what selftrain asks for, and with what the engine needs."""
    yield _check_requirements("versions", extra="", remedy="pip install --upgrade selftrain")
    if config is not None and not isinstance(config.engine, LocalEngine):
        extra = config.engine.kind
        remedy = f"pip install 'selftrain[{extra}]', or engine: {{kind: local}}"
        yield _check_requirements(f"engine {extra}", extra=extra, remedy=remedy)


def _check_requirements(name: str, *, extra: str, remedy: str) -> Check:
    wrong: list[str] = []
    checked = 0
    for text in importlib.metadata.requires("selftrain") or []:
        wanted = Requirement(text)
        is_ours = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        if not is_ours or (extra and (wanted.marker is None or "extra" not in str(wanted.marker))):
            continue
        checked += 1
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        return Check(name, "fail", "; ".join(wrong), remedy)
    if checked == 0:
        return Check(name, "warn", "what it needs is not known: an older installation", remedy)
    own = importlib.metadata.version("selftrain")
    return Check(
        name, "ok", f"selftrain {own}, Python {platform.python_version()}, {checked} packages"
    )


def check_devices(config: SelfTrainingConfig | None) -> Iterator[Check]:
    """Look at the devices that torch sees, and whether the config can use them."""
    machine = this_machine()
    if machine.gpus:
        found = f"{machine.gpus} CUDA devices: {', '.join(gpu_names())}"
    else:
        version = importlib.metadata.version("torch")
        found = f"CPU with {machine.cores} cores; torch {version} sees no CUDA device"
    if config is not None and config.device == "cuda" and not machine.gpus:
        yield Check("devices", "fail", found, "Set device: auto, or run where torch sees a GPU")
        return
    yield Check("devices", "ok", found)
    precisions = set[str]()
    if config is not None:
        trained = (training.precision for _, training in trainings_of(config))
        precisions = {config.labeling.precision, *trained}
    # Asked only where it matters: on a CPU without CUDA device: cuda raises.
    if "bf16" in precisions and emulates_bf16("auto" if config is None else config.device):
        yield Check(
            "precision",
            "warn",
            "bf16 would be emulated by this CPU, many times more slowly than fp32",
            "Set precision: fp32, or run on another machine",
        )
    if "fp16" in precisions and not machine.gpus:
        yield Check("precision", "fail", "fp16 is for CUDA only", "Set precision: fp32 or bf16")


def check_disks(config: SelfTrainingConfig | None, store: str | None) -> Iterator[Check]:
    """Look at the room where a run writes."""
    folders = {"temporary files": Path(tempfile.gettempdir()), "PREFECT_HOME": PREFECT_HOME.value()}
    local = None if store is None else objects.local_path(store)
    if local is not None:
        folders["store's disk"] = local
    for name, folder in folders.items():
        free = shutil.disk_usage(nearest_folder(folder)).free
        found = f"{bytes_in_words(free)} free at {folder}"
        if free < _MIN_FREE:
            yield Check(name, "warn", found, f"Free {bytes_in_words(_MIN_FREE)} or more there")
        else:
            yield Check(name, "ok", found)
    cache = None if config is None else config.cache
    if cache is not None:
        folder = Path(cache.dir)
        held = sum(file.stat().st_size for file in folder.glob("*.tar"))
        free = shutil.disk_usage(nearest_folder(folder)).free
        found = f"{bytes_in_words(free)} free and {bytes_in_words(held)} cached at {folder}"
        if free + held < cache.max_bytes:
            remedy = f"Lower cache.max_bytes={cache.max_bytes}, or choose a larger disk"
            yield Check("cache", "fail", found, remedy)
        else:
            yield Check("cache", "ok", found)


def check_limits() -> Iterator[Check]:
    """Look at the limit of open files, which servers, workers and shards share."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} at a time (at most {hard})"
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        yield Check("open files", "warn", found, "ulimit -n 4096 in the shell that starts runs")
    else:
        yield Check("open files", "ok", found)
    if sys.platform != "linux":
        yield Check(
            "system",
            "warn",
            f"{sys.platform}: children of a killed run live on",
            "End them by hand before resuming, or use Linux",
        )
