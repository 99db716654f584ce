"""Network architectures, one family a file, chosen by `kind`."""

from typing import Annotated, assert_never

from pydantic import Field
from torch import nn

from models.architectures.classifier import Classifier, Interpolation, Normalization
from models.architectures.efficientnet import EfficientNetConfig, build_efficientnet
from models.architectures.resnet import ResNetConfig, build_resnet
from models.architectures.small_cnn import SmallCnnConfig, build_small_cnn
from models.architectures.wide_resnet import WideResNetConfig, build_wide_resnet
from models.noise.stochastic_depth import StochasticDepth, StochasticDepthConfig, set_drop_rates

ArchitectureConfig = Annotated[
    SmallCnnConfig | WideResNetConfig | ResNetConfig | EfficientNetConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "ArchitectureConfig",
    "Classifier",
    "EfficientNetConfig",
    "Interpolation",
    "Normalization",
    "ResNetConfig",
    "SmallCnnConfig",
    "WideResNetConfig",
    "architecture_name",
    "build_architecture",
    "build_classifier",
]


def build_architecture(
    config: ArchitectureConfig,
    num_classes: int,
    *,
    dropout: float | None = None,
    stochastic_depth: StochasticDepthConfig | None = None,
) -> nn.Module:
    """Return a network with fresh weights that maps (B, 3, H, W) to logits (B, num_classes).

    Weights come from torch's global generator: seed it before. They and their names do not depend
    on the noise.

    Args:
        config: the architecture.
        num_classes: at least 2.
        dropout: rate in [0, 1) before the last linear layer; None is 0 for every architecture.
        stochastic_depth: None switches it off; the blocks are numbered through the whole network.
    Raises: ValueError for a number outside its range.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    rate = 0.0 if dropout is None else dropout
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    match config:
        case SmallCnnConfig():
            network: nn.Module = build_small_cnn(config, num_classes, dropout=rate)
        case WideResNetConfig():
            network = build_wide_resnet(config, num_classes, dropout=rate)
        case ResNetConfig():
            network = build_resnet(config, num_classes, dropout=rate)
        case EfficientNetConfig():
            network = build_efficientnet(config, num_classes, dropout=rate)
        case _ as unreachable:
            assert_never(unreachable)
    branches = [m for m in network.modules() if isinstance(m, StochasticDepth)]
    set_drop_rates(branches, stochastic_depth)
    return network


def build_classifier(
    config: ArchitectureConfig,
    num_classes: int,
    normalization: Normalization,
    *,
    dropout: float | None = None,
    stochastic_depth: StochasticDepthConfig | None = None,
) -> Classifier:
    """Return `build_architecture` behind its normalisation."""
    network = build_architecture(
        config, num_classes, dropout=dropout, stochastic_depth=stochastic_depth
    )
    return Classifier(network, normalization)


def architecture_name(config: ArchitectureConfig) -> str:
    """Return a short name for tables, such as `wide_resnet-28-2`."""
    match config:
        case SmallCnnConfig():
            return f"small_cnn-{config.width}x{config.depth}"
        case WideResNetConfig():
            return f"wide_resnet-{config.depth}-{config.width}"
        case ResNetConfig():
            return config.name
        case EfficientNetConfig():
            return f"efficientnet-{config.name}"
        case _ as unreachable:
            assert_never(unreachable)
