"""Weights from elsewhere: files of tensors, read so that they cannot run code, and their names."""

import io
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor

from models.description import UnreadableModel, weights_from_bytes

# A deflated checkpoint of a few hundred kB can expand to hundreds of MB.
_MAX_EXPANSION = 4
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def state_dict_from_bytes(data: bytes, where: str) -> Mapping[str, Tensor]:
    """Return the tensors of a safetensors file or of a state dict saved by torch.

    Args:
        data: the whole file; torch's form is read with `weights_only`, and its entry "state_dict"
            is taken where it has one.
        where: for messages.
    Raises: UnreadableModel.
    """
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


def with_classifier_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors as our classifiers do: backbone.<name in the network>."""

    def plain(name: str) -> str:
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        return name

    return {f"backbone.{plain(name)}": tensor for name, tensor in tensors.items()}
