"""Pseudo-labels as the README of webdataset would have them made: a loader, a network, Parquet.

`python -m ... NETWORK OUT WORKERS SHARDS...` prints images a second, starting Python not counted.
"""

import sys
import time
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models import get_model
from webdataset.compat import WebDataset

from benchmarks.references.labeling_data import CLASS_NAMES, CROP_PADDING, IMAGE_SIZE


def images_per_second(shards: list[Path], name: str, out: Path, *, num_workers: int) -> float:
    """Label shards with one of torchvision's networks into one Parquet file."""
    transform = transforms.Compose(
        [
            transforms.Resize(IMAGE_SIZE + CROP_PADDING),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    started = time.monotonic()
    dataset = (
        WebDataset([str(path) for path in shards], shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "jpg")
        .map_tuple(lambda key: key, transform)
    )
    loader: DataLoader[Any] = DataLoader(cast(Any, dataset), 64, num_workers=num_workers)
    network = get_model(name, weights=None, num_classes=len(CLASS_NAMES)).eval()
    keys: list[str] = []
    labels: list[int] = []
    confidences: list[float] = []
    with torch.no_grad():
        for batch_keys, images in loader:
            confidence, label = network(images).softmax(dim=1).max(dim=1)
            keys += batch_keys
            labels += label.tolist()
            confidences += confidence.tolist()
    table = pa.table({"key": keys, "label": labels, "confidence": confidences})
    pq.write_table(table, out)
    return len(keys) / (time.monotonic() - started)


if __name__ == "__main__":
    network, out, workers, *shards = sys.argv[1:]
    rate = images_per_second(
        [Path(shard) for shard in shards], network, Path(out), num_workers=int(workers)
    )
    print(rate)
