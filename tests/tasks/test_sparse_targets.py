"""Sparse targets: bit for bit the dense ones of the selection, and small up to the loss."""

import tracemalloc

import numpy as np
import pytest
import torch

import tasks.batches
import tasks.shard_openers
from models.training import initial_state, train
from storage.manifest import InputReference, Manifest, put_object
from storage.selections import Reason, Selection, to_parquet
from tasks.batches import TrainingBatches
from tasks.reading_ahead import Position
from tasks.sparse_targets import SparseTargets, target_bytes
from tasks.waiting_batches import WaitingTargets

NUM_CLASSES = 20_000


def random_selection(rng, *, num_rows, num_classes, num_listed):
    """Rows with so many listed classes each; 0 makes a row hard."""
    ids, log_probs, rest = [], [], np.zeros(num_rows, np.float32)
    for row, count in enumerate(num_listed):
        probs = rng.dirichlet(np.full(num_classes, 0.3))
        chosen = rng.permutation(num_classes)[:count]
        ids.append(chosen)
        log_probs.append(np.log(np.maximum(probs[chosen], 1e-7)))
        rest[row] = 1 - probs[chosen].sum() if 0 < count < num_classes else 0
    return Selection(
        keys=tuple(f"{row:06d}" for row in range(num_rows)),
        kept=np.ones(num_rows, np.bool_),
        reason=np.full(num_rows, Reason.KEPT, np.int8),
        copies=np.ones(num_rows, np.uint16),
        weight=np.ones(num_rows, np.float32),
        label=rng.integers(0, num_classes, num_rows).astype(np.uint32),
        target_offsets=np.concatenate([[0], np.cumsum(num_listed)]).astype(np.int64),
        target_ids=np.concatenate([*ids, []]).astype(np.uint32),
        target_log_probs=np.concatenate([*log_probs, []]).astype(np.float16),
        rest_mass=rest.clip(0, 1),
    )


def dense(targets):
    listed = (torch.from_numpy(values) for values in targets.normalized())
    return WaitingTargets(*listed, num_classes=targets.num_classes).dense().numpy()


@pytest.mark.parametrize("num_classes", [2, 3, 10, 129, 1000, 70_000])
@pytest.mark.parametrize("kind", ["hard", "full", "few", "mixed"])
def test_sparse_targets_become_the_dense_ones_of_the_selection_bit_for_bit(num_classes, kind):
    rng = np.random.default_rng(num_classes)
    n = 40 if num_classes < 1000 else 6
    most = {"hard": 0, "full": num_classes, "few": min(8, num_classes), "mixed": num_classes}[kind]
    least = num_classes if kind == "full" else 0 if kind in ("hard", "mixed") else 1
    num_listed = rng.integers(least, most + 1, n)
    selection = random_selection(rng, num_rows=n, num_classes=num_classes, num_listed=num_listed)
    expected = selection.dense_targets(num_classes)
    every = SparseTargets.of(selection, np.arange(n), num_classes)
    np.testing.assert_array_equal(dense(every), expected)
    # Any rows in any order, some of them twice, in parts that are put together again.
    rows = rng.integers(0, n, 2 * n)
    np.testing.assert_array_equal(dense(every.take(rows)), expected[rows])
    parts = [SparseTargets.of(selection, part, num_classes) for part in np.split(rows, [3, n])]
    np.testing.assert_array_equal(dense(SparseTargets.joined(parts)), expected[rows])


def test_the_rest_is_shared_by_the_classes_that_are_not_listed():
    # 0.5 on class 3, 0.25 on class 0, 0.25 left for classes 1, 2 and 4; then class 1 alone, hard.
    selection = Selection(
        keys=("a", "b"),
        kept=np.array([True, True]),
        reason=np.zeros(2, np.int8),
        copies=np.array([3, 1], np.uint16),
        weight=np.ones(2, np.float32),
        label=np.array([3, 1], np.uint32),
        target_offsets=np.array([0, 2, 2], np.int64),
        target_ids=np.array([3, 0], np.uint32),
        target_log_probs=np.log(np.array([0.5, 0.25])).astype(np.float16),
        rest_mass=np.array([0.25, 0], np.float32),
    )
    targets = SparseTargets.of(selection, np.array([1, 0]), 5)
    np.testing.assert_allclose(
        dense(targets),
        [[0, 1, 0, 0, 0], [0.25, 0.25 / 3, 0.25 / 3, 0.5, 0.25 / 3]],
        atol=1e-3,
    )
    assert targets.offsets.tolist() == [0, 1, 3]
    assert selection.num_listed == 3 * 2 + 1


def test_a_selection_of_other_classes_is_refused():
    rng = np.random.default_rng(0)
    selection = random_selection(rng, num_rows=1, num_classes=9, num_listed=np.array([9]))
    with pytest.raises(AssertionError):
        SparseTargets.of(selection, np.arange(1), 5)


@pytest.mark.parametrize(("num_classes", "per_listed"), [(10, 4), (2**16, 4), (2**16 + 1, 6)])
def test_bytes_foretold_are_those_held(num_classes, per_listed):
    rng = np.random.default_rng(1)
    selection = random_selection(
        rng, num_rows=50, num_classes=num_classes, num_listed=rng.integers(0, 9, 50)
    )
    targets = SparseTargets.of(selection, np.arange(50), num_classes)
    # An offset of 8, rest and total of 4 each, and 4 + 4 of the weight and confidence beside it.
    beside = 50 * 8
    foretold = target_bytes(num_items=50, num_listed=selection.num_listed, num_classes=num_classes)
    assert foretold == selection.num_listed * per_listed + 50 * 24
    assert targets.num_bytes + beside == foretold + 8  # offsets are one more than rows


@pytest.fixture
def large_label_space(lab, tmp_path):
    """Make the batches of a student of 20,000 classes, from so many images with 8 listed each."""
    opened = []
    image = lab.png(0, 0)

    def make(num_rows):
        lab.write_shard(
            tmp_path / f"{num_rows}" / "many-0.tar",
            [(f"{i:06d}", image, None) for i in range(num_rows)],
        )
        corpus = lab.index_into(lab.store, tmp_path / f"{num_rows}")
        (shard,) = corpus.shards
        rng = np.random.default_rng(2)
        selection = few_of_many(rng, num_rows)
        labeling = manifest_of(
            "label",
            inputs={"corpus": InputReference(corpus.digest, "0" * 64)},
            counts={"shards": {shard.stem: {"num_samples": num_rows}}},
        )
        stored = put_object(lab.store, "test", shard.digest, to_parquet(selection), "parquet")
        chosen = manifest_of(
            "select",
            objects=(stored,),
            settings={"selection": {"target": "soft"}},
            counts={
                "items": {shard.stem: num_rows},
                "listed_targets": {shard.stem: selection.num_listed},
            },
        )
        config = lab.config(unlabeled_ratio=2)
        batches = TrainingBatches(
            lab.store,
            config,
            labeled=lab.labeled.digest,
            class_names=(*lab.class_names, *(f"class {i}" for i in range(3, NUM_CLASSES))),
            selection=chosen,
            labeling=labeling,
            stage_stream=11,
            device=torch.device("cpu"),
            max_bad_samples=0,
        )
        opened.append(batches)
        return config, batches

    yield make
    for batches in opened:
        batches.close()


def few_of_many(rng, num_rows):
    """Eight classes a row, with a thousandth of the probability left for the others."""
    ids = rng.integers(0, NUM_CLASSES // 8, (num_rows, 8)) * 8 + np.arange(8)
    return Selection(
        keys=tuple(f"{i:06d}" for i in range(num_rows)),
        kept=np.ones(num_rows, np.bool_),
        reason=np.zeros(num_rows, np.int8),
        copies=np.ones(num_rows, np.uint16),
        weight=np.ones(num_rows, np.float32),
        label=ids[:, 0].astype(np.uint32),
        target_offsets=np.arange(num_rows + 1, dtype=np.int64) * 8,
        target_ids=ids.reshape(-1).astype(np.uint32),
        target_log_probs=np.full(num_rows * 8, np.log(0.999 / 8), np.float16),
        rest_mass=np.full(num_rows, 0.001, np.float32),
    )


def manifest_of(kind, *, counts, inputs=None, objects=(), settings=None):
    return Manifest(
        kind=kind,
        fingerprint="0" * 64,
        stage_version=1,
        settings=settings or {},
        inputs=inputs or {},
        objects=objects,
        counts=counts,
    )


def held_bytes(batches):
    """What the targets hold: of the corpus, and of one part that waits."""
    waiting = batches._made(Position(0, 0, 1)).pseudo_targets
    samples = batches._sources[1].samples
    of_corpus = sum(targets.num_bytes for targets in samples._targets.values())
    return of_corpus + sum(t.nbytes for t in (waiting.positions, waiting.probs, waiting.rest))


LIMIT = 10 * 2**20


def test_targets_of_twenty_thousand_classes_stay_small_up_to_the_loss(large_label_space):
    config, batches = large_label_space(5_000)  # 400 MB of dense targets
    assert batches._sources[1].is_cached
    state = initial_state(config, NUM_CLASSES, seed=0, device="cpu")
    tracemalloc.start()
    reports = list(train(state, config, batches.batch, total_steps=3, num_labeled=24, layer_seed=3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes(batches) < LIMIT
    # All of numpy's: the shard's files, its selection while it is read, a block of sums.
    assert peak < 40 * 2**20
    assert [report.step for report in reports] == [1, 2, 3]
    assert all(np.isfinite(report.loss) for report in reports)
    targets = batches.batch(1).pseudo_targets
    assert targets.shape == (12, NUM_CLASSES)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(12))


def test_dense_targets_would_be_noticed(large_label_space, monkeypatch):
    """Known-broken variant: every class is listed, as dense targets would."""

    def dense_ones(selection, rows, num_classes):
        n = len(rows)
        values = np.log(selection.dense_targets(num_classes)[rows]).astype(np.float16)
        ids = np.tile(np.arange(num_classes, dtype=np.uint16), n)
        offsets, ones = np.arange(n + 1) * num_classes, np.ones(n, np.float32)
        return SparseTargets(num_classes, offsets, ids, values.reshape(-1), ones, ones)

    monkeypatch.setattr(tasks.shard_openers.SparseTargets, "of", dense_ones)
    _, batches = large_label_space(300)  # 24 MB dense
    assert held_bytes(batches) > LIMIT


def test_targets_too_large_for_memory_are_read_again_with_their_shards(
    large_label_space, monkeypatch
):
    _, batches = large_label_space(300)
    (held,) = batches._sources[1].held
    files = batches._sources[1].shard_bytes[0]
    assert held.own == files + 300 * (8 * 4 + 24)
    monkeypatch.setattr(tasks.batches, "CACHE_BYTES", files + 300 * 192 + 300 * 56 - 1)
    assert not large_label_space(300)[1]._sources[1].is_cached
