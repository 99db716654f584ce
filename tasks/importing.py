"""Bring a model from elsewhere into a store, so that it can be a run's first teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from models.architectures import ArchitectureConfig, Normalization
from models.description import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    ModelDescription,
    UnreadableModel,
    description_from_json,
    main_head,
    model_from_weights,
    weights_from_bytes,
    weights_to_bytes,
)
from storage.addresses import model_folder, settings_of, sha256_hex
from storage.manifest import Manifest, commit_manifest
from storage.objects import join_url, read_object
from storage.store import Store
from tasks.classifiers import UnknownModel, model_manifest, put_model
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
    return store.url_of(model_folder(_put(store, description, tensors, where=weights_url)))


def import_exported(store: Store, folder: str) -> str:
    """Store a model that `selftrain export` wrote, and return its fingerprint.

    Where the store holds the very model that was exported, under its own fingerprint, that one is
    named, so that what it has labelled is found.

    Args:
        store: where to.
        folder: folder or URL with model.json and model.safetensors.
    Raises: FileNotFoundError; UnreadableModel if the two files do not belong together.
    """
    described = join_url(folder, DESCRIPTION_FILE)
    description = description_from_json(read_object(described), where=described)
    weights_url = join_url(folder, WEIGHTS_FILE)
    data = read_object(weights_url)
    found, expected = sha256_hex(data), description.lineage.get("weights_sha256")
    if expected not in (None, found):
        raise UnreadableModel(
            f"{weights_url}: sha256 {found}, but {described} was written for {expected}: copy both"
            " files again"
        )
    origin = description.lineage.get("fingerprint")
    if isinstance(origin, str) and _holds(store, origin, found):
        return origin
    return _put(store, description, weights_from_bytes(data, where=weights_url), where=weights_url)


def _holds(store: Store, fingerprint: str, weights_sha256: str) -> bool:
    try:
        return model_manifest(store, fingerprint).object("model").sha256 == weights_sha256
    except UnknownModel:
        return False


def _put(
    store: Store, description: ModelDescription, tensors: Mapping[str, Tensor], *, where: str
) -> str:
    """Check that weights fit a description, commit both, and return the fingerprint."""
    loaded = model_from_weights(description, tensors, where=where)
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
    return specification.fingerprint


def _triple(text: str) -> tuple[float, float, float]:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 3:
        raise ValueError(f"{text!r}: three numbers are needed, one for each of R, G and B")
    return parts[0], parts[1], parts[2]
