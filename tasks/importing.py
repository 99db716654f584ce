"""Bring a model from elsewhere into a store, so that it can be a run's first teacher."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from models.architectures import ArchitectureConfig, Normalization
from models.description import (
    ModelDescription,
    UnreadableModel,
    main_head,
    model_from_weights,
    weights_from_bytes,
    weights_to_bytes,
)
from storage.addresses import sha256_hex
from storage.manifest import Manifest, commit_manifest
from storage.objects import read_object
from storage.store import Store
from tasks.classifiers import put_model
from tasks.specifications import Specification

VERSION = 1

# A deflated checkpoint of a few hundred kB can expand to hundreds of MB.
_MAX_EXPANSION = 4


def import_model(
    store: Store,
    weights_url: str,
    *,
    architecture: str,
    class_names: Sequence[str],
    image_size: int,
    crop_padding: int = 0,
    interpolation: str = "bilinear",
    mean: str = "0.485,0.456,0.406",
    std: str = "0.229,0.224,0.225",
) -> str:
    """Check that weights fit an architecture, store them, and return the model's URL.

    Args:
        store: where to.
        weights_url: safetensors, or a state dict saved by torch, which is read with
            `weights_only` so that it cannot run code. Names may bear the prefix "backbone." or
            "module.".
        architecture: an ArchitectureConfig in YAML.
        class_names: name of each output, in order; empty lines are left out.
        image_size: side of the input in pixels.
        crop_padding: of the clean view.
        interpolation: of the clean view.
        mean: three numbers, comma-separated.
        std: three numbers, comma-separated.
    Raises: UnreadableModel if the weights are not what the architecture needs; ValueError.
    """
    names = tuple(name.strip() for name in class_names if name.strip())
    try:
        description = ModelDescription(
            architecture=TypeAdapter(ArchitectureConfig).validate_python(
                yaml.safe_load(architecture)
            ),
            heads=main_head(names),
            image_size=image_size,
            crop_padding=crop_padding,
            interpolation=interpolation,  # pyright: ignore[reportArgumentType] (validated here)
            normalization=Normalization(mean=_triple(mean), std=_triple(std)),
        )
    except ValidationError as error:
        raise ValueError(f"the model's description is not valid: {error}") from None
    data = read_object(weights_url)
    tensors = _with_prefix(_state_dict(data, weights_url))
    loaded = model_from_weights(description, tensors, where=weights_url)
    weights = weights_to_bytes(loaded.classifier)
    settings: dict[str, Any] = {
        "description": description.model_dump(mode="json", by_alias=True, exclude={"lineage"}),
        "weights_sha256": sha256_hex(weights),
    }
    specification = Specification("import", VERSION, settings, {})
    lineage = {"fingerprint": specification.fingerprint, "role": "imported"}
    described = description.model_copy(update={"lineage": lineage})
    manifest = Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=settings,
        inputs={},
        objects=put_model(store, specification.fingerprint, weights, described, kind="import"),
        counts={"parameters": sum(p.numel() for p in loaded.classifier.parameters())},
    )
    commit_manifest(store, specification.folder, manifest)
    return store.url_of(specification.folder)


def _state_dict(data: bytes, where: str) -> Mapping[str, Tensor]:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return weights_from_bytes(data, where=where)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        expanded = sum(member.file_size for member in archive.infolist())
    if expanded > _MAX_EXPANSION * len(data):
        raise UnreadableModel(
            f"{where}: {len(data)} bytes that expand to {expanded}: torch does not compress"
            " checkpoints, so this is refused"
        )
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnreadableModel(
            f"{where}: not a plain state dict (read with weights_only, so that it cannot run"
            f" code): {error}. Save it with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UnreadableModel(f"{where}: holds a {type(found).__name__}, not a state dict")
    return found


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors as our classifiers do: backbone.<name in the network>."""
    plain = {
        name.removeprefix("module.").removeprefix("backbone."): t for name, t in tensors.items()
    }
    return {f"backbone.{name}": tensor for name, tensor in plain.items()}


def _triple(text: str) -> tuple[float, float, float]:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 3:
        raise ValueError(f"{text!r}: three numbers are needed, one for each of R, G and B")
    return parts[0], parts[1], parts[2]
