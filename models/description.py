"""A model on disk: safetensors weights and a JSON description, nothing that runs code.

from models.description import load_model
model = load_model("out")
labels = model.predict(images)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from models.architectures import (
    ArchitectureConfig,
    Classifier,
    Interpolation,
    Normalization,
    build_classifier,
    check_architecture,
)

DESCRIPTION_SCHEMA = 1
DESCRIPTION_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
_MAIN_HEAD = "main"


class UnreadableModel(Exception):
    """Weights or a description that cannot be used; says which file, what was found, what to do."""


class Head(BaseModel):
    """One output of the network and the label space it speaks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Name of the output.")
    class_names: tuple[str, ...] = Field(
        min_length=2, description="Class i is called class_names[i]; any order, no duplicates."
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse two classes of one name."""
        duplicates = sorted({n for n in self.class_names if self.class_names.count(n) > 1})
        if duplicates:
            raise ValueError(f"head {self.name!r} has duplicate class names: {duplicates[:5]}")


class ModelDescription(BaseModel):
    """Everything but the weights that is needed to use a model."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_alias=True, validate_by_name=True
    )

    schema_version: Literal[1] = Field(
        default=DESCRIPTION_SCHEMA, alias="schema", description="Version of this description."
    )
    architecture: ArchitectureConfig
    heads: tuple[Head, ...] = Field(
        min_length=1, max_length=1, description="One head, named main, in this version."
    )
    image_size: int = Field(ge=8, description="Side of the input, pixels.")
    crop_padding: int = Field(
        default=0, ge=0, description="Clean view: share size / (size + crop_padding) of the side."
    )
    interpolation: Interpolation = Field(default="bilinear", description="Of the clean view.")
    normalization: Normalization = Normalization()
    lineage: dict[str, JsonValue] = Field(
        default_factory=dict, description="Where the weights come from; free facts."
    )

    def model_post_init(self, context: object, /) -> None:
        """Refuse an image size that the architecture cannot take."""
        check_architecture(self.architecture, image_size=self.image_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names of the main head."""
        return self.heads[0].class_names

    def to_json(self) -> bytes:
        """Return the description as JSON, keys sorted, one to a line."""
        fields = self.model_dump(mode="json", by_alias=True)
        return (json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def main_head(class_names: tuple[str, ...]) -> tuple[Head]:
    """Return the heads of a classifier with one label space."""
    return (Head(name=_MAIN_HEAD, class_names=class_names),)


def description_from_json(data: bytes, *, where: str) -> ModelDescription:
    """Return the validated description.

    Raises: UnreadableModel if it is no JSON, of a newer schema or invalid.
    """
    try:
        fields: Any = json.loads(data)
    except ValueError as error:
        raise UnreadableModel(f"{where}: not a JSON model description: {error}") from error
    schema: Any = fields.get("schema") if isinstance(fields, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if schema != DESCRIPTION_SCHEMA:
        raise UnreadableModel(
            f"{where}: model description of schema {schema!r}, this version of selftrain reads "
            f"schema {DESCRIPTION_SCHEMA}: use the version that wrote it"
        )
    try:
        return ModelDescription.model_validate(fields)
    except ValidationError as error:
        raise UnreadableModel(f"{where}: invalid model description: {error}") from error


def weights_to_bytes(model: torch.nn.Module) -> bytes:
    """Return the state dict as safetensors; equal weights give equal bytes on every device."""
    return tensors_to_bytes(model.state_dict())


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return named tensors as safetensors; equal tensors give equal bytes on every device."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={"format": "pt"})


def weights_from_bytes(data: bytes, *, where: str = "weights") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises: UnreadableModel if the bytes are not a whole safetensors file.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise UnreadableModel(
            f"{where}: not a whole safetensors file ({len(data)} bytes): {error}"
        ) from error


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in evaluation mode with its description."""

    classifier: Classifier
    description: ModelDescription

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of the outputs."""
        return self.description.class_names

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.classifier.mean.device

    def __call__(self, images: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """Return logits (B, C) float32 on the model's device.

        Args:
            images: (B, 3, S, S) tensor, uint8 or float in [0, 1], or (B, S, S, 3) uint8 array,
                where S is the description's image_size.
        Raises: ValueError for another shape or type.
        """
        with torch.inference_mode():
            return self.classifier(self._as_input(images)).to(torch.float32)

    def probabilities(self, images: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """Return probabilities (B, C) float32; see `__call__` for the images."""
        return self(images).softmax(dim=1)

    def predict(self, images: Tensor | npt.NDArray[np.uint8]) -> list[str]:
        """Return the name of each image's most probable class; see `__call__` for the images."""
        best = self(images).argmax(dim=1)
        return [self.class_names[int(index)] for index in best]

    def _as_input(self, images: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        size = self.description.image_size
        if isinstance(images, Tensor):
            tensor, expected = images, (3, size, size)
        else:
            tensor, expected = torch.as_tensor(np.ascontiguousarray(images)), (size, size, 3)
        if tensor.dim() != 4 or tuple(tensor.shape[1:]) != expected:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, expected))}), got {tuple(tensor.shape)}: "
                f"make the clean view of {size} pixels first (tasks.images.clean_view)"
            )
        if not isinstance(images, Tensor):
            tensor = tensor.permute(0, 3, 1, 2)
        if tensor.dtype == torch.uint8:
            return tensor.to(self.device).to(torch.float32) / 255
        if not tensor.is_floating_point():
            raise ValueError(f"images must be uint8 or float in [0, 1], got {tensor.dtype}")
        return tensor.to(self.device).to(torch.float32)


def model_from_weights(
    description: ModelDescription,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    where: str = "weights",
) -> LoadedModel:
    """Return a model with the given weights, in evaluation mode, without noise.

    Raises: UnreadableModel if the weights do not fit the described architecture.
    """
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        # Fresh weights are drawn, and the caller's generator is left as it was.
        classifier = build_classifier(
            description.architecture, len(description.class_names), description.normalization
        )
    try:
        classifier.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UnreadableModel(
            f"{where}: the weights do not fit {description.architecture!r} with "
            f"{len(description.class_names)} classes: {error}"
        ) from error
    return LoadedModel(classifier.to(device).eval(), description)


def save_model(
    folder: str | Path, model: torch.nn.Module | bytes, description: ModelDescription
) -> None:
    """Write `model.safetensors` and, last, `model.json` into a local folder made for them.

    Args:
        folder: created where missing.
        model: the classifier, or its weights as `weights_to_bytes` gives them.
        description: is written with the weights' sha256 as its lineage's `weights_sha256`.
    Raises: FileExistsError if the folder holds a model already.
    """
    folder = Path(folder)
    if (folder / DESCRIPTION_FILE).exists():
        raise FileExistsError(f"{folder} holds a model already: name another folder or remove it")
    data = model if isinstance(model, bytes) else weights_to_bytes(model)
    lineage = {**description.lineage, "weights_sha256": hashlib.sha256(data).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(data)
    described = description.model_copy(update={"lineage": lineage})
    (folder / DESCRIPTION_FILE).write_bytes(described.to_json())


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Return the model of a local folder, in evaluation mode.

    Raises: FileNotFoundError if the folder holds no model; UnreadableModel if it is damaged.
    """
    folder = Path(folder)
    where = folder / DESCRIPTION_FILE
    if not where.exists():
        raise FileNotFoundError(
            f"{folder} holds no {DESCRIPTION_FILE}: name a folder written by `selftrain export`"
        )
    description = description_from_json(where.read_bytes(), where=str(where))
    weights_path = folder / WEIGHTS_FILE
    data = weights_path.read_bytes()
    expected = description.lineage.get("weights_sha256")
    actual = hashlib.sha256(data).hexdigest()
    if expected is not None and expected != actual:
        raise UnreadableModel(
            f"{weights_path}: sha256 {actual}, but {where} was written for {expected}: copy both "
            "files again"
        )
    weights = weights_from_bytes(data, where=str(weights_path))
    return model_from_weights(description, weights, device=device, where=str(weights_path))
