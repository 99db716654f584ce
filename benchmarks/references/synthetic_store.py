"""A store with everything that a student's training reads, made in seconds from a seed."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.balancing import BalanceNoneConfig
from models.thresholds import FixedThresholdConfig
from models.training import TrainingConfig
from storage.corpus import Corpus, load_corpus, save_corpus
from storage.indexing import corpus_from_index, index_shards
from storage.manifest import Manifest
from storage.patterns import expand_shards
from storage.predictions import Predictions, write_predictions
from storage.store import Store, open_store
from tasks import labeling, selection, selection_writing
from tasks.gating import close_gates
from tasks.selection import SelectionConfig
from tasks.selection_passes import plan_selection
from tasks.training_orders import TrainingOrder, place_order, specify

CLASS_NAMES = tuple(f"class-{i}" for i in range(10))
_LABELER = "f" * 64


@dataclass(frozen=True)
class SyntheticStore:
    """Labels, and pseudo-labels of all unlabelled images."""

    store: Store
    labeled: Corpus
    selection: Manifest

    def order(self, config: TrainingConfig) -> TrainingOrder:
        """Order the training of a student and return the order."""
        order = TrainingOrder(
            specify(
                config,
                seed=0,
                round_index=1,
                role="student",
                class_names=CLASS_NAMES,
                labeled=self.labeled.digest,
                selection=self.selection.fingerprint,
            ),
            config,
            max_bad_samples=0,
        )
        place_order(self.store, order)
        return order


def make_store(
    folder: Path, *, labeled_shards: int, unlabeled_shards: int, shard_size: int, image_size: int
) -> SyntheticStore:
    """Write shards of noise, index them, and plant a labelling and a selection that keeps all."""
    store = open_store(str(folder / "store"))
    rng = np.random.default_rng(0)
    corpora: list[Corpus] = []
    for name, num_shards in (("labeled", labeled_shards), ("unlabeled", unlabeled_shards)):
        shards = folder / name
        shards.mkdir(parents=True)
        for i in range(num_shards):
            _write_shard(shards / f"{name}-{i:05d}.tar", rng, shard_size, image_size)
        (shards / "classes.json").write_text(
            '{"schema": 1, "class_names": ["' + '", "'.join(CLASS_NAMES) + '"]}'
        )
        corpus, locations = corpus_from_index(index_shards(expand_shards(str(shards))))
        save_corpus(store, corpus, locations)
        corpora.append(corpus)
    labels = _plant_labeling(store, corpora[1], rng, shard_size)
    return SyntheticStore(store, corpora[0], _select_all(store, labels))


def _write_shard(path: Path, rng: np.random.Generator, shard_size: int, image_size: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(shard_size):
            pixels = rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "JPEG", quality=90)
            for suffix, content in (("jpg", image.getvalue()), ("cls", str(i % 10).encode())):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _plant_labeling(
    store: Store, corpus: Corpus, rng: np.random.Generator, shard_size: int
) -> Manifest:
    for shard in corpus.shards:
        logits = rng.normal(0, 3, (shard_size, len(CLASS_NAMES)))
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        probs = np.exp(log_probs)
        top = np.sort(probs, axis=1)
        predictions = Predictions(
            keys=tuple(f"{i:06d}" for i in range(shard_size)),
            label=probs.argmax(axis=1).astype(np.uint32),
            confidence=top[:, -1].astype(np.float32),
            margin=(top[:, -1] - top[:, -2]).astype(np.float32),
            entropy=np.maximum(-(probs * log_probs).sum(axis=1), 0).astype(np.float32),
            log_probs=log_probs.astype(np.float16),
            logsumexp=np.zeros(shard_size, np.float32),
            true_label=np.full(shard_size, -1, np.int32),
        )
        write_predictions(store, _LABELER, shard.digest, predictions, {"bad_samples": {}})
    specification = labeling.specify(labeler=_LABELER, corpus=corpus.digest)
    return labeling.finish(store, specification, seconds=0.0)


def _select_all(store: Store, labels: Manifest) -> Manifest:
    config = SelectionConfig(
        calibration="none",
        threshold=FixedThresholdConfig(confidence=0.0),
        balance=BalanceNoneConfig(),
        allow_collapse=True,
    )
    specification = selection.specify(
        config, labeling=labels.fingerprint, validation="none", seed=0, round_index=1
    )
    stems = list(labels.counts["shards"])

    def mapped(one_pass: Any, inputs: Any, config: SelectionConfig, *more: Any) -> list[Any]:
        return [one_pass(store, inputs, stems, config, *more)]

    corpus = load_corpus(store, labels.inputs["corpus"].fingerprint)
    inputs = selection.begin(store, specification, labels, corpus)
    inputs, _ = close_gates(store, inputs, config, None, None, mapped)
    inputs, facts = selection.calibrate(store, specification, inputs, None, class_names=CLASS_NAMES)
    planned = plan_selection(inputs, config, mapped)
    selection_writing.write_selections(
        store, specification, planned.inputs, stems, config, planned.plan
    )
    return selection.finish(
        store,
        specification,
        labels,
        None,
        config,
        corpus=corpus,
        groups=[stems],
        facts=facts,
        class_names=CLASS_NAMES,
        seconds=0.0,
    )
