"""How large a network's weights are, before there are any."""

import torch

from models.architectures import ArchitectureConfig, architecture_at, build_architecture


def weight_bytes(architecture: ArchitectureConfig, *, num_classes: int, image_size: int) -> int:
    """Return the bytes of a network's weights and buffers; nothing is allocated.

    Args:
        architecture: the network.
        num_classes: its outputs.
        image_size: pixels a side, on which the weights of some networks depend.
    """
    with torch.device("meta"):
        network = build_architecture(architecture_at(architecture, image_size), num_classes)
    return sum(one.numel() * one.element_size() for one in network.state_dict().values())
