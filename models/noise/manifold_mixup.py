"""Manifold mixup: mixup of the hidden states of one layer, drawn anew for each batch."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.noise.mixup import mix_rows

INPUT = "input"
"""Name of layer 0: the images themselves."""


class ManifoldMixupConfig(BaseModel):
    """At one of several layers each sample's state is blended with that of another sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["manifold_mixup"] = "manifold_mixup"
    alpha: float = Field(
        default=2.0, gt=0, le=100, description="Of the Beta distribution that lambda comes from."
    )
    layers: tuple[str, ...] = Field(
        min_length=1,
        description="Of which one is drawn for each batch: `input`, or names of the network's "
        "modules whose output is mixed (wide_resnet: blocks.3, blocks.7).",
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse a layer that is named twice: it would be drawn twice as often by accident."""
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"mixing.layers names a layer twice: {', '.join(self.layers)}")


def named_layers(model: nn.Module, layers: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the modules of those layers that are not the input.

    Raises: ValueError for a name that the network does not have, listing those it has.
    """
    named = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    modules = {name: module for name, module in named if name}  # "" is the network itself
    unknown = [layer for layer in layers if layer != INPUT and layer not in modules]
    if unknown:
        raise ValueError(
            f"noise.mixing.layers: the network has no module {', '.join(unknown)}; it has "
            f"{INPUT}, {', '.join(modules)}"
        )
    return {layer: modules[layer] for layer in layers if layer != INPUT}


@contextmanager
def mixed_states(module: nn.Module, name: str, partners: Tensor, lam: Tensor) -> Generator[None]:
    """Mix what `module` returns, (B, ...), within the block; the block must call it just once.

    Raises: ValueError if the module is not called exactly once, with one row for each partner.
    """
    num_rows: list[int] = []

    def mix(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        num_rows.append(len(output))
        if not isinstance(output, Tensor) or len(output) != len(partners):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"noise.mixing.layers: {name} returns {found}, but manifold mixup needs a tensor "
                f"with a row for each of the {len(partners)} samples: name another module, or an "
                "objective that makes one forward pass of the joint batch"
            )
        return mix_rows(output, partners, lam)

    handle = module.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()
    if len(num_rows) != 1:
        raise ValueError(
            f"noise.mixing.layers: {name} ran {len(num_rows)} times in one forward pass, but "
            "manifold mixup needs exactly one: name another module"
        )
