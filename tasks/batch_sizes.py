"""How many images of a forward pass are fast and fit, found once per labeler."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU_OUTPUT_BYTES = 64 * 2**20
"""Of the largest activation of a CPU's batch. A batch costs as many calls as it is, small or large,
so small networks want many images; more than these leave the caches."""
_CPU_BOUNDS = (8, 128)
_CPU_SHARE = 0.5  # of the memory for each core; the rest is for shards, decoded images and others
_LIVE_OUTPUTS = 4
"""Activations of about the largest one's size that exist at a time: what goes in, what comes out,
a branch beside it, and what a convolution needs to compute it."""
_GPU_BOUNDS = (16, 1024)
_GPU_STEP = 8
_GPU_SHAPES = 8
"""Sizes that batches on a GPU have: of each the libraries choose kernels anew, and compile some,
two seconds in EfficientNet-B0."""
_GPU_SHARE = 0.8  # of the free memory; the rest is for fragments and others


def find_batch_size(device: torch.device, predict: Callable[[int], object]) -> int:
    """Return the batch size that is taken where nobody asked for one.

    On a CPU it follows from the network's largest activation of one image, and is halved until its
    activations fit into a core's share of the free memory. On a GPU one small batch is predicted,
    and larger ones where that leaves a doubt, and the largest power of two is taken that fits.

    Args:
        device: where to compute.
        predict: computes a batch of so many images.
    """
    if device.type != "cuda":
        largest_output = largest_output_bytes(predict)
        fast = fast_on_a_cpu(largest_output)
        free_bytes = available_bytes()
        if free_bytes is None:
            return fast
        # One process a core computes at a time.
        share = _CPU_SHARE * free_bytes / (os.cpu_count() or 1)
        return halved_to_fit(fast, _LIVE_OUTPUTS * largest_output, share)

    def peak_bytes(batch_size: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        predict(batch_size)
        return torch.cuda.max_memory_allocated(device) - before

    free_bytes, _ = torch.cuda.mem_get_info(device)
    return largest_fitting(peak_bytes, free_bytes)


def fast_on_a_cpu(largest_output: int) -> int:
    """Return the power of two whose largest activation is nearest to what a CPU is fast on.

    Args:
        largest_output: bytes of the largest activation of one image.
    """
    smallest, largest = _CPU_BOUNDS
    nearest = 2 ** round(math.log2(_CPU_OUTPUT_BYTES / largest_output))
    return min(max(nearest, smallest), largest)


def largest_fitting(peak_bytes: Callable[[int], int], free_bytes: int) -> int:
    """Return the largest power of two that, by what smaller batches took, stays within the memory.

    Few sizes are tried, since a GPU's libraries take seconds to choose the kernels of each; one
    that would take but half of what it may is not.

    Args:
        peak_bytes: what a batch takes while it is computed.
        free_bytes: what there is before.
    """
    batch_size, largest = _GPU_BOUNDS
    while True:
        images = int(_GPU_SHARE * free_bytes * batch_size / max(1, peak_bytes(batch_size)))
        fitting = min(max(1 << images.bit_length() >> 1, _GPU_BOUNDS[0]), largest)
        if fitting <= batch_size or fitting <= images // 2:
            return fitting
        batch_size = min(fitting, _GPU_STEP * batch_size)


def filled_size(num_images: int, batch_size: int) -> int:
    """Return the size to which a batch on a GPU is filled up: one of eight, or of fewer.

    Args:
        num_images: in the batch; shards end with any number of them.
        batch_size: of a whole one.
    """
    step = max(batch_size // _GPU_SHAPES, _GPU_BOUNDS[0])
    return min(-(-num_images // step) * step, batch_size)


def halved_to_fit(batch_size: int, bytes_per_image: int, free_bytes: float) -> int:
    """Halve a batch until it fits into the memory; a single image is tried in any case."""
    while batch_size > 1 and batch_size * bytes_per_image > free_bytes:
        batch_size //= 2
    return batch_size


def largest_output_bytes(predict: Callable[[int], object]) -> int:
    """Return what the largest activation of one image takes, by predicting one; at least 1."""
    with _LargestOutput() as seen:
        predict(1)
    return max(seen.num_bytes, 1)


def available_bytes() -> int | None:
    """Return the memory that can be had without swapping; None where the system does not tell.

    A container's limit counts as if nothing of it were taken.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    if limit != "max":
        found.append(int(limit))
    return min(found) if found else None


class _LargestOutput(TorchDispatchMode):
    """Watches every operation of torch for the largest tensor that one gives."""

    num_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here. To have its compiler leave this class alone torch (2.15) would
        # load it, which takes two seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.nbytes for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.num_bytes = max(self.num_bytes, *sizes, 0)
        return found
