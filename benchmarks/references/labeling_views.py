"""Does speed change what a trained network sees or says? Against torchvision, and bf16 to fp32."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as reference

from benchmarks.references.labeling_data import CROP_PADDING, IMAGE_SIZE, photographs
from models.architectures import Classifier, Normalization, SmallCnnConfig, build_classifier
from models.inference import InferenceNetwork, Precision, log_probabilities
from tasks.images import clean_view, decode_pixels

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.gz"
_SIZE, _PADDING = 24, 4  # 32 pixels are resized to 28, of which 24 are cut

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Difference:
    """Between the labels of the same images in two ways.

    Attributes:
        labels_changed: share of images.
        mean_confidence_change: mean absolute difference.
        rows_moved: largest share of images that cross a threshold; thresholds are the 25th, 50th
            and 75th percentile of the first way's confidences.
        largest_distance: from the threshold, of any image that crosses it.
    """

    labels_changed: float
    mean_confidence_change: float
    rows_moved: float
    largest_distance: float


def pixel_difference() -> float:
    """Return the mean absolute difference of 255 of our views of the photographs."""
    differences = [
        np.abs(
            _ours(data, IMAGE_SIZE, CROP_PADDING).astype(int)
            - _torchvisions(data, IMAGE_SIZE, CROP_PADDING)
        ).mean()
        for data in photographs()
    ]
    return float(np.mean(differences))


def label_differences(*, num_images: int, steps: int) -> tuple[Difference, Difference, float]:
    """Train a small network on CIFAR-10's training images and label others of them.

    Returns: ours against torchvision's view; bf16 against fp32; the network's accuracy.
    """
    files, labels = _cifar10(2 * num_images)
    ours = _stacked([_ours(data, _SIZE, _PADDING) for data in files])
    theirs = _stacked([_torchvisions(data, _SIZE, _PADDING) for data in files[num_images:]])
    classifier = _trained(ours[:num_images], labels[:num_images], steps)
    ours = ours[num_images:]
    exact = _probs(classifier, ours)
    accuracy = float((exact.argmax(1) == labels[num_images:].numpy()).mean())
    return (
        _difference(_probs(classifier, theirs), exact),
        _difference(exact, _probs(classifier, ours, "bf16")),
        accuracy,
    )


def _ours(data: bytes, size: int, padding: int) -> Pixels:
    return clean_view(decode_pixels(data, where="photograph"), size, padding, "bilinear")


def _torchvisions(data: bytes, size: int, padding: int) -> Pixels:
    """The view that torchvision's own weights come with: Pillow's decoder and resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    resized = reference.resize(image, [size + padding], antialias=True)  # type: ignore[arg-type]
    return np.array(reference.center_crop(resized, [size, size]))


def _cifar10(count: int) -> tuple[list[bytes], Tensor]:
    """Return training images, as many of each class, in a fixed order without pattern."""
    per_class: dict[str, list[bytes]] = {}
    with tarfile.open(CIFAR10) as tar:
        for member in tar:
            parts = Path(member.name).parts
            found = per_class.setdefault(parts[-2], []) if "train" in parts[:-2] else None
            if found is not None and member.isfile() and len(found) < count // 10:
                file = tar.extractfile(member)
                assert file is not None
                found.append(file.read())
    names = sorted(per_class)
    files = [data for name in names for data in per_class[name]]
    labels = torch.tensor([i for i, name in enumerate(names) for _ in per_class[name]])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return [files[i] for i in order.tolist()], labels[order]


def _trained(images: Tensor, labels: Tensor, steps: int) -> Classifier:
    torch.manual_seed(0)
    classifier = build_classifier(SmallCnnConfig(width=16, depth=1), 10, Normalization())
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    classifier.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (100,))
        batch = images[rows].float() / 255
        loss = F.cross_entropy(classifier(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()
        schedule.step()
    return classifier.eval()


def _probs(
    classifier: Classifier, images: Tensor, precision: Precision = "fp32"
) -> NDArray[np.float32]:
    network = InferenceNetwork(classifier, precision)
    found = [log_probabilities(network, batch)[0].exp() for batch in images.split(100)]
    return torch.cat(found).numpy()


def _difference(before: NDArray[np.float32], after: NDArray[np.float32]) -> Difference:
    first, second = before.max(axis=1), after.max(axis=1)
    shares, distances = [0.0], [0.0]
    for threshold in np.percentile(first, (25, 50, 75)):
        has_moved = (first >= threshold) != (second >= threshold)
        shares.append(float(has_moved.mean()))
        both = np.abs(np.stack([first, second])[:, has_moved] - threshold)
        distances.append(float(both.max(initial=0.0)))
    return Difference(
        labels_changed=float((before.argmax(1) != after.argmax(1)).mean()),
        mean_confidence_change=float(np.abs(first - second).mean()),
        rows_moved=max(shares),
        largest_distance=max(distances),
    )


def _stacked(views: list[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
