"""Weights that a training starts from: brought into the store once, loaded by name.

Either another model of the store, or weights from elsewhere, which `store_initial_weights` puts
into the store under their sha256, so that a run keeps them whatever their URL holds tomorrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from models.architectures import (
    ArchitectureConfig,
    Classifier,
    adapted_weights,
    architecture_name,
    build_architecture,
    torchvision_name,
)
from models.description import tensors_to_bytes, weights_from_bytes
from storage.addresses import sha256_hex
from storage.manifest import read_stored
from storage.objects import read_object
from storage.store import Store
from tasks.classifiers import model_manifest, read_description
from tasks.state_dicts import state_dict_from_bytes, with_classifier_names

_TORCHVISION = "torchvision:"
_ANY_NUM_CLASSES = 2


class WeightsMismatch(ValueError):
    """Weights that belong to another architecture."""


class WeightsUnavailable(ValueError):
    """Weights that are not to be had: an unknown name, or no network."""


@dataclass(frozen=True)
class Initialisation:
    """What was loaded; facts for provenance.

    Attributes:
        source: path in the store.
        num_loaded: tensors of the backbone.
        head: classes of the head that were loaded; the others start from their fresh weights.
    """

    source: str
    num_loaded: int
    head: int


def initial_weights_path(sha256: str) -> str:
    """Return where the weights of this checksum lie in a store."""
    return f"initial_weights/{sha256}.safetensors"


def store_initial_weights(store: Store, source: str, architecture: ArchitectureConfig) -> str:
    """Put weights from elsewhere into the store and return the sha256 that names them there.

    Args:
        store: where to.
        source: a file or URL, safetensors or a state dict saved by torch (read with
            `weights_only`), whose names may bear the prefix "backbone." or "module."; or
            torchvision:NAME, such as torchvision:IMAGENET1K_V2 or
            torchvision:ResNet50_Weights.DEFAULT, which needs a network or torch's download cache.
        architecture: what the weights are for; all but the head must fit it.
    Raises: WeightsMismatch, naming the tensors; WeightsUnavailable; UnreadableModel;
        FileNotFoundError.
    """
    if source.startswith(_TORCHVISION):
        found = _from_torchvision(source.removeprefix(_TORCHVISION), architecture)
    else:
        found = state_dict_from_bytes(read_object(source), source)
    tensors = with_classifier_names(found)
    with torch.device("meta"):
        network = build_architecture(architecture, _ANY_NUM_CLASSES)
    _check_backbone(network, tensors, where=source, architecture=architecture_name(architecture))
    data = tensors_to_bytes(tensors)
    sha256 = sha256_hex(data)
    store.put(initial_weights_path(sha256), data)
    return sha256


def initialise_from_weights(store: Store, sha256: str, model: Classifier) -> Initialisation:
    """Load stored initial weights into a fresh classifier, in place.

    The head is loaded where it has as many classes as the model, in the same order; otherwise it
    stays as it is.

    Raises: WeightsMismatch; FileNotFoundError.
    """
    path = initial_weights_path(sha256)
    where = store.url_of(path)
    tensors = weights_from_bytes(store.read(path, sha256=sha256), where=where)
    ours, theirs = _head_tensors(model.backbone), _saved_head(model.backbone, tensors)
    fits = theirs is not None and len(theirs["weight"]) == len(ours["weight"])
    rows = [i if fits else None for i in range(len(ours["weight"]))]
    return _load(model, tensors, rows, source=path, where=where)


def initialise_from_model(
    store: Store, fingerprint: str, model: Classifier, class_names: Sequence[str]
) -> Initialisation:
    """Load a finished model of the store into a fresh classifier, in place.

    Classes are matched by name; one that the stored model does not know keeps its fresh weights.

    Args:
        store: where both lie.
        fingerprint: of the stage that made the stored model.
        model: of the same architecture; a vision transformer may have another image size.
        class_names: of the model's outputs.
    Raises: WeightsMismatch; UnknownModel.
    """
    stored = model_manifest(store, fingerprint).object("model")
    where = store.url_of(stored.path)
    tensors = weights_from_bytes(read_stored(store, stored), where=where)
    theirs = {n: i for i, n in enumerate(read_description(store, fingerprint).class_names)}
    rows = [theirs.get(name) for name in class_names]
    return _load(model, tensors, rows, source=stored.path, where=where)


def _load(
    model: Classifier,
    tensors: Mapping[str, Tensor],
    rows: Sequence[int | None],
    *,
    source: str,
    where: str,
) -> Initialisation:
    """Copy the backbone, and row `rows[i]` of the head to class i where it is not None."""
    network = model.backbone
    fitting = _check_backbone(network, tensors, where=where, architecture=type(network).__name__)
    ours = network.state_dict()
    with torch.no_grad():
        for name, tensor in fitting.items():
            ours[name].copy_(tensor)
        saved = _saved_head(network, tensors)
        matched = {} if saved is None else {i: row for i, row in enumerate(rows) if row is not None}
        for name, target in _head_tensors(network).items():
            for mine, theirs in matched.items():
                assert saved is not None
                target[mine].copy_(saved[name][theirs])
    return Initialisation(source, len(fitting), len(matched))


def _check_backbone(
    network: nn.Module, tensors: Mapping[str, Tensor], *, where: str, architecture: str
) -> dict[str, Tensor]:
    """Return the tensors of all but the head under the network's names, or raise."""
    head_name = _head(network)[0]
    wanted = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith(f"{head_name}.")
    }
    given = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(f"backbone.{head_name}.")
    }
    given = adapted_weights(network, given)
    # Files older than BatchNorm's counter lack it; it affects nothing here.
    missing = [n for n in wanted if n not in given and not n.endswith(".num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} {tuple(given[name].shape)}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing or unexpected or shapes:
        raise WeightsMismatch(
            f"{where} does not fit {architecture}: missing {_some(missing)}; unexpected"
            f" {_some(unexpected)}; of another shape {_some(shapes)}. Initial weights must be of"
            " the same architecture; only the last linear layer may differ"
        )
    return given


def _head(network: nn.Module) -> tuple[str, nn.Linear]:
    """Return the last linear layer: in all our networks the one that gives the logits."""
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    return linear[-1]


def _head_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the head's weight (C, D) and, where it has one, bias (C,)."""
    return _head(network)[1].state_dict()


def _saved_head(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the head among a network's weights, None if it is missing or of another form."""
    prefix = f"backbone.{_head(network)[0]}."
    saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    ours = _head_tensors(network)
    same_form = saved.keys() == ours.keys() and all(
        saved[name].shape[1:] == tensor.shape[1:] for name, tensor in ours.items()
    )
    return saved if same_form else None


def _from_torchvision(name: str, architecture: ArchitectureConfig) -> Mapping[str, Tensor]:
    """Return torchvision's weights of this name for an architecture, downloaded where needed."""
    model_name = torchvision_name(architecture)
    if model_name is None:
        raise WeightsUnavailable(
            f"torchvision:{name}: torchvision has no weights for"
            f" {architecture_name(architecture)}; name a file or URL, or init: scratch"
        )
    known = torchvision.models.get_model_weights(model_name)
    short = name.removeprefix(f"{known.__name__}.")
    if short not in known.__members__:
        names = ", ".join(f"torchvision:{known.__name__}.{n}" for n in known.__members__)
        raise WeightsUnavailable(
            f"torchvision:{name}: unknown weights for {model_name}; known: {names}"
        )
    weights = known[short]
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash a RuntimeError
        raise WeightsUnavailable(
            f"torchvision:{name}: cannot download {weights.url}: {error}. Where there is no network"
            " fetch the file elsewhere and name its path"
        ) from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown}, ... ({len(names)} in all)"
