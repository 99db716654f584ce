"""Models in the store: how they are written, and how a stage loads one in the run's label space."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from models.description import (
    LoadedModel,
    ModelDescription,
    description_from_json,
    model_from_weights,
    weights_from_bytes,
)
from models.inference import InferenceNetwork, Precision
from storage.addresses import model_folder
from storage.manifest import Manifest, StoredObject, put_object, read_manifest, read_stored
from storage.store import Store


class ClassesMismatch(ValueError):
    """A model and a corpus that do not speak of the same classes."""


class UnknownModel(ValueError):
    """A model that is not in the store, or is not finished."""


@dataclass(frozen=True)
class StoredClassifier:
    """A finished model, on a device, with its outputs in the run's class order.

    Attributes:
        fingerprint: of the stage that made it.
        network: images (B, 3, S, S) in [0, 1] -> logits (B, C).
        description: as stored; its own class order may differ.
        class_names: the run's.
        device: where the network is.
    """

    fingerprint: str
    network: nn.Module
    description: ModelDescription
    class_names: tuple[str, ...]
    device: torch.device
    _ready: dict[Precision, InferenceNetwork] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def ready(self, precision: Precision) -> InferenceNetwork:
        """Return the network made ready for inference, once for each precision."""
        if precision not in self._ready:
            self._ready[precision] = InferenceNetwork(self.network, precision)
        return self._ready[precision]


def put_model(
    store: Store, fingerprint: str, weights: bytes, description: ModelDescription, *, kind: str
) -> tuple[StoredObject, StoredObject]:
    """Write a model's two data objects, safetensors and description, and return them."""
    folder = model_folder(fingerprint)
    return (
        put_object(store, folder, "model", weights, "safetensors", crash_kind=kind),
        put_object(store, folder, "description", description.to_json(), "json"),
    )


def model_manifest(store: Store, fingerprint: str) -> Manifest:
    """Return the manifest of a finished model; raises UnknownModel."""
    manifest = read_manifest(store, model_folder(fingerprint), expect_fingerprint=fingerprint)
    if manifest is None:
        raise UnknownModel(
            f"no finished model {model_folder(fingerprint)} in {store.url}; `selftrain list` shows"
            " the runs and their models, `selftrain import` adds a model of your own"
        )
    return manifest


def read_description(store: Store, fingerprint: str) -> ModelDescription:
    """Return the description of a finished model."""
    stored = model_manifest(store, fingerprint).object("description")
    return description_from_json(read_stored(store, stored), where=store.url_of(stored.path))


def load_classifier(
    store: Store,
    fingerprint: str,
    *,
    device: torch.device,
    class_names: Sequence[str] | None = None,
) -> StoredClassifier:
    """Load a finished model and put its outputs into the order of `class_names`.

    Raises: UnknownModel; ClassesMismatch if the two sets of names differ.
    """
    stored = model_manifest(store, fingerprint).object("model")
    description = read_description(store, fingerprint)
    weights = weights_from_bytes(read_stored(store, stored), where=store.url_of(stored.path))
    loaded: LoadedModel = model_from_weights(
        description, weights, device=device, where=store.url_of(stored.path)
    )
    network = loaded.classifier
    names = description.class_names if class_names is None else tuple(class_names)
    if names != description.class_names:
        order = class_order(description.class_names, names, model=model_folder(fingerprint))
        network.reorder_outputs(order)
    return StoredClassifier(fingerprint, network.eval(), description, names, device)


def class_order(theirs: Sequence[str], wanted: Sequence[str], *, model: str) -> list[int]:
    """Return the positions of the wanted classes among a model's outputs, matched by name.

    Raises: ClassesMismatch, naming the classes that only one side has.
    """
    missing = sorted(set(wanted) - set(theirs))
    extra = sorted(set(theirs) - set(wanted))
    if missing or extra:
        raise ClassesMismatch(
            f"{model} knows {len(theirs)} classes, the corpus has {len(wanted)}; only in the"
            f" corpus: {_some(missing)}; only in the model: {_some(extra)}. Classes are matched by"
            " name, in any order: rename them (classes.json beside the shards, or --classes of"
            " `selftrain import`) or take another model"
        )
    positions = {name: position for position, name in enumerate(theirs)}
    return [positions[name] for name in wanted]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown}, ... ({len(names)} in all)"
