"""The out-of-domain gates on images: digits with planted strangers, through a trained network."""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.architectures import SmallCnnConfig
from models.balancing import BalanceNoneConfig
from models.durations import Duration
from models.noise import AffineConfig, NoiseConfig
from models.out_of_domain import (
    EnergyConfig,
    EntropyConfig,
    MaxProbConfig,
    OutOfDomainConfig,
    OutOfDomainNoneConfig,
    PuConfig,
)
from models.thresholds import FixedThresholdConfig
from storage.manifest import Manifest, read_stored
from storage.selections import Reason, from_parquet
from tasks.digits import read_digits
from tasks.evaluation import read_report
from tasks.selection import SelectionConfig

NUM_LABELED, NUM_DEV, NUM_DIGITS, NUM_STRANGERS = 400, 300, 700, 300
NUM_SHARDS = 10
KINDS = ("noise", "colour", "stripes")


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def stranger(number: int) -> tuple[str, bytes]:
    """Key and file of an image that shows no digit; its kind is in the key."""
    rng = np.random.default_rng([7, number])
    kind = KINDS[number % len(KINDS)]
    if kind == "noise":
        pixels = rng.integers(0, 256, (8, 8, 3))
    elif kind == "colour":
        pixels = np.broadcast_to(rng.integers(0, 256, 3), (8, 8, 3))
    else:
        pixels = np.broadcast_to(rng.integers(0, 2, (8, 1, 1)) * 255, (8, 8, 3))
        pixels = pixels if rng.random() < 0.5 else pixels.transpose(1, 0, 2)
    return f"{kind}{number:03d}", png(pixels.astype(np.uint8))


@dataclass(frozen=True)
class World:
    """A network that knows the digits, and its labels of a corpus that is not all digits."""

    lab: Any
    validation: Manifest
    labels: Manifest

    def kept(self, gate: OutOfDomainConfig) -> dict[str, float]:
        """Select with nothing but a gate; return the share that is kept of each kind of image."""
        rules = SelectionConfig(
            out_of_domain=gate,
            calibration="none",
            threshold=FixedThresholdConfig(confidence=0),
            balance=BalanceNoneConfig(),
            target="hard",
        )
        manifest = self.lab.select(self.labels, self.validation, rules)
        is_kept: dict[str, list[bool]] = {}
        for shard in self.lab.unlabeled.shards:
            stored = read_stored(self.lab.store, manifest.object(shard.digest))
            chosen = from_parquet(stored, num_samples=shard.num_samples)
            assert set(chosen.reason) <= {Reason.KEPT, Reason.OUT_OF_DOMAIN}
            for key, one in zip(chosen.keys, chosen.kept.tolist(), strict=True):
                is_kept.setdefault(key.rstrip("0123456789"), []).append(one)
        shares = {kind: float(np.mean(found)) for kind, found in is_kept.items()}
        strange = [one for kind in KINDS for one in is_kept[kind]]
        return shares | {"strangers": float(np.mean(strange))}


@pytest.fixture(scope="module")
def world(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("strangers")
    images = read_digits()
    order = np.random.default_rng(3).permutation(len(images))
    digits = [(f"digit{i:04d}", images[i].load(), int(images[i].label or 0)) for i in order]
    labeled, dev, known = np.split(
        np.arange(NUM_LABELED + NUM_DEV + NUM_DIGITS), [NUM_LABELED, NUM_LABELED + NUM_DEV]
    )
    corpus: list[tuple[str, bytes, int | None]] = [(*digits[i][:2], None) for i in known]
    corpus += [(*stranger(number), None) for number in range(NUM_STRANGERS)]
    names = tuple("0123456789")
    lab = pipeline.lab.in_empty_store(folder / "store")
    lab = replace(lab, class_names=names)
    parts = {
        "labeled": {"labeled-0": [digits[i] for i in labeled]},
        "dev": {"dev-0": [digits[i] for i in dev]},
        "unlabeled": {f"unlabeled-{i}": corpus[i::NUM_SHARDS] for i in range(NUM_SHARDS)},
    }
    corpora = {
        name: lab.index_into(lab.store, lab.write_split(folder / name, shards, names))
        for name, shards in parts.items()
    }
    lab = lab.with_corpora(**corpora)
    config = lab.config(
        architecture=SmallCnnConfig(width=16, depth=1),
        batch_size=50,
        duration=Duration(steps=300),
        noise=NoiseConfig(
            affine=AffineConfig(degrees=10, translate=0.1), horizontal_flip=False, dropout=0.2
        ),
    )
    teacher = lab.train(lab.order(config)).fingerprint
    validation = lab.evaluate("validate", teacher)
    assert read_report(lab.store, validation)["accuracy"] > 0.9
    return World(lab, validation, lab.label(teacher))


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate",
    [
        MaxProbConfig(keep_dev_fraction=0.95),
        EnergyConfig(keep_dev_fraction=0.95),
        EntropyConfig(keep_dev_fraction=0.95),
        PuConfig(prior=0.7),
    ],
    ids=lambda gate: gate.kind,
)
def test_a_gate_turns_down_most_planted_strangers_and_few_digits(
    world: World, gate: OutOfDomainConfig
) -> None:
    found = world.kept(gate)
    assert found["digit"] > 0.85
    assert found["strangers"] < 0.5


@pytest.mark.slow
def test_without_a_gate_and_at_threshold_0_every_stranger_is_a_pseudo_label(world: World) -> None:
    assert set(world.kept(OutOfDomainNoneConfig()).values()) == {1.0}
