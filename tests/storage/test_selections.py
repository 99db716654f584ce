"""Tests of stored selections: hard and soft targets, deterministic bytes, contradictions."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.selections import Reason, Selection, check_selection, from_parquet, to_parquet

KEYS = ("a", "b", "c", "d")
REASON = np.array([0, 1, 0, 2])
LOG_PROBS = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.125, 0.75, 0.125], [1, 1, 1]]))


def hard(**changes):
    selection = Selection.of(
        KEYS,
        reason=REASON,
        copies=np.array([1, 5, 3, 1]),
        weight=np.array([1.0, 1.0, 0.5, 1.0]),
        label=np.array([0, 2, 1, 0]),
    )
    return replace(selection, **changes)


def soft():
    return Selection.of(
        KEYS,
        reason=REASON,
        copies=np.ones(4, np.int64),
        weight=np.ones(4),
        label=np.array([0, 2, 1, 0]),
        log_probs=LOG_PROBS,
    )


def sparse():
    return Selection(
        keys=("a", "b"),
        kept=np.array([True, True]),
        reason=np.zeros(2, np.int8),
        copies=np.ones(2, np.uint16),
        weight=np.ones(2, np.float32),
        label=np.array([3, 1], np.uint32),
        target_offsets=np.array([0, 2, 2], np.int64),
        target_ids=np.array([3, 0], np.uint32),
        target_log_probs=np.log(np.array([0.5, 0.25])).astype(np.float16),
        rest_mass=np.array([0.25, 0], np.float32),
    )


def several():
    return Selection.of_several(
        KEYS,
        reason=REASON,
        weight=np.ones(4),
        label=np.array([0, 2, 1, 0]),
        rows=np.array([0, 2, 2]),
        classes=np.array([2, 1, 0]),
    )


def assert_equal(a, b):
    assert a.keys == b.keys
    for name in Selection.__dataclass_fields__:
        if name != "keys":
            assert getattr(a, name).dtype == getattr(b, name).dtype, name
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("make", [hard, soft, sparse, several])
def test_selection_reads_back_bit_for_bit(make):
    selection = make()
    data = to_parquet(selection)
    assert_equal(from_parquet(data, num_samples=selection.num_samples), selection)
    assert to_parquet(make()) == data


def test_empty_selection_reads_back():
    none = np.zeros(0, np.int64)
    empty = Selection.of((), reason=none, copies=none, weight=np.zeros(0), label=none)
    assert from_parquet(to_parquet(empty), num_samples=0).num_samples == 0


def test_what_is_not_kept_has_no_copies_no_weight_and_no_target():
    selection = soft()
    assert selection.kept.tolist() == [True, False, True, False]
    assert selection.copies.tolist() == [1, 0, 1, 0]
    assert selection.weight.tolist() == [1, 0, 1, 0]
    assert selection.target_offsets.tolist() == [0, 3, 3, 6, 6]
    assert selection.reason_counts() == {"kept": 2, "below_threshold": 1, "over_quota": 1}


def test_dense_targets_of_hard_soft_and_sparse_rows():
    np.testing.assert_array_equal(
        hard().dense_targets(3), [[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    )
    np.testing.assert_allclose(
        soft().dense_targets(3)[[0, 2]], [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], atol=1e-3
    )
    # Row a: 0.5 on class 3, 0.25 on class 0; the rest 0.25 is shared by classes 1, 2 and 4.
    np.testing.assert_allclose(
        sparse().dense_targets(5),
        [[0.25, 0.25 / 3, 0.25 / 3, 0.5, 0.25 / 3], [0, 1, 0, 0, 0]],
        atol=1e-3,
    )


ALWAYS = ["key: string", "reason: int8", "copies: uint16", "label: uint32"]
TARGETS = [
    "target_ids: list<element: uint32 not null>",
    "target_log_probs: list<element: halffloat not null>",
    "rest_mass: float",
]


@pytest.mark.parametrize(
    ("selection", "optional"),
    [
        (hard(), ["weight: float"]),
        (hard(weight=np.array([1, 0, 1, 0], np.float32)), []),
        (soft(), TARGETS),
        (several(), TARGETS),
    ],
)
def test_schema_is_the_documented_one_and_carries_its_version(selection, optional):
    schema = pq.read_schema(pa.BufferReader(to_parquet(selection)))
    assert [f"{f.name}: {f.type}" for f in schema] == ALWAYS + optional
    assert not any(field.nullable for field in schema)
    assert schema.metadata[b"selftrain.selection"] == b"2"


@pytest.mark.parametrize("make", [hard, soft, sparse])
def test_file_of_version_1_is_read(make):
    selection = make()
    lists = pa.list_(pa.field("element", pa.uint32(), nullable=False))
    halves = pa.list_(pa.field("element", pa.float16(), nullable=False))
    offsets = pa.array(selection.target_offsets.astype(np.int32))
    columns = {
        "key": pa.array(selection.keys),
        "kept": pa.array(selection.kept),
        **{name: pa.array(getattr(selection, name)) for name in ("reason", "copies", "weight")},
        "label": pa.array(selection.label),
        "target_ids": pa.ListArray.from_arrays(offsets, pa.array(selection.target_ids), type=lists),
        "target_log_probs": pa.ListArray.from_arrays(
            offsets, pa.array(selection.target_log_probs), type=halves
        ),
        "rest_mass": pa.array(selection.rest_mass),
    }
    fields = [pa.field(name, values.type, nullable=False) for name, values in columns.items()]
    schema = pa.schema(fields, metadata={"selftrain.selection": "1"})
    file = pa.BufferOutputStream()
    pq.write_table(pa.table(list(columns.values()), schema=schema), file)
    read = from_parquet(file.getvalue().to_pybytes(), num_samples=selection.num_samples)
    assert_equal(read, selection)


def test_numbers_of_reasons_never_change():
    assert {r.name: int(r) for r in Reason} == {
        "KEPT": 0,
        "BELOW_THRESHOLD": 1,
        "OVER_QUOTA": 2,
        "LEAKED": 3,
        "OUT_OF_DOMAIN": 4,
        "QUARANTINED": 5,
    }


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (hard(kept=np.array([True, True, True, False])), "kept contradicts the reason.*key 'b'"),
        (hard(copies=np.array([0, 0, 3, 0], np.uint16)), "copies must be at least 1.*key 'a'"),
        (hard(copies=np.array([1, 1, 3, 0], np.uint16)), "copies must be at least 1.*key 'b'"),
        (hard(weight=np.array([1, 0, np.nan, 0], np.float32)), "weight.*key 'c'"),
        (hard(weight=np.array([1, 0, -1, 0], np.float32)), "weight"),
        (hard(reason=np.array([0, 1, 0, 99], np.int8)), "reason is unknown"),
        (hard(rest_mass=np.array([0, 0, 2, 0], np.float32)), "rest mass"),
        (hard(keys=("a", "b", "a", "d")), "unique"),
        (hard(copies=np.ones(3, np.uint16)), r"copies must be \(4,\) uint16"),
        (hard(weight=np.ones(4)), r"weight must be \(4,\) float"),
        (hard(target_offsets=np.array([0, 1, 1, 1, 1])), "targets must have 1 ids"),
        (hard(target_offsets=np.array([0, 1, 0, 0, 0])), "must not decrease"),
        (replace(sparse(), target_log_probs=np.array([0.1, np.nan], np.float16)), "at most 0"),
    ],
)
def test_selection_that_contradicts_itself_is_refused(selection, message):
    with pytest.raises(ValueError, match=message):
        check_selection(selection)
    with pytest.raises(ValueError, match=message):
        to_parquet(selection)


def test_other_count_is_refused():
    with pytest.raises(ValueError, match="selection: 4 rows, not 5"):
        from_parquet(to_parquet(hard()), num_samples=5)


def test_predictions_are_not_taken_for_a_selection():
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        from_parquet(b"PAR1 nonsense PAR1", num_samples=1)
