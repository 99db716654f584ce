"""A look at images: which are looked at, and what their heads say."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from models.architectures import SmallCnnConfig
from storage.corpus import load_locations, read_samples
from tasks.image_sizes import files_of, look_at, spread
from tasks.rates import measure_rates


def _file(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind)
    return buffer.getvalue()


def test_shorter_sides_are_counted_and_unreadable_files_are_not_hidden() -> None:
    files = [_file(10, 30), _file(40, 20, "BMP"), _file(50, 60), b"no image"]

    sizes = look_at(files)

    # Shorter sides 10, 20, 50.
    assert (sizes.looked_at, sizes.unreadable) == (4, 1)
    assert (sizes.smallest, sizes.median, sizes.largest) == (10, 20, 50)
    assert sizes.mean_bytes == sum(map(len, files)) // 4
    with pytest.raises(ValueError, match="no image"):
        look_at([])


def test_items_are_taken_at_even_distances_with_both_ends() -> None:
    assert spread(range(101), 5) == [0, 25, 50, 75, 100]
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread([1, 2, 3], 1) == [1]


def test_files_come_of_the_first_the_middle_and_the_last_shard(lab: Any) -> None:
    # Five shards of ten; two of each of three.
    files = list(files_of(lab.unlabeled, load_locations(lab.store, lab.unlabeled.digest), size=6))
    assert look_at(files).smallest == 8
    expected = {
        bytes(sample.image)
        for stem in ("unlabeled-0", "unlabeled-2", "unlabeled-4")
        for sample in read_samples(
            lab.unlabeled, load_locations(lab.store, lab.unlabeled.digest), stem
        )[::9]
    }
    assert {bytes(file) for file in files} == expected
    assert len(files) == 6


def test_rates_are_measured_without_a_trace_in_the_generator(lab: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    rates = measure_rates(
        SmallCnnConfig(width=2, depth=1),
        image_size=8,
        num_classes=2,
        precision="fp32",
        device="cpu",
        seconds=0,
    )

    assert rates.training > 0
    assert rates.labeling > 0
    assert torch.equal(torch.rand(1), expected)
