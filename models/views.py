"""The views of an image that a teacher labels: boxes to cut out, sizes to resize to, mirror images.

Geometry alone. The network's own clean view is the central square whose side is the share
size / (size + crop_padding) of the image's shorter side.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, assert_never, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.architectures import ArchitectureConfig, check_architecture
from models.draws import input_draws, key_hash_tensor
from models.noise.crop import RandomResizedConfig, draw_boxes
from models.randomness import Block

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image, right and bottom exclusive."""


class CleanViewConfig(BaseModel):
    """The central square alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["clean"] = "clean"


class HflipViewConfig(BaseModel):
    """The clean view and its mirror image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hflip"] = "hflip"


class MultiScaleViewConfig(BaseModel):
    """The clean view at several input sizes, for networks that take any size.

    Source: Chen et al. 2020 (Naive-Student), which labels video frames so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["multi_scale"] = "multi_scale"
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field(
        default=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        min_length=2,
        description="Input sizes as multiples of the network's own, rounded to pixels; the order"
        " means nothing.",
    )
    flip: bool = Field(default=True, description="Each size mirrored as well.")

    @field_validator("scales")
    @classmethod
    def _in_one_order(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) < len(scales):
            raise ValueError(f"scales must differ from each other, got {list(scales)}")
        return tuple(sorted(scales))


class FiveCropViewConfig(BaseModel):
    """The four corners and the centre. Source: Krizhevsky et al. 2012, without the mirror images.

    A square that reaches to both borders of the shorter side would be the clean view five times.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["five_crop"] = "five_crop"
    fraction: float = Field(
        default=0.875,
        gt=0,
        lt=1,
        description="Side of the squares as a share of the image's shorter side; 224 of 256.",
    )


class KRandomViewConfig(BaseModel):
    """Random resized crops, of which half are mirrored; MixMatch averages two."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["k_random"] = "k_random"
    k: int = Field(default=10, ge=1, le=256, description="Views of every image.")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Of the draws, which depend on the sample's key."
    )
    scale: tuple[float, float] = Field(
        default=(0.08, 1.0), description="Smallest and largest share of the area, in (0, 1]."
    )
    ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="Smallest and largest width / height, > 0."
    )
    flip: bool = Field(
        default=True, description="Mirror about half of the views; off where mirror images lie."
    )

    @model_validator(mode="after")
    def _is_a_crop(self) -> "KRandomViewConfig":
        self.crop()  # refuses empty intervals
        return self

    def crop(self) -> RandomResizedConfig:
        """Return the crop that the boxes are drawn from."""
        return RandomResizedConfig(scale=self.scale, ratio=self.ratio)


ViewConfig = Annotated[
    CleanViewConfig
    | HflipViewConfig
    | MultiScaleViewConfig
    | FiveCropViewConfig
    | KRandomViewConfig,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, slots=True)
class View:
    """One view of one image.

    Attributes:
        size: side of the square that is shown, pixels.
        box: what is cut out and resized to it; None for the clean view's square.
        crop_padding: of the clean view at this size; 0 with a box.
        is_mirrored: left to right, at last.
    """

    size: int
    box: Box | None = None
    crop_padding: int = 0
    is_mirrored: bool = False


def view_sizes(config: ViewConfig, size: int) -> tuple[int, ...]:
    """Return the side of each view in pixels; `size` is the network's own input size."""
    match config:
        case CleanViewConfig():
            return (size,)
        case HflipViewConfig():
            return (size,) * 2
        case MultiScaleViewConfig():
            copies = 2 if config.flip else 1
            return tuple(round(size * s) for s in config.scales for _ in range(copies))
        case FiveCropViewConfig():
            return (size,) * 5
        case KRandomViewConfig():
            return (size,) * config.k
        case _:
            assert_never(config)


def check_views(config: ViewConfig, architecture: ArchitectureConfig, size: int) -> None:
    """Raise ValueError if a network cannot take the size of every view."""
    for one in sorted(set(view_sizes(config, size))):
        try:
            check_architecture(architecture, image_size=one)
        except ValueError as error:
            raise ValueError(
                f"view={config.kind} shows images of {one} pixels to a network made for {size}: "
                f"{error}. Choose other scales, or another view"
            ) from error


def views_of(
    config: ViewConfig,
    *,
    width: int,
    height: int,
    size: int,
    crop_padding: int,
    stream: int,
    key: str,
) -> tuple[View, ...]:
    """Return the views of one image, always in the same order.

    Args:
        config: which views.
        width: of the image, pixels.
        height: of the image, pixels.
        size: the network's input size.
        crop_padding: of the clean view.
        stream: of the draws, from `derive_seed` of the view's seed; only `k_random` reads it.
        key: of the sample; only `k_random` reads it.
    Returns: as many as `view_sizes` gives, of these sizes.
    """
    match config:
        case CleanViewConfig():
            return (View(size, None, crop_padding),)
        case HflipViewConfig():
            return tuple(View(size, None, crop_padding, mirrored) for mirrored in (False, True))
        case MultiScaleViewConfig():
            # The same share of the image at every size, up to a pixel.
            return tuple(
                View(round(size * scale), None, round(crop_padding * scale), mirrored)
                for scale in config.scales
                for mirrored in ((False, True) if config.flip else (False,))
            )
        case FiveCropViewConfig():
            side = config.fraction * min(width, height)
            left, right = (0, side), (width - side, width)
            top, bottom = (0, side), (height - side, height)
            central = ((width - side) / 2, (width + side) / 2)
            middle = ((height - side) / 2, (height + side) / 2)
            squares = [
                (left, top),
                (right, top),
                (left, bottom),
                (right, bottom),
                (central, middle),
            ]
            return tuple(View(size, (x[0], y[0], x[1], y[1])) for x, y in squares)
        case KRandomViewConfig():
            return _random_views(config, width, height, size, stream, key)
        case _:
            assert_never(config)


def _random_views(
    config: KRandomViewConfig, width: int, height: int, size: int, stream: int, key: str
) -> tuple[View, ...]:
    k = config.k
    copies = torch.arange(k)
    draws = input_draws(
        stream, key_hash_tensor([key]).expand(k), copies, torch.zeros(k, dtype=torch.int64)
    )
    boxes = draw_boxes(config.crop(), draws, torch.full((k,), width), torch.full((k,), height))
    is_mirrored = (
        draws.words(Block.FLIP, 1)[:, 0] >= 1 << 31
        if config.flip
        else torch.zeros(k, dtype=torch.bool)
    )
    corners = cast("list[list[int]]", boxes.tolist())  # pyright: ignore[reportUnknownMemberType]
    mirrored = cast("list[bool]", is_mirrored.tolist())  # pyright: ignore[reportUnknownMemberType]
    return tuple(
        View(size, (x, y, right, bottom), is_mirrored=m)
        for (x, y, right, bottom), m in zip(corners, mirrored, strict=True)
    )
