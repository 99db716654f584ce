"""Bring a model from elsewhere into a store, so that it can be a run's first teacher."""

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from models.architectures import ArchitectureConfig, Normalization
from models.description import (
    ModelDescription,
    main_head,
    model_from_weights,
    weights_to_bytes,
)
from storage.addresses import settings_of, sha256_hex
from storage.manifest import Manifest, commit_manifest
from storage.objects import read_object
from storage.store import Store
from tasks.classifiers import put_model
from tasks.specifications import Specification
from tasks.state_dicts import state_dict_from_bytes, with_classifier_names

VERSION = 1


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
    tensors = with_classifier_names(state_dict_from_bytes(data, weights_url))
    loaded = model_from_weights(description, tensors, where=weights_url)
    weights = weights_to_bytes(loaded.classifier)
    described_settings = description.model_dump(mode="json", by_alias=True, exclude={"lineage"})
    # An option that the architecture learned later leaves the fingerprints of older models alone.
    described_settings["architecture"] = settings_of(description.architecture)
    settings: dict[str, Any] = {
        "description": described_settings,
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


def _triple(text: str) -> tuple[float, float, float]:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 3:
        raise ValueError(f"{text!r}: three numbers are needed, one for each of R, G and B")
    return parts[0], parts[1], parts[2]
