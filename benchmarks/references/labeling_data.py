"""A store with replicated photographs in shards, and a network of random weights to label them."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch

from models.architectures import (
    ArchitectureConfig,
    EfficientNetConfig,
    MobileNetV3Config,
    Normalization,
    ResNetConfig,
    build_classifier,
)
from models.description import ModelDescription, main_head, save_model
from storage.corpus import Corpus, save_corpus
from storage.indexing import corpus_from_index, index_shards
from storage.patterns import expand_shards
from storage.store import Store, open_store
from tasks.importing import import_exported

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample-400.tar"
NETWORKS: dict[str, ArchitectureConfig] = {
    "resnet18": ResNetConfig(name="resnet18"),
    "resnet50": ResNetConfig(name="resnet50"),
    "mobilenet_v3_small": MobileNetV3Config(name="small"),
    "efficientnet_b0": EfficientNetConfig(name="b0"),
}
IMAGE_SIZE, CROP_PADDING = 224, 32
CLASS_NAMES = tuple(f"class-{i:04d}" for i in range(1000))


@dataclass(frozen=True)
class PhotographStore:
    """Photographs in shards on the local disk, and the store that knows them."""

    store: Store
    shards: Path
    corpus: Corpus


def photographs(source: Path = PHOTOGRAPHS) -> list[bytes]:
    """Return the files of the sample, all JPEGs."""
    with tarfile.open(source) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [file.read() for file in files if file is not None]


def make_store(
    folder: Path, *, num_shards: int, shard_size: int, source: Path = PHOTOGRAPHS
) -> PhotographStore:
    """Write shards of the photographs, again and again under other keys, and index them."""
    store, shards = open_store(str(folder / "store")), folder / "shards"
    shards.mkdir(parents=True)
    images = photographs(source)
    for shard in range(num_shards):
        with tarfile.open(
            shards / f"photos-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as t:
            for i in range(shard_size):
                number = shard * shard_size + i
                info = tarfile.TarInfo(f"{number:08d}.jpg")
                image = images[number % len(images)]
                info.size = len(image)
                t.addfile(info, io.BytesIO(image))
    corpus, locations = corpus_from_index(index_shards(expand_shards(str(shards))))
    save_corpus(store, corpus, locations)
    return PhotographStore(store, shards, corpus)


def put_network(store: Store, name: str, folder: Path) -> str:
    """Store a network of fresh weights, made reproducibly, and return its fingerprint."""
    torch.manual_seed(0)
    network = build_classifier(NETWORKS[name], len(CLASS_NAMES), Normalization())
    description = ModelDescription(
        architecture=NETWORKS[name],
        heads=main_head(CLASS_NAMES),
        image_size=IMAGE_SIZE,
        crop_padding=CROP_PADDING,
    )
    save_model(folder, network, description)
    return import_exported(store, str(folder))
