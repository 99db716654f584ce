"""Network architectures, one family a file, chosen by `kind`."""

from collections.abc import Mapping
from typing import Annotated, assert_never

from pydantic import Field
from torch import Tensor, nn

from models.deferred_compiler import compiler_deferred

# Whatever builds networks or reads a config comes here first: a run, a stage, a worker. Trainings
# load the compiler all the same, with the first step of torch's optimizers.
with compiler_deferred():
    from torchvision.models import VisionTransformer  # pyright: ignore[reportMissingTypeStubs]

    from models.architectures import vision_transformer
    from models.architectures.airbench import AirbenchConfig, build_airbench
    from models.architectures.classifier import Classifier, Interpolation, Normalization
    from models.architectures.convnext import ConvNeXtConfig, build_convnext
    from models.architectures.efficientnet import EfficientNetConfig, build_efficientnet
    from models.architectures.efficientnet_v2 import EfficientNetV2Config, build_efficientnet_v2
    from models.architectures.freezing import freeze_shallow
    from models.architectures.mobilenet_v3 import MobileNetV3Config, build_mobilenet_v3
    from models.architectures.resnet import ResNetConfig, build_resnet
    from models.architectures.small_cnn import SmallCnnConfig, build_small_cnn
    from models.architectures.vision_transformer import VitConfig, build_vit
    from models.architectures.wide_resnet import WideResNetConfig, build_wide_resnet
    from models.noise.stochastic_depth import StochasticDepth, StochasticDepthConfig, set_drop_rates

ArchitectureConfig = Annotated[
    SmallCnnConfig
    | WideResNetConfig
    | ResNetConfig
    | EfficientNetConfig
    | EfficientNetV2Config
    | ConvNeXtConfig
    | VitConfig
    | MobileNetV3Config
    | AirbenchConfig,
    Field(discriminator="kind"),
]

# In pixels; the others take images of 8.
_SMALLEST_IMAGE = {"airbench": 9, "convnext": 32}

__all__ = [
    "AirbenchConfig",
    "ArchitectureConfig",
    "Classifier",
    "ConvNeXtConfig",
    "EfficientNetConfig",
    "EfficientNetV2Config",
    "Interpolation",
    "MobileNetV3Config",
    "Normalization",
    "ResNetConfig",
    "SmallCnnConfig",
    "VitConfig",
    "WideResNetConfig",
    "adapted_weights",
    "architecture_at",
    "architecture_name",
    "build_architecture",
    "build_classifier",
    "check_architecture",
    "freeze_shallow",
    "torchvision_name",
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
        case EfficientNetV2Config():
            network = build_efficientnet_v2(config, num_classes, dropout=rate)
        case ConvNeXtConfig():
            network = build_convnext(config, num_classes, dropout=rate)
        case VitConfig():
            network = build_vit(config, num_classes, dropout=rate)
        case MobileNetV3Config():
            network = build_mobilenet_v3(config, num_classes, dropout=rate)
        case AirbenchConfig():
            network = build_airbench(config, num_classes, dropout=rate)
        case _ as unreachable:
            assert_never(unreachable)
    branches = [m for m in network.modules() if isinstance(m, StochasticDepth)]
    if stochastic_depth is not None and not branches:
        raise ValueError(
            f"stochastic depth has no effect with {config.kind}, which has no residual branches: "
            "leave it out"
        )
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
            norm = "" if config.norm == "batch" else f"-{config.norm}"
            return f"wide_resnet-{config.depth}-{config.width}{norm}"
        case ResNetConfig():
            return config.name
        case EfficientNetConfig():
            return f"efficientnet-{config.name}"
        case EfficientNetV2Config() | ConvNeXtConfig() | MobileNetV3Config() | VitConfig():
            return f"{config.kind}-{config.name}"
        case AirbenchConfig():
            return "airbench-" + "-".join(str(width) for width in config.widths)
        case _ as unreachable:
            assert_never(unreachable)


def torchvision_name(config: ArchitectureConfig) -> str | None:
    """Return torchvision's name of the model with the same weights, None where it has none."""
    match config:
        case ResNetConfig():
            return config.name
        case EfficientNetConfig():
            return None if config.name == "l2" else f"efficientnet_{config.name}"
        case EfficientNetV2Config() | ConvNeXtConfig() | MobileNetV3Config() | VitConfig():
            return f"{config.kind}_{config.name}"
        case SmallCnnConfig() | WideResNetConfig() | AirbenchConfig():
            return None
        case _ as unreachable:
            assert_never(unreachable)


def check_architecture(
    config: ArchitectureConfig,
    *,
    image_size: int,
    stochastic_depth: StochasticDepthConfig | None = None,
) -> None:
    """Raise ValueError if a network cannot take images of this size, or cannot drop branches."""
    if isinstance(config, VitConfig) and config.image_size != image_size:
        raise ValueError(
            f"architecture.image_size={config.image_size} of vit must equal image_size="
            f"{image_size}: its position embedding is made for one size"
        )
    smallest = _SMALLEST_IMAGE.get(config.kind, 8)
    if image_size < smallest:
        raise ValueError(
            f"{config.kind} needs images of at least {smallest} pixels, image_size is {image_size}"
        )
    if isinstance(config, AirbenchConfig) and stochastic_depth is not None:
        raise ValueError(
            "noise.stochastic_depth has no effect with airbench, which has no residual branches: "
            "leave it out"
        )


def architecture_at(config: ArchitectureConfig, image_size: int) -> ArchitectureConfig:
    """Return the same architecture for images of another size; its weights are exchangeable.

    Raises: ValueError if it cannot take that size.
    """
    if isinstance(config, VitConfig):
        config = VitConfig(name=config.name, image_size=image_size)
    check_architecture(config, image_size=image_size)
    return config


def adapted_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights made for another image size in the shapes of this network's."""
    if isinstance(network, VisionTransformer):
        return vision_transformer.adapted_to(network, weights)
    return dict(weights)
