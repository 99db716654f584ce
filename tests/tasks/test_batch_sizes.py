"""Batch sizes that nobody asked for: fast on a CPU, as large as fits on a GPU."""

import pytest
import torch

from tasks.batch_sizes import find_batch_size, largest_fitting


@pytest.mark.parametrize(
    ("image_size", "expected"),
    # 16 * 224 * 224 pixels = 802,816: of 112 x 112 four times as many images, of 32 x 32 784.
    [(224, 16), (112, 64), (32, 128), (8, 128), (300, 8), (1024, 8)],
)
def test_a_cpus_batch_holds_a_number_of_pixels(image_size, expected):
    assert find_batch_size(image_size, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [
        # 10 bytes an image: 16 take 160, and 32 would take 320 <= 0.8 * 400.
        (399, 16),
        (400, 32),
        (10_000, 512),  # 1,024 would take 10,240
        (10**9, 1024),
        (1, 16),
    ],
)
def test_a_gpus_batch_is_doubled_as_long_as_the_next_one_fits(free_bytes, expected):
    tried = []

    def peak_bytes(batch_size):
        tried.append(batch_size)
        return 10 * batch_size

    assert largest_fitting(peak_bytes, free_bytes) == expected
    assert all(10 * batch_size <= max(free_bytes, 160) for batch_size in tried)
