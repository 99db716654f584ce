"""How many images of a forward pass are fast and fit, found once per labeler."""

from collections.abc import Callable

import torch

_CPU_PIXELS = 16 * 224 * 224
"""Of a CPU's batch: more gain nothing, and activations of larger batches leave the caches."""
_CPU_BOUNDS = (8, 128)
_GPU_BOUNDS = (16, 1024)
_GPU_SHARE = 0.8  # of the free memory; the rest is for fragments and others


def find_batch_size(
    image_size: int, device: torch.device, predict: Callable[[int], object] | None = None
) -> int:
    """Return the batch size that is taken where nobody asked for one.

    On a CPU it follows from the image's size. On a GPU batches of growing size are predicted, and
    the largest power of two is taken whose double may not fit any more.

    Args:
        image_size: side of the largest view.
        device: where to compute.
        predict: computes a batch of so many images; None: a GPU is taken to hold few.
    """
    if device.type != "cuda":
        smallest, largest = _CPU_BOUNDS
        return min(max(_CPU_PIXELS // image_size**2, smallest), largest)
    if predict is None:
        return _GPU_BOUNDS[0]

    def peak_bytes(batch_size: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        predict(batch_size)
        return torch.cuda.max_memory_allocated(device) - before

    free_bytes, _ = torch.cuda.mem_get_info(device)
    return largest_fitting(peak_bytes, free_bytes)


def largest_fitting(peak_bytes: Callable[[int], int], free_bytes: int) -> int:
    """Double the batch as long as the next one, by what this one took, stays within the memory.

    Args:
        peak_bytes: what a batch takes while it is computed.
        free_bytes: what there is before.
    """
    batch_size, largest = _GPU_BOUNDS
    while batch_size < largest and 2 * peak_bytes(batch_size) <= _GPU_SHARE * free_bytes:
        batch_size *= 2
    return batch_size
