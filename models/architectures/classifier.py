"""What the pipeline calls a classifier: normalisation and a network, images in, logits out."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Interpolation = Literal["bilinear", "bicubic"]
"""Filter of the resize to the input size."""


class Normalization(BaseModel):
    """Per-channel (x - mean) / std of RGB in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="RGB means in [0, 1]; default: ImageNet's."
    )
    std: tuple[float, float, float] = Field(
        default=(0.229, 0.224, 0.225), description="RGB standard deviations, each > 0."
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse a std that is not positive."""
        if min(self.std) <= 0:
            raise ValueError(f"normalization.std must be > 0 in every channel, got {self.std}")


class Classifier(nn.Module):
    """A network behind its normalisation; float RGB (B, 3, H, W) in [0, 1] -> logits (B, C).

    The normalisation is no part of the state dict: it belongs to the model's description. An
    auxiliary head is part of it, until training is over.
    """

    mean: Tensor
    std: Tensor
    auxiliary_head: nn.Module | None

    def __init__(self, backbone: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalization = normalization
        self.auxiliary_head = None
        for name, values in (("mean", normalization.mean), ("std", normalization.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return _last_linear(self.backbone).out_features

    def forward(self, images: Tensor, *, with_auxiliary_head: bool = False) -> Tensor:
        """Return the logits (B, C), or (2, B, C) with those of the auxiliary head second.

        Both come from one call, so that DistributedDataParallel sees every parameter used.
        """
        normalized = (images - self.mean) / self.std
        if not with_auxiliary_head:
            return self.backbone(normalized)
        if self.auxiliary_head is None:
            raise ValueError("the classifier has no auxiliary head: call add_auxiliary_head first")
        features: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features.append(inputs[0])

        handle = _last_linear(self.backbone).register_forward_pre_hook(keep)
        try:
            logits: Tensor = self.backbone(normalized)
        finally:
            handle.remove()
        return torch.stack((logits, self.auxiliary_head(features[0])))  # (B, D) -> (B, C)

    def add_auxiliary_head(self, hidden: int | None = None) -> None:
        """Add a head of two layers on what the last linear layer reads, with fresh weights.

        Weights come from torch's global generator: seed it before.

        Args:
            hidden: width of its hidden layer; None is that of the features.
        """
        main = _last_linear(self.backbone)
        width = main.in_features if hidden is None else hidden
        self.auxiliary_head = nn.Sequential(
            nn.Linear(main.in_features, width), nn.ReLU(), nn.Linear(width, main.out_features)
        )

    def reorder_outputs(self, order: Sequence[int]) -> None:
        """Let output i be what was output `order[i]`, a permutation of all outputs."""
        last = _last_linear(self.backbone)
        if sorted(order) != list(range(last.out_features)):
            raise ValueError(f"order must be a permutation of {last.out_features} outputs")
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.copy_(parameter[list(order)])

    def without_auxiliary_head(self) -> "Classifier":
        """Return the classifier that is used after training; it shares weights with this one."""
        if self.auxiliary_head is None:
            return self
        plain = Classifier(self.backbone, self.normalization)
        plain.mean, plain.std, plain.training = self.mean, self.std, self.training
        return plain


def _last_linear(network: nn.Module) -> nn.Linear:
    """Return the layer that gives the logits; every architecture here ends in a linear one."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
