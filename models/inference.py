"""Clean predictions of a classifier, from a copy of it that is made ready for that."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from models.architectures import Classifier
from models.fusing import fold_batch_norms, fold_input_scale, traced

Precision = Literal["fp32", "bf16"]


class InferenceNetwork(nn.Module):
    """A copy of a classifier for inference alone: 8-bit images in, float32 logits out.

    BatchNorm is folded into convolutions, the normalisation's scale into the first one; memory is
    laid out channels last. Where the network cannot be traced it is only copied.

    Args:
        model: images (B, 3, H, W) in [0, 1] -> logits (B, C); it is not changed.
        precision: bf16: weights and activations are bfloat16, but for the normalisation and for
            BatchNorm that is not folded.
    """

    network: nn.Module
    offset: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, precision: Precision = "fp32") -> None:
        super().__init__()
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        is_classifier = isinstance(model, Classifier)
        network: nn.Module = copy.deepcopy(model.backbone if is_classifier else model).eval()
        offset, scale = torch.zeros(3), torch.full((3,), 1 / 255)
        if isinstance(model, Classifier):
            # (x / 255 - mean) / std = (x - 255 mean) * 1 / (255 std)
            offset = 255 * model.mean.flatten().double().cpu()
            scale = 1 / (255 * model.std.flatten().double().cpu())
        self.register_buffer("offset", offset.float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.is_scaled_inside = False
        graph = traced(network)
        if graph is not None:
            fold_batch_norms(graph)
            self.is_scaled_inside = fold_input_scale(graph, scale)
            network = graph
        self.network = _as_precise(network, self.dtype).to(memory_format=torch.channels_last)  # pyright: ignore
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.to(device).requires_grad_(False).train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) float32.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1]; fast where it is channels last.
        """
        width = images.shape[3]
        # In rows of pixels, for whole rows are what the arithmetic is fast on.
        rows = images.permute(0, 2, 3, 1).flatten(2).float()  # (B, H, 3 W)
        if images.is_floating_point():
            rows = rows * 255
        rows = rows.sub_(self.offset.repeat(width))
        if not self.is_scaled_inside:
            rows = rows.mul_(self.scale.repeat(width))
        pixels = rows.to(self.dtype).reshape(*rows.shape[:2], width, 3)
        normalized = pixels.permute(0, 3, 1, 2)
        return self.network(normalized).float()


def _as_precise(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert all but BatchNorm, whose averages would lose more than activations do."""
    if dtype != torch.float32:
        for module in network.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
    return network


def log_probabilities(
    network: InferenceNetwork, images: Tensor, *, num_images: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of images.

    Args:
        network: made ready once for many batches.
        images: (B, 3, H, W), uint8 or float in [0, 1], on the network's device.
        num_images: how many of them are meant, where others fill up the batch behind them.
    Returns: (B, C) float32 log-probabilities, and (B,) float32 logsumexp of the logits; their sum
        is the logits.
    Raises: ValueError if a logit is not finite.
    """
    with torch.inference_mode():
        logits: Tensor = network(images)[:num_images]  # (B, C)
        log_sums = torch.logsumexp(logits, dim=1)  # (B, C) -> (B,)
        log_probs = torch.log_softmax(logits, dim=1)
        is_finite = torch.isfinite(log_sums)
        if not bool(is_finite.all()):
            raise ValueError(
                f"logits of {int((~is_finite).sum())} of {len(logits)} images are not finite "
                f"(first: row {int((~is_finite).int().argmax())}): "
                "the model is broken, or precision is too low for it"
            )
    return log_probs, log_sums
