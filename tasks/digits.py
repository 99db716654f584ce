"""scikit-learn's 1,797 handwritten digits (UCI, 8 x 8 pixels): real images that need no network."""

import io

import numpy as np
from PIL import Image

from storage.objects import join_url, object_exists, write_object
from tasks.sharding import shard_dataset
from tasks.sources import SourceImage

_DONE = "prepared.txt"


def read_digits() -> list[SourceImage]:
    """Return the images as grey PNGs labelled "0" to "9"."""
    # Imported here: scikit-learn takes a second, and only the demo's corpus needs it.
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    images: list[SourceImage] = []
    for index, (pixels, label) in enumerate(zip(features, labels, strict=True)):
        # (64,), intensities 0..16, ink is high -> (8, 8) of 8 bits
        gray = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(8, 8)
        buffer = io.BytesIO()
        Image.fromarray(gray).save(buffer, "PNG")
        png = buffer.getvalue()
        images.append(SourceImage(f"{label}/{index:04d}.png", str(label), lambda png=png: png))
    return images


def prepare_digits(
    out_url: str, *, labels_per_class: int, dev: int, test: int, shard_size: int, seed: int
) -> None:
    """Shard the digits below a URL, once: labeled/, dev/, test/, unlabeled/."""
    done = join_url(out_url, _DONE)
    if object_exists(done):
        return
    shard_dataset(
        read_digits(),
        out_url,
        labels_per_class=labels_per_class,
        dev=dev,
        test=test,
        shard_size=shard_size,
        seed=seed,
    )
    write_object(done, b"all shards are written\n")
