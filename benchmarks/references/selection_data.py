"""A labelling of as many rows as wanted, long-tailed over 1,000 classes, made up from a seed."""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.balancing import TopKConfig
from models.thresholds import FixedThresholdConfig
from storage.addresses import sha256_hex
from storage.corpus import Corpus, Shard, save_corpus
from storage.predictions import Listed, Predictions, read_record, write_predictions
from storage.store import Store, open_store
from tasks import labeling
from tasks.selection_config import SelectionConfig

NUM_CLASSES = 1_000
CLASS_NAMES = tuple(f"class-{i:04d}" for i in range(NUM_CLASSES))
LABELER = "f" * 64
LISTED = 10
IMBALANCE = 100
"""Images of the largest class over those of the smallest, falling by a constant factor."""

THRESHOLD, MAX_COPIES = 0.3, 3


@dataclass(frozen=True)
class Problem:
    """Rows in shards, and how many of each class are wanted."""

    num_rows: int
    num_shards: int

    @property
    def quota(self) -> int:
        """Half of the mean of a class: 60 % of the classes have more."""
        return self.num_rows // NUM_CLASSES // 2

    @property
    def config(self) -> SelectionConfig:
        """The selection: exact top-k of each class above a threshold, small classes duplicated."""
        return SelectionConfig(
            threshold=FixedThresholdConfig(confidence=THRESHOLD),
            balance=TopKConfig(k=self.quota, max_copies=MAX_COPIES),
            target="hard",
        )


def make_labeling(folder: Path, problem: Problem) -> None:
    """Write the predictions and the labelling into a store in the folder, unless they are there."""
    if (folder / "done").exists():
        return
    store = open_store(str(folder / "store"))
    size = problem.num_rows // problem.num_shards
    # In the order of their digests, which name the files: libraries break ties as we do by stem.
    digests = sorted(sha256_hex(f"{size} {i}".encode()) for i in range(problem.num_shards))
    shards = [Shard(f"part-{i:05d}", digest, size, 0) for i, digest in enumerate(digests)]
    corpus = Corpus.of(shards)
    save_corpus(store, corpus, {shard.stem: f"/nowhere/{shard.stem}.tar" for shard in shards})
    with ProcessPoolExecutor(2) as pool:
        for number, _ in enumerate(pool.map(_write_shard, [store] * len(shards), shards), 1):
            if number % 100 == 0:
                print(f"{number} of {len(shards)} shards made", file=sys.stderr)
    labeling.finish(store, _specification(corpus.digest), seconds=0.0)
    (folder / "done").write_text(corpus.digest)


def labeling_of(folder: Path) -> tuple[Store, str]:
    """Return the store and the fingerprint of its labelling."""
    digest = (folder / "done").read_text()
    return open_store(str(folder / "store")), _specification(digest).fingerprint


def _specification(corpus: str):
    return labeling.specify(labeler=LABELER, corpus=corpus)


def _write_shard(store: Store, shard: Shard) -> None:
    if read_record(store, LABELER, shard.digest) is not None:
        return
    n = shard.num_samples
    rng = np.random.default_rng(int(shard.digest[:15], 16))
    sizes = IMBALANCE ** (-np.arange(NUM_CLASSES) / (NUM_CLASSES - 1))
    labels = rng.choice(NUM_CLASSES, n, p=sizes / sizes.sum())
    confidences = np.maximum(1 - rng.beta(0.7, 1.6, n), 0.06)  # half of them above 0.7
    shares = rng.dirichlet(np.ones(LISTED), n)  # of what the label leaves: listed, and the rest
    probs = np.column_stack([confidences, shares[:, 1:] * (1 - confidences)[:, None]])
    rest = shares[:, 0] * (1 - confidences)
    steps = np.cumsum(rng.integers(1, NUM_CLASSES // LISTED, (n, LISTED - 1)), axis=1)
    ids = np.column_stack([labels, (labels[:, None] + steps) % NUM_CLASSES])
    log_probs = np.log(np.maximum(probs, 1e-6)).astype(np.float16)
    others = probs[:, 1:].max(axis=1)
    predictions = Predictions(
        keys=tuple(f"{i:08d}" for i in range(n)),
        label=labels.astype(np.uint32),
        confidence=confidences.astype(np.float32),
        margin=np.maximum(confidences - others, 0).astype(np.float32),
        entropy=-(probs * np.log(np.maximum(probs, 1e-6))).sum(axis=1).astype(np.float32),
        log_probs=log_probs,
        logsumexp=rng.normal(8, 2, n).astype(np.float32),
        true_label=np.full(n, -1, np.int32),
        listed=Listed(ids.astype(np.uint32), rest.astype(np.float32), NUM_CLASSES),
    )

    sums = np.zeros((2, NUM_CLASSES), np.int64)  # read by debiasing, which is not measured
    facts = {"bad_samples": {}, "temperature": 1.0}
    write_predictions(store, LABELER, shard.digest, predictions, facts, prob_sums=sums)
