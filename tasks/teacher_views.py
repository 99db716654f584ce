"""What teachers are shown of an image: all that this takes of them, without their networks."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.architectures import Interpolation
from models.description import ModelDescription
from models.randomness import derive_seed
from models.training_config import TrainingConfig
from models.views import KRandomViewConfig, View, ViewConfig, views_of
from tasks.images import clean_view, random_resized_view


@dataclass(frozen=True)
class Shown:
    """The clean view that a model is shown."""

    image_size: int
    crop_padding: int
    interpolation: Interpolation

    @classmethod
    def of(cls, config: ModelDescription | TrainingConfig) -> "Shown":
        """Take the view out of a training's config or a model's description."""
        return cls(config.image_size, config.crop_padding, config.interpolation)

    def to_json(self) -> dict[str, Any]:
        """Return the settings that enter fingerprints."""
        return asdict(self)


@dataclass(frozen=True)
class TeacherViews:
    """Cuts the views of T teachers, V of each, out of images.

    Attributes:
        config: which views.
        shown: T teachers', in their order.
    """

    config: ViewConfig
    shown: tuple[Shown, ...]

    def of_image(
        self, image: NDArray[np.uint8], *, shard: str, key: str
    ) -> list[NDArray[np.uint8]]:
        """Return the T * V views of one image (H, W, 3), teacher by teacher, each (S, S, 3).

        Random ones are those of the shard's content and of the key in it, whatever its name is.
        """
        stream = 0
        if isinstance(self.config, KRandomViewConfig):
            stream = derive_seed(self.config.seed, "views", shard)
        found: list[NDArray[np.uint8]] = []
        made: dict[Any, NDArray[np.uint8]] = {}
        for shown in self.shown:
            for view in views_of(
                self.config,
                width=image.shape[1],
                height=image.shape[0],
                size=shown.image_size,
                crop_padding=shown.crop_padding,
                stream=stream,
                key=key,
            ):
                # Views that differ by their mirroring alone are resized once.
                name = (replace(view, is_mirrored=False), shown.interpolation)
                if name not in made:
                    made[name] = _cut(image, view, shown.interpolation)
                found.append(made[name][:, ::-1] if view.is_mirrored else made[name])
        return found


def _cut(image: NDArray[np.uint8], view: View, interpolation: Interpolation) -> NDArray[np.uint8]:
    if view.box is None:
        return clean_view(image, view.size, view.crop_padding, interpolation)
    return random_resized_view(image, view.size, view.box, interpolation)
