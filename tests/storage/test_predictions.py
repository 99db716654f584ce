"""Tests of stored predictions: exact values, deterministic bytes, refusals, one truth."""

import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import prediction_files as module
from storage.manifest import ManifestMismatch, UnknownSchema, create_record
from storage.objects import CorruptObject
from storage.predictions import (
    Listed,
    Predictions,
    check_predictions,
    from_parquet,
    predictions_schema,
    probability_sums,
    read_columns,
    read_predictions,
    read_record,
    record_path,
    to_parquet,
    write_predictions,
)
from storage.store import open_store

LABELER = "f" * 64
SHARD = "a" * 64


def make(n=5, c=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, c)).astype(np.float32) * 3
    logsumexp = np.log(np.exp(logits).sum(axis=1))
    log_probs = logits - logsumexp[:, None]
    probs = np.exp(log_probs)
    ranked = np.sort(probs, axis=1)
    return Predictions(
        keys=tuple(f"d/{i:03d}" for i in range(n)),
        label=probs.argmax(axis=1).astype(np.uint32),
        confidence=ranked[:, -1].astype(np.float32),
        margin=(ranked[:, -1] - ranked[:, -2]).astype(np.float32),
        entropy=(-(probs * log_probs).sum(axis=1)).astype(np.float32),
        log_probs=log_probs.astype(np.float16),
        logsumexp=logsumexp.astype(np.float32),
        true_label=np.array([-1, *range(n - 1)], np.int32) % c if n else np.zeros(0, np.int32),
    )


def assert_equal(a, b):
    assert a.keys == b.keys
    for name in ("label", "confidence", "margin", "entropy", "log_probs", "logsumexp"):
        assert getattr(a, name).dtype == getattr(b, name).dtype
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.true_label, b.true_label)
    assert a.optional == b.optional
    for name in a.optional:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.form, a.k, a.num_classes) == (b.form, b.k, b.num_classes)
    if a.listed is not None:
        for name in ("class_ids", "rest_mass"):
            assert getattr(a.listed, name).dtype == getattr(b.listed, name).dtype
            np.testing.assert_array_equal(getattr(a.listed, name), getattr(b.listed, name))


def make_top_k(n=5, c=300, k=3, seed=0):
    p = make(n, c, seed)
    ids = np.argsort(-p.log_probs, axis=1, kind="stable")[:, :k]
    if n:
        ids[:, 0] = p.label
    log_probs = np.take_along_axis(p.log_probs, ids, axis=1)
    rest = np.maximum(1 - np.exp(log_probs.astype(np.float64)).sum(axis=1), 0)
    listed = Listed(ids.astype(np.uint32), rest.astype(np.float32), c)
    return replace(p, log_probs=log_probs, listed=listed)


def with_uncertainty(p):
    return replace(p, uncertainty=np.linspace(0, 0.5, p.num_samples, dtype=np.float32))


def with_both(p):
    return replace(with_uncertainty(p), agreement=np.ones(p.num_samples, np.float32))


SUMS = np.arange(600, dtype=np.int64).reshape(2, 300) << 30


@pytest.mark.parametrize(("n", "c"), [(5, 4), (1, 2), (0, 3), (300, 256)])
def test_predictions_read_back_bit_for_bit(n, c):
    p = make(n, c)
    assert_equal(from_parquet(to_parquet(p), num_samples=n, num_classes=c, where="x"), p)


@pytest.mark.parametrize(("n", "k"), [(5, 3), (0, 3), (40, 1), (7, 300)])
@pytest.mark.parametrize("optional", [lambda p: p, with_uncertainty, with_both])
def test_top_k_predictions_read_back_bit_for_bit(n, k, optional):
    p = optional(make_top_k(n, k=k))
    found = from_parquet(
        to_parquet(p),
        num_samples=n,
        num_classes=300,
        where="x",
        k=k,
        optional=p.optional,
    )
    assert_equal(found, p)


def test_the_full_form_without_uncertainty_keeps_its_bytes():
    # sha256 of the file that the version before the top_k form wrote of the same predictions.
    digest = hashlib.sha256(to_parquet(make())).hexdigest()
    assert digest == "5ad541dc15e87ce71bf09d120a6355f02d87bea6d02ebe3c614cac06cbb7eeed"


def test_a_file_of_one_form_is_not_read_as_another():
    with pytest.raises(ValueError, match="x: columns"):
        from_parquet(to_parquet(make_top_k()), num_samples=5, num_classes=300, where="x")
    with pytest.raises(ValueError, match="x: columns"):
        from_parquet(to_parquet(make_top_k()), num_samples=5, num_classes=300, where="x", k=4)
    with pytest.raises(ValueError, match="x: columns"):
        from_parquet(to_parquet(with_uncertainty(make())), num_samples=5, num_classes=4, where="x")


def test_equal_predictions_give_equal_bytes():
    assert to_parquet(make()) == to_parquet(make())
    assert to_parquet(make()) != to_parquet(make(seed=1))


def test_schema_is_the_documented_one_and_carries_its_version():
    schema = predictions_schema(10)
    assert [f"{f.name}: {f.type}" for f in schema] == [
        "key: string",
        "label: uint32",
        "confidence: float",
        "margin: float",
        "entropy: float",
        "log_probs: fixed_size_list<element: halffloat not null>[10]",
        "logsumexp: float",
        "true_label: int32",
    ]
    assert not any(f.nullable for f in schema)
    assert schema.metadata == {b"selftrain.predictions": b"1"}


def test_schema_of_the_top_k_form_is_the_documented_one():
    schema = predictions_schema(1000, k=10, optional=("uncertainty", "agreement"))
    assert [f"{f.name}: {f.type}" for f in schema] == [
        "key: string",
        "label: uint32",
        "confidence: float",
        "margin: float",
        "entropy: float",
        "class_ids: fixed_size_list<element: uint32 not null>[10]",
        "log_probs: fixed_size_list<element: halffloat not null>[10]",
        "rest_mass: float",
        "logsumexp: float",
        "true_label: int32",
        "uncertainty: float",
        "agreement: float",
    ]
    assert not any(f.nullable for f in schema)
    assert schema.metadata == {
        b"selftrain.predictions.top_k": b"1",
        b"selftrain.predictions.uncertainty": b"1",
        b"selftrain.predictions.agreement": b"1",
    }


def changed(**columns):
    p = make()
    return replace(p, **{k: np.asarray(v, getattr(p, k).dtype) for k, v in columns.items()})


def with_value(name, value, row=2):
    values = getattr(make(), name).copy()
    values[row] = value
    return changed(**{name: values})


def listed_with(**values):
    """Row 1 of the top_k form with another rest mass or another last class."""
    p = make_top_k()
    assert p.listed is not None
    ((name, value),) = values.items()
    array = getattr(p.listed, name).copy()
    array.reshape(5, -1)[1, -1] = value
    return replace(p, listed=replace(p.listed, **{name: array}))


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (with_value("confidence", np.nan), "NaN or infinite; first key 'd/002'"),
        (with_value("entropy", np.inf), "NaN or infinite"),
        (with_value("logsumexp", np.nan), "NaN or infinite"),
        (with_value("log_probs", np.nan), "NaN or infinite"),
        (with_value("log_probs", [0, -np.inf, -np.inf, -np.inf]), "NaN or infinite"),
        (with_value("log_probs", [-1, -1, -1, -3]), "do not sum to 1"),
        (with_value("label", 4), "label is not below 4"),
        (with_value("true_label", 4), "true label is not a class"),
        (with_value("true_label", -2), "true label is not a class"),
        (with_value("confidence", 1.5), "confidence is not in"),
        (with_value("confidence", -0.1), "confidence is not in"),
        (with_value("margin", -0.1), "margin is not in"),
        (with_value("entropy", -0.5), "entropy is negative"),
        (replace(make(), keys=("a", "b", "a", "c", "d")), "'a' is not"),
        (replace(make(), keys=("a", "b", "", "c", "d")), "unique and not empty"),
        (replace(make(), keys=("a", "b")), r"log_probs must be \(2, C\)"),
        (replace(make(), label=np.zeros(4, np.uint32)), r"label must be \(5,\) uint32"),
        (replace(make(), confidence=np.zeros(5)), r"confidence must be \(5,\) float"),
        (replace(make(), log_probs=make().log_probs.astype(np.float32)), "float16"),
        (replace(make(), uncertainty=np.full(5, -0.1, np.float32)), "uncertainty is negative"),
        (replace(make(), uncertainty=np.full(5, np.nan, np.float32)), "NaN or infinite"),
        (replace(make(), agreement=np.full(5, 1.5, np.float32)), "agreement is not in"),
        (replace(make(), uncertainty=np.zeros(4, np.float32)), r"uncertainty must be \(5,\)"),
        (listed_with(class_ids=300), "listed class is not a class"),
        (listed_with(class_ids=make_top_k().label[1]), "listed twice"),
        (replace(make_top_k(), label=make_top_k().label + 1), "not the label"),
        (listed_with(rest_mass=-0.1), "rest mass is not in"),
        (listed_with(rest_mass=np.nan), "NaN or infinite"),
        (listed_with(rest_mass=0.99), "do not sum to 1"),
    ],
)
def test_bad_predictions_are_refused_before_they_are_written(predictions, message):
    with pytest.raises(ValueError, match=message):
        check_predictions(predictions)
    with pytest.raises(ValueError, match=message):
        to_parquet(predictions)


def test_other_count_or_classes_than_the_record_says_are_refused():
    data = to_parquet(make())
    with pytest.raises(ValueError, match="x: 5 rows, not 6"):
        from_parquet(data, num_samples=6, num_classes=4, where="x")
    with pytest.raises(ValueError, match="x: columns"):
        from_parquet(data, num_samples=5, num_classes=5, where="x")


def test_bad_values_are_refused_on_reading_too(monkeypatch):
    monkeypatch.setattr(module, "check_predictions", lambda p: None)
    data = to_parquet(with_value("confidence", np.nan))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="x: 1 of 5 predictions are refused"):
        from_parquet(data, num_samples=5, num_classes=4, where="x")


def test_file_of_another_version_is_refused():
    table = pq.read_table(pa.BufferReader(to_parquet(make())))
    newer = table.replace_schema_metadata({"selftrain.predictions": "2"})
    sink = pa.BufferOutputStream()
    pq.write_table(newer, sink)
    with pytest.raises(ValueError, match=r"version .*2.*upgrade selftrain"):
        from_parquet(sink.getvalue().to_pybytes(), num_samples=5, num_classes=4, where="x")


def test_one_flipped_bit_anywhere_is_an_error_or_harmless():
    whole = to_parquet(make(40, 8))
    expected = make(40, 8)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 60):
        data = bytearray(whole)
        data[position] ^= 1 << int(rng.integers(8))
        try:
            found = from_parquet(bytes(data), num_samples=40, num_classes=8, where="x")
        except ValueError:
            continue
        assert_equal(found, expected)


def test_written_predictions_read_back_through_their_record(tmp_path):
    store = open_store(str(tmp_path))
    assert read_record(store, LABELER, SHARD) is None
    record = write_predictions(store, LABELER, SHARD, make(), {"bad_images": 0})
    assert record["num_samples"] == 5
    assert record["facts"] == {"bad_images": 0}
    assert record["object"]["path"].startswith(f"predictions/{LABELER}/{SHARD}-")
    assert read_record(store, LABELER, SHARD) == record
    assert_equal(read_predictions(store, record), make())
    assert store.list("predictions") == sorted(
        [f"predictions/{LABELER}/{SHARD}.json", record["object"]["path"]]
    )


def test_of_two_writers_the_first_record_is_the_truth_for_both(tmp_path):
    store = open_store(str(tmp_path))
    first = write_predictions(store, LABELER, SHARD, make(seed=0), {})
    second = write_predictions(store, LABELER, SHARD, make(seed=1), {})
    assert second == first
    assert_equal(read_predictions(store, second), make(seed=0))


def test_damaged_object_is_refused(tmp_path):
    store = open_store(str(tmp_path))
    record = write_predictions(store, LABELER, SHARD, make(), {})
    path = tmp_path / record["object"]["path"]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptObject):
        read_predictions(store, record)


def test_record_of_another_shard_is_refused(tmp_path):
    store = open_store(str(tmp_path))
    write_predictions(store, LABELER, SHARD, make(), {})
    moved = store.read(record_path(LABELER, SHARD))
    store.create(record_path(LABELER, "b" * 64), moved)
    with pytest.raises(ManifestMismatch, match="shard is 'aaa"):
        read_record(store, LABELER, "b" * 64)


def test_record_of_another_labeler_is_refused(tmp_path):
    store = open_store(str(tmp_path))
    write_predictions(store, LABELER, SHARD, make(), {})
    moved = store.read(record_path(LABELER, SHARD))
    store.create(record_path("e" * 64, SHARD), moved)
    with pytest.raises(ManifestMismatch, match="labeler is 'fff"):
        read_record(store, "e" * 64, SHARD)


def test_record_of_a_newer_version_is_refused(tmp_path):
    store = open_store(str(tmp_path))
    create_record(store, record_path(LABELER, SHARD), {"schema": 3})
    with pytest.raises(UnknownSchema):
        read_record(store, LABELER, SHARD)


def test_single_columns_are_read_without_the_rest(tmp_path):
    store = open_store(str(tmp_path))
    record = write_predictions(store, LABELER, SHARD, make(), {})
    columns = read_columns(store, record, ["label", "confidence", "key"])
    assert list(columns) == ["label", "confidence", "key"]
    np.testing.assert_array_equal(columns["label"], make().label)
    np.testing.assert_array_equal(columns["confidence"], make().confidence)
    assert columns["key"].tolist() == list(make().keys)
    with pytest.raises(ValueError, match=r"unknown columns \['log_probs'\]"):
        read_columns(store, record, ["log_probs"])


def test_half_floats_of_many_classes_pass_the_check_of_sums():
    for scale in (0.1, 1, 5, 20):
        rng = np.random.default_rng(3)
        logits = rng.normal(size=(200, 256)) * scale
        log_probs = logits - np.log(np.exp(logits).sum(axis=1))[:, None]
        p = make(200, 256)
        check_predictions(replace(p, log_probs=log_probs.astype(np.float16)))


def test_top_k_record_gives_back_the_exact_sums_and_uncertainty(tmp_path):
    store = open_store(str(tmp_path))
    p = with_uncertainty(make_top_k())
    record = write_predictions(store, LABELER, SHARD, p, {}, prob_sums=SUMS)
    assert (record["schema"], record["k"], record["optional"]) == (2, 3, ["uncertainty"])
    again = read_record(store, LABELER, SHARD)
    assert again is not None
    np.testing.assert_array_equal(probability_sums(again), SUMS)
    assert_equal(read_predictions(store, record), p)
    columns = read_columns(store, record, ["uncertainty", "rest_mass"])
    np.testing.assert_array_equal(columns["uncertainty"], p.uncertainty)
    assert p.listed is not None
    np.testing.assert_array_equal(columns["rest_mass"], p.listed.rest_mass)


def test_a_full_record_has_no_new_fields(tmp_path):
    record = write_predictions(open_store(str(tmp_path)), LABELER, SHARD, make(), {})
    assert sorted(record) == [
        *("facts", "labeler", "num_classes", "num_samples", "object", "schema", "shard")
    ]
    assert record["schema"] == 1
    assert probability_sums(record) is None


def test_sums_and_form_must_fit(tmp_path):
    store = open_store(str(tmp_path))
    with pytest.raises(ValueError, match="are top_k, and sums are missing"):
        write_predictions(store, LABELER, SHARD, make_top_k(), {})
    with pytest.raises(ValueError, match="are full, and sums are given"):
        write_predictions(store, LABELER, SHARD, make(), {}, prob_sums=SUMS)
    with pytest.raises(ValueError, match=r"prob_sums must be \(2, 300\) int64"):
        write_predictions(store, LABELER, SHARD, make_top_k(), {}, prob_sums=SUMS[:, :4])
