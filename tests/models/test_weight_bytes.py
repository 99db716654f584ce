"""The size of weights that do not exist yet."""

from typing import Any

import pytest

from models.architectures import (
    SmallCnnConfig,
    VitConfig,
    architecture_at,
    build_architecture,
)
from models.weight_bytes import weight_bytes


@pytest.mark.parametrize(
    ("architecture", "image_size"),
    [(SmallCnnConfig(width=4, depth=1), 8), (VitConfig(name="b_32"), 64)],
)
def test_weights_have_the_bytes_that_were_told(architecture: Any, image_size: int) -> None:
    network = build_architecture(architecture_at(architecture, image_size), 3)
    expected = sum(one.nbytes for one in network.state_dict().values())
    assert weight_bytes(architecture, num_classes=3, image_size=image_size) == expected
