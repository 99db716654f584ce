"""Freeze the shallow layers of a network: for fine-tuning what stands behind them."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torchvision.models.convnext import CNBlock, ConvNeXt  # pyright: ignore[reportMissingTypeStubs]
from torchvision.models.efficientnet import (  # pyright: ignore[reportMissingTypeStubs]
    EfficientNet,
    FusedMBConv,
    MBConv,
)
from torchvision.models.mobilenetv3 import (  # pyright: ignore[reportMissingTypeStubs]
    InvertedResidual,
    MobileNetV3,
)
from torchvision.models.resnet import (  # pyright: ignore[reportMissingTypeStubs]
    BasicBlock,
    Bottleneck,
    ResNet,
)
from torchvision.models.vision_transformer import (  # pyright: ignore[reportMissingTypeStubs]
    VisionTransformer,
)

from models.architectures.airbench import Airbench, AirbenchGroup
from models.architectures.classifier import Classifier
from models.architectures.small_cnn import SmallCnn, SmallCnnBlock
from models.architectures.vision_transformer import VitBlock
from models.architectures.wide_resnet import WideResNet, WideResNetBlock


class FrozenBatchNorm(nn.Module):
    """BatchNorm that always uses its running statistics and never moves them.

    It keeps its weights' names and stays as it is under `train()`; it is no BatchNorm to
    `SyncBatchNorm.convert_sync_batchnorm`, which would thaw it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, norm: _BatchNorm) -> None:
        """Take over the parameters and statistics of a BatchNorm, not copies of them."""
        super().__init__()
        self.eps = norm.eps
        # In BatchNorm's order, so that state dicts keep theirs.
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, normalised."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def freeze_shallow(model: nn.Module, fraction: float) -> tuple[str, ...]:
    """Freeze a network's stem and the first share of its blocks, in place, for good.

    Their parameters need no gradients any more, and their BatchNorms use the running statistics,
    which stand still whatever `train()` is called with. What follows the last block (the head, a
    final convolution or norm) is never frozen. Call it before the optimiser is built and before
    the model is wrapped for several devices.

    Args:
        model: a classifier or its network, of any architecture of this package.
        fraction: of the blocks, in [0, 1], rounded down; 0 freezes nothing, not even the stem.
    Returns: the names of the frozen parameters, in the order of the model's.
    Raises: ValueError for a fraction outside its range or a network of unknown family.
    Source: Touvron et al. 2019, section 3.2 (FixRes); noisystudent main.py (fix_layer_num).
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"the frozen fraction must lie in [0, 1], got {fraction}")
    if fraction == 0.0:
        return ()
    pieces, blocks = _shallow_to_deep(model.backbone if isinstance(model, Classifier) else model)
    positions = [i for i, piece in enumerate(pieces) if isinstance(piece, blocks)]
    # The tolerance is for fractions such as 7/10, whose product with 10 may be 6.999...
    num_frozen = int(fraction * len(positions) + 1e-9)
    end = positions[num_frozen - 1] + 1 if num_frozen > 0 else positions[0]
    frozen_parameters: set[nn.Parameter] = set()
    frozen_modules: set[nn.Module] = set()
    for piece in pieces[:end]:
        if isinstance(piece, nn.Parameter):
            frozen_parameters.add(piece)
        else:
            frozen_parameters.update(piece.parameters())
            frozen_modules.update(piece.modules())
    for parameter in frozen_parameters:
        parameter.requires_grad_(False)
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
    for name, module in modules:
        if module in frozen_modules and isinstance(module, _BatchNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FrozenBatchNorm(module))
    return tuple(name for name, p in model.named_parameters() if p in frozen_parameters)


def _shallow_to_deep(
    network: nn.Module,
) -> tuple[list[nn.Module | nn.Parameter], tuple[type[nn.Module], ...]]:
    """Return the parts of a network in the order of the data, and which types are its blocks."""
    match network:
        case SmallCnn():
            return list(network.features), (SmallCnnBlock,)
        case WideResNet():
            return [network.conv, *network.blocks], (WideResNetBlock,)
        case ResNet():
            layers = [network.layer1, network.layer2, network.layer3, network.layer4]
            return [network.conv1, network.bn1, *_flat(layers)], (BasicBlock, Bottleneck)
        case EfficientNet():
            return _flat(network.features), (MBConv, FusedMBConv)
        case ConvNeXt():
            return _flat(network.features), (CNBlock,)
        case MobileNetV3():
            return _flat(network.features), (InvertedResidual,)
        case VisionTransformer():
            encoder = network.encoder
            stem = [network.conv_proj, network.class_token, encoder.pos_embedding]
            return [*stem, *encoder.layers], (VitBlock,)
        case Airbench():
            return [network.whiten, *network.groups], (AirbenchGroup,)
        case _:
            raise ValueError(
                f"{type(network).__name__} is no network of models.architectures: its blocks are "
                "not known, so none of them can be frozen"
            )


def _flat(parts: Iterable[nn.Module]) -> list[nn.Module | nn.Parameter]:
    """Replace the plain sequences of blocks by what they hold, and nothing else."""
    flat: list[nn.Module | nn.Parameter] = []
    for part in parts:
        flat.extend(part if type(part) is nn.Sequential else [part])
    return flat
