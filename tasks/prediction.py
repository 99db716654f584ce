"""Use a finished model: classify image files, or export it for use without selftrain's store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.description import save_model
from storage.manifest import read_stored
from storage.store import Store
from tasks.classifiers import load_classifier, model_manifest, read_description
from tasks.devices import DeviceChoice, resolve_device
from tasks.ensembles import forward
from tasks.images import BadImage, clean_view, decode_pixels

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}
_BATCH_SIZE = 64
_TOP = 3


def predict_files(
    store: Store, fingerprint: str, paths: Sequence[Path], *, device: DeviceChoice
) -> list[dict[str, Any]]:
    """Classify image files, and those below folders.

    Returns: one entry a file, in order: path, label, confidence, and the top classes; or path and
        error for a file that is no image.
    Raises: ValueError if a path does not exist or a folder holds no image.
    """
    files = [file for path in paths for file in _files(path)]
    classifier = load_classifier(store, fingerprint, device=resolve_device(device))
    view = classifier.description
    found: list[dict[str, Any]] = []
    for start in range(0, len(files), _BATCH_SIZE):
        entries: list[dict[str, Any]] = []
        views: list[np.ndarray] = []
        for file in files[start : start + _BATCH_SIZE]:
            entry: dict[str, Any] = {"path": str(file)}
            entries.append(entry)
            try:
                image = decode_pixels(file.read_bytes(), where=str(file))
            except BadImage as error:
                entry["error"] = str(error)
                continue
            views.append(clean_view(image, view.image_size, view.crop_padding, view.interpolation))
        if views:
            probs = np.exp(forward(torch.from_numpy(np.stack(views)), classifier, "fp32")[0])
            readable = (entry for entry in entries if "error" not in entry)
            for entry, row in zip(readable, probs, strict=True):
                best = np.argsort(-row, kind="stable")[:_TOP]
                names = classifier.class_names
                entry["label"] = names[best[0]]
                entry["confidence"] = float(row[best[0]])
                entry["top"] = [{"label": names[i], "confidence": float(row[i])} for i in best]
        found += entries
    return found


def export_model(store: Store, fingerprint: str, folder: Path) -> None:
    """Write a model to a new local folder: model.safetensors and model.json."""
    weights = read_stored(store, model_manifest(store, fingerprint).object("model"))
    save_model(folder, weights, read_description(store, fingerprint))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _EXTENSIONS)
    if not files:
        raise ValueError(f"{path}: no image below it ({', '.join(sorted(_EXTENSIONS))})")
    return files
