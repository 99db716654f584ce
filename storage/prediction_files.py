"""Predictions as Parquet: one schema per form, each with a version of its own."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from storage.parquet_files import (
    arrow,
    column,
    fixed_lists,
    matrix,
    read_table,
    write_table,
)
from storage.prediction_values import SCALARS, Listed, Predictions, check_predictions

SCHEMA_VERSION = 1
"""Of the full form without optional columns."""
TOP_K_VERSION = 1
OPTIONAL_VERSION = 1
"""Of each optional column."""

_SCHEMA: Any = arrow.schema(
    [
        arrow.field("key", arrow.string(), nullable=False),
        *(
            arrow.field(name, arrow.from_numpy_dtype(kind), nullable=False)
            for name, kind in SCALARS.items()
        ),
    ]
)
"""The columns that every form has, of one value a row."""

_LISTS_AT = 5  # before logsumexp


def predictions_schema(
    num_classes: int, *, k: int | None = None, optional: Sequence[str] = ()
) -> Any:
    """Return the Parquet schema; of one kind the same object each time.

    Args:
        num_classes: C.
        k: classes listed of each row; None for the full form.
        optional: which of the optional columns there are.
    """
    return _schema(num_classes, k, tuple(optional))


@lru_cache(maxsize=64)
def _schema(num_classes: int, k: int | None, optional: tuple[str, ...]) -> Any:
    versions: dict[str, str] = {"selftrain.predictions": str(SCHEMA_VERSION)}
    schema = _SCHEMA
    if k is None:
        schema = schema.insert(_LISTS_AT, _list_field("log_probs", arrow.float16(), num_classes))
    else:
        versions = {"selftrain.predictions.top_k": str(TOP_K_VERSION)}
        rest = arrow.field("rest_mass", arrow.float32(), nullable=False)
        schema = (
            schema.insert(_LISTS_AT, _list_field("class_ids", arrow.uint32(), k))
            .insert(_LISTS_AT + 1, _list_field("log_probs", arrow.float16(), k))
            .insert(_LISTS_AT + 2, rest)
        )
    for name in optional:
        versions[f"selftrain.predictions.{name}"] = str(OPTIONAL_VERSION)
        schema = schema.append(arrow.field(name, arrow.float32(), nullable=False))
    return schema.with_metadata(versions)


def to_parquet(predictions: Predictions) -> bytes:
    """Return the file's bytes, the same for the same predictions."""
    check_predictions(predictions)
    p = predictions
    schema = predictions_schema(p.num_classes, k=p.k, optional=p.optional)
    columns: list[Any] = []
    for field in schema:
        values: Any = p.listed if field.name in ("class_ids", "rest_mass") else p
        if field.name == "key":
            columns.append(arrow.array(p.keys, type=field.type))
            continue
        array = getattr(values, field.name)
        if array.ndim == 2:
            columns.append(fixed_lists(array, field.type))
        else:
            columns.append(arrow.array(array, type=field.type))
    return write_table(arrow.Table.from_arrays(columns, schema=schema))


def from_parquet(
    data: bytes,
    *,
    num_samples: int,
    num_classes: int,
    where: str,
    k: int | None = None,
    optional: Sequence[str] = (),
) -> Predictions:
    """Read a file of that many rows and classes and of that form, and check it.

    Raises: ValueError, naming `where`, for another schema or count and for refused values.
    """
    schema = predictions_schema(num_classes, k=k, optional=optional)
    table = read_table(data, schema=schema, num_rows=num_samples, where=where)

    listed = None
    if k is not None:
        listed = Listed(matrix(table, "class_ids"), column(table, "rest_mass"), num_classes)
    predictions = Predictions(
        keys=tuple(cast("list[str]", table.column("key").to_pylist())),
        log_probs=matrix(table, "log_probs"),
        listed=listed,
        **{name: column(table, name) for name in (*SCALARS, *optional)},
    )
    try:
        check_predictions(predictions)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return predictions


def _list_field(name: str, kind: Any, length: int) -> Any:
    values = arrow.field("element", kind, nullable=False)
    return arrow.field(name, arrow.list_(values, length), nullable=False)
