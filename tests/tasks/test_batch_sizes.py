"""Batch sizes that nobody asked for: fast on a CPU, as large as fits on a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks import batch_sizes
from tasks.batch_sizes import (
    available_bytes,
    fast_on_a_cpu,
    filled_size,
    find_batch_size,
    halved_to_fit,
    largest_fitting,
    largest_output_bytes,
)


@pytest.mark.parametrize(
    ("largest_output", "expected"),
    [
        (4 * 64 * 112 * 112, 16),  # ResNets of 224 pixels: 16 take 49 MiB, 32 take 98
        (4 * 72 * 56 * 56, 64),  # MobileNetV3-small: 55 MiB
        (4 * 96 * 112 * 112, 16),  # EfficientNet-B0: 74 MiB, which is nearer than 37
        (1, 128),
        (2**30, 8),
    ],
)
def test_a_cpus_largest_activation_is_about_as_large_for_any_network(largest_output, expected):
    assert fast_on_a_cpu(largest_output) == expected


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
def test_a_gpus_batch_is_the_largest_power_of_two_that_fits(free_bytes, expected):
    tried = []

    def peak_bytes(batch_size):
        tried.append(batch_size)
        return 10 * batch_size

    assert largest_fitting(peak_bytes, free_bytes) == expected
    assert all(10 * batch_size <= max(free_bytes, 160) for batch_size in tried)
    assert len(tried) <= 3, "of each size the kernels are chosen anew"


def test_a_gpus_largest_batch_is_not_tried_where_it_would_take_half_of_what_it_may():
    tried = []

    def peak_bytes(batch_size):
        tried.append(batch_size)
        return 10 * batch_size

    assert largest_fitting(peak_bytes, 25_600) == 1024  # 0.8 of them are 2,048 images'
    assert tried == [16]
    assert largest_fitting(peak_bytes, 25_500) == 1024
    assert tried[1:] == [16, 128, 1024]


@pytest.mark.parametrize(
    ("batch_size", "num_images", "expected"),
    [
        (1024, 1024, 1024),
        (1024, 1, 128),
        (1024, 400, 512),
        (100, 100, 100),
        (100, 97, 100),
        (100, 17, 32),
        (8, 3, 8),
    ],
)
def test_batches_are_filled_up_to_few_sizes(batch_size, num_images, expected):
    assert filled_size(num_images, batch_size) == expected


@given(st.integers(1, 4096))
def test_a_filled_batch_has_one_of_eight_sizes_and_room_for_all(batch_size):
    sizes = [filled_size(count, batch_size) for count in range(1, batch_size + 1)]
    assert len(set(sizes)) <= 8 + (batch_size % 8 != 0)
    assert all(count <= size <= batch_size for count, size in enumerate(sizes, start=1))


def test_a_gpus_batch_that_takes_more_than_its_share_is_not_kept():
    # 16 take 160 and let 1,024 hope; but 128 take 10,000 of the 8,000 that may be taken.
    taken = {16: 160, 128: 10_000}
    assert largest_fitting(taken.__getitem__, 10_000) == 64


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    # 100 bytes an image, 16 of them: 1,600.
    [(1600, 16), (1599, 8), (400, 4), (100, 1), (1, 1)],
)
def test_a_cpus_batch_is_halved_until_it_fits(free_bytes, expected):
    assert halved_to_fit(16, 100, free_bytes) == expected


def test_a_cpu_with_little_memory_takes_a_smaller_batch(monkeypatch):
    # Of one image of 8 x 8 the convolution gives 6 x 8 x 8 floats, 1,536 bytes, and four such are
    # taken to exist at a time: 6,144. The fast batch of 128 takes 786,432; two cores share what is
    # there, and half of it is for activations.
    network = torch.nn.Conv2d(3, 6, 3, padding=1)
    asked = []

    def predict(batch_size):
        asked.append(batch_size)
        with torch.inference_mode():
            return network(torch.zeros(batch_size, 3, 8, 8)).mean()

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for free_bytes, expected in ((4 * 786_432, 128), (4 * 786_432 - 1, 64), (0, 1), (None, 128)):
        monkeypatch.setattr(batch_sizes, "available_bytes", lambda found=free_bytes: found)
        assert find_batch_size(torch.device("cpu"), predict) == expected
    assert asked == [1] * 4, "one image tells"
    assert largest_output_bytes(predict) == 1_536


def test_what_a_system_has_is_told_where_it_says_so():
    found = available_bytes()
    assert found is None or 2**20 < found < 2**50
