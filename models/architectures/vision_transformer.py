"""Vision transformers with dropout and stochastic depth, under torchvision's weight names."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.models.vision_transformer import (  # pyright: ignore[reportMissingTypeStubs]
    EncoderBlock,
    VisionTransformer,
)

from models.noise.stochastic_depth import StochasticDepth

_POSITIONS = "encoder.pos_embedding"

# (patch, layers, heads, width, width within the blocks).
# Source: Dosovitskiy et al. 2021, table 1; torchvision vision_transformer.py.
_PUBLISHED: dict[str, tuple[int, int, int, int, int]] = {
    "b_16": (16, 12, 12, 768, 3072),
    "b_32": (32, 12, 12, 768, 3072),
    "l_16": (16, 24, 16, 1024, 4096),
    "l_32": (32, 24, 16, 1024, 4096),
    "h_14": (14, 32, 16, 1280, 5120),
}


class VitConfig(BaseModel):
    """A vision transformer for images of one size; weights exchange with torchvision's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vit"] = "vit"
    name: Literal["b_16", "b_32", "l_16", "l_32", "h_14"] = Field(
        default="b_16", description="Size of the network _ side of its patches in pixels."
    )
    image_size: int = Field(
        default=224,
        ge=8,
        le=2048,
        description="Side of the input in pixels, a multiple of the patch's; it must be the "
        "training's image_size. Initial weights of another size have their position embedding "
        "interpolated.",
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse an image that patches do not tile."""
        patch = _PUBLISHED[self.name][0]
        if self.image_size % patch:
            raise ValueError(
                f"vit.image_size={self.image_size} must be a multiple of the patch of "
                f"{self.name}, {patch} pixels: take {self.image_size // patch * patch or patch}"
            )


class VitBlock(nn.Module):
    """torchvision's encoder block, whose two residual branches can be dropped.

    One rate for both, drawn for each, so that blocks count as elsewhere.
    """

    def __init__(self, block: EncoderBlock) -> None:
        """Take over the block's layers, not copies of them."""
        super().__init__()
        self.ln_1 = block.ln_1
        self.self_attention = block.self_attention
        self.ln_2 = block.ln_2
        self.mlp = block.mlp
        self.stochastic_depth = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, D) of tokens (B, N, D)."""
        normed = self.ln_1(x)
        attended, _ = self.self_attention(normed, normed, normed, need_weights=False)
        x = x + self.stochastic_depth(attended)
        return x + self.stochastic_depth(self.mlp(self.ln_2(x)))


def build_vit(config: VitConfig, num_classes: int, *, dropout: float) -> VisionTransformer:
    """Return the network with fresh weights; dropout acts on the class token before the head."""
    patch, num_layers, num_heads, width, mlp_width = _PUBLISHED[config.name]
    network = VisionTransformer(
        config.image_size,
        patch,
        num_layers,
        num_heads,
        width,
        mlp_width,
        num_classes=num_classes,
    )
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for name, block in network.encoder.layers.named_children():
        blocks[name] = VitBlock(cast(EncoderBlock, block))
    network.encoder.layers = nn.Sequential(blocks)
    heads: OrderedDict[str, nn.Module] = OrderedDict(dropout=nn.Dropout(dropout))
    heads.update(network.heads.named_children())
    network.heads = nn.Sequential(heads)
    return network


def interpolated_position_embedding(embedding: Tensor, num_patches: int) -> Tensor:
    """Return the embedding for another number of patches; the class token's stays.

    Args:
        embedding: (1, 1 + P, D), the class token first, P a square number.
        num_patches: Q, a square number.
    Returns: (1, 1 + Q, D), bicubic over the grid, corners aligned.
    Raises: ValueError for a number of patches that is no square.
    Source: torchvision vision_transformer.py, interpolate_embeddings.
    """
    old, new = math.isqrt(embedding.shape[1] - 1), math.isqrt(num_patches)
    if old * old != embedding.shape[1] - 1 or new * new != num_patches:
        raise ValueError(
            f"position embeddings of {embedding.shape[1] - 1} and {num_patches} patches: both "
            "must be square grids"
        )
    if old == new:
        return embedding
    token, patches = embedding[:, :1], embedding[:, 1:]
    grid = patches.transpose(1, 2).reshape(1, -1, old, old)  # (1, P, D) -> (1, D, old, old)
    resized = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([token, resized.flatten(2).transpose(1, 2)], dim=1)


def adapted_to(network: VisionTransformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's weights with the position embedding of this one's image size."""
    adapted = dict(weights)
    embedding = weights.get(_POSITIONS)
    if embedding is not None and embedding.ndim == 3:
        num_patches = network.encoder.pos_embedding.shape[1] - 1
        adapted[_POSITIONS] = interpolated_position_embedding(embedding, num_patches)
    return adapted
