"""The last pass of a selection: a file of each shard, and a record of each group of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.balancing import FinishedPlan, assign_copies, classes_per_image
from models.randomness import Block, uniforms
from storage import crash_points
from storage.addresses import sha256_hex
from storage.corpus import Corpus
from storage.manifest import StoredObject, create_record, put_object, read_record
from storage.selections import Reason, Selection, to_parquet
from storage.store import Store
from tasks.overlapping import read_ahead, write_behind
from tasks.selection_config import SelectionConfig
from tasks.selection_rows import Rows, SelectionInputs
from tasks.selection_summary import ShardCounts
from tasks.specifications import Specification

RECORD_SCHEMA = 2
"""1 was of one shard."""

# Of a store that answers over a network. On a local disk a file is read and written without
# waiting, which threads beside this one would only slow down.
_READERS, _WRITERS = 1, 4
_COMMITTED_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """The selection of a shard, as the record of its group names it.

    Attributes:
        stem: of the shard.
        stored: its file.
        items: selected, copies counted.
        listed_targets: probabilities that the targets of these items list, 1 for a hard one.
    """

    stem: str
    stored: StoredObject
    items: int
    listed_targets: int


@dataclass(frozen=True, slots=True)
class _Made:
    """The selection of a shard before it is written."""

    stem: str
    digest: str
    data: bytes
    counts: ShardCounts
    listed_targets: int


def write_selections(
    store: Store,
    specification: Specification,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: FinishedPlan,
) -> int:
    """Write the selection of each shard of a group and record the group, unless it is recorded.

    The record comes when every file is safe: a selection that was cut off goes on with the groups
    that were not finished. A group is known by its shards.

    Returns: the number of shards written now.
    """
    inputs.assert_next("write")
    path = _record_path(specification, [inputs.shards[stem].shard for stem in stems])
    if read_record(store, path) is not None:
        return 0

    def write(made: _Made) -> tuple[WrittenShard, ShardCounts]:
        stored = put_object(
            together,
            specification.folder,
            made.digest,
            made.data,
            "parquet",
            crash_kind="select",
        )
        items = made.counts.items
        return WrittenShard(made.stem, stored, items, made.listed_targets), made.counts

    making = _make(store, inputs, stems, config, plan)
    writers = 0 if store.is_local else _WRITERS
    written: list[WrittenShard] = []
    total: ShardCounts | None = None
    with store.writing_together() as together:
        for shard, counts in write_behind(making, write, threads=writers):
            written.append(shard)
            total = counts if total is None else total + counts
            if len(written) % _COMMITTED_TOGETHER == 0:  # each is an open file until then
                together.commit()
    assert total is not None, "a group holds at least one shard"
    crash_points.reach("select.between_data_and_record")
    body = {
        "schema": RECORD_SCHEMA,
        "shards": [asdict(shard) for shard in written],
        "counts": total.to_json(),
    }
    create_record(store, path, body)
    return len(written)


def written_shards(
    store: Store,
    specification: Specification,
    corpus: Corpus,
    groups: Sequence[Sequence[str]],
) -> tuple[list[WrittenShard], list[ShardCounts]]:
    """Return what was written of every shard, in the corpus's order, and the counts of each group.

    Args:
        store: where it is.
        specification: of the selection.
        corpus: that was selected from.
        groups: of stems, as they were given to `write_selections`.
    Raises: ValueError for a shard that is in no recorded group.
    """
    digests = {shard.stem: shard.digest for shard in corpus.shards}
    written: dict[str, WrittenShard] = {}
    counts: list[ShardCounts] = []
    for group in groups:
        path = _record_path(specification, [digests[stem] for stem in group])
        record = read_record(store, path)
        if record is None:
            raise ValueError(f"selection: shard {group[0]} has no record; run it again")
        for body in record["shards"]:
            shard = WrittenShard(**body | {"stored": StoredObject(**body["stored"])})
            written[shard.stem] = shard
        counts.append(ShardCounts.from_json(record["counts"]))
    missing = [shard.stem for shard in corpus.shards if shard.stem not in written]
    if missing:
        raise ValueError(f"selection: shard {missing[0]} is in no group; run it again")
    return [written[shard.stem] for shard in corpus.shards], counts


def _record_path(specification: Specification, digests: Sequence[str]) -> str:
    return specification.record_path(sha256_hex("\n".join(digests).encode()))


def _make(
    store: Store,
    inputs: SelectionInputs,
    stems: Sequence[str],
    config: SelectionConfig,
    plan: FinishedPlan,
) -> Iterator[_Made]:
    """Yield the selections of some shards, the predictions of the next ones read ahead."""
    following = dict(pairwise(stems))

    def read(stem: str) -> Rows:
        if stem in following:
            store.read_soon(inputs.shards[following[stem]].stored.path)
        # The one pass that reads files whole: each is checked before its selection is committed.
        return Rows.read(store, inputs, stem, to_write=True)

    for rows in read_ahead(stems, read, threads=0 if store.is_local else _READERS):
        assert rows.true_labels is not None, "read to write"
        selection, item_classes = _select(rows, plan, inputs, config)
        counts = ShardCounts.of(
            selection,
            rows.true_labels,
            rows.confidences,
            inputs.num_classes,
            item_classes=item_classes,
        )
        digest = inputs.shards[rows.stem].shard
        yield _Made(rows.stem, digest, to_parquet(selection), counts, selection.num_listed)


def _select(
    rows: Rows, plan: FinishedPlan, inputs: SelectionInputs, config: SelectionConfig
) -> tuple[Selection, NDArray[np.integer] | None]:
    """Return the selection, and the class of each item where an image may have several."""
    assert inputs.weighting is not None, "weights come before"
    ranked = rows.ranked(inputs, config.balance).ranked

    def keys_of(chosen: NDArray[np.intp]) -> NDArray[np.str_]:
        return rows.sample_keys(ranked.rows[chosen])

    found = assign_copies(
        plan,
        ranked.labels,
        ranked.values,
        keys_of,
        lambda chosen: uniforms(
            inputs.stream, rows.key_hashes(ranked.rows[chosen]), block=Block.BALANCE
        ),
    )
    reason = np.full(rows.num_samples, Reason.BELOW_THRESHOLD, dtype=np.int8)
    reason[ranked.rows] = Reason.OVER_QUOTA
    taken = np.flatnonzero(found > 0)  # numbers, which pick faster than a mask
    reason[ranked.rows[taken]] = Reason.KEPT
    if rows.turned_down is not None:
        reason = np.where(rows.turned_down == Reason.KEPT, reason, rows.turned_down)
    if classes_per_image(config.balance) > 1:
        selection = Selection.of_several(
            rows.in_shard_keys(),
            reason=reason,
            weight=rows.weights(inputs.weighting),
            label=rows.labels,
            rows=ranked.rows[taken],
            classes=ranked.labels[taken],
        )
        return selection, ranked.labels[taken]
    copies = np.zeros(rows.num_samples, dtype=np.uint16)
    copies[ranked.rows] = found
    log_probs = class_ids = rest_mass = None
    if config.target == "soft":
        log_probs, class_ids, rest_mass = rows.soft_targets()
    selection = Selection.of(
        rows.in_shard_keys(),
        reason=reason,
        copies=copies,
        weight=rows.weights(inputs.weighting),
        label=rows.labels,
        log_probs=log_probs,
        class_ids=class_ids,
        rest_mass=rest_mass,
    )
    return selection, None
