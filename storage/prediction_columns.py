"""Some columns of the predictions of one shard: what the passes over a large corpus read.

A planning pass reads a few bytes a row of files that hold hundreds: their pages alone, each
checked by the checksum that the file holds for it. That a file is the one that its record names is
checked by its sha256 where it is read whole: by the pass that writes from it, so before anything
that came of it is committed.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.key_columns import KeyColumn
from storage.manifest import StoredObject, read_stored
from storage.parquet_files import column, matrix, open_table
from storage.prediction_files import predictions_schema
from storage.prediction_values import Form, Listed
from storage.store import CorruptObject, Store

_LISTS = ("class_ids", "log_probs")


class DamagedPredictions(CorruptObject):
    """Predictions that were recorded are lost, or not what was written.

    Labelling the shard again mends them: see `storage/damaged_predictions.py`.
    """


@contextmanager
def telling_damage() -> Generator[None]:
    """Raise DamagedPredictions where a file of predictions is not there or has other bytes."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedPredictions(f"recorded predictions are lost: {error}") from error
    except CorruptObject as error:
        raise DamagedPredictions(str(error)) from error


@dataclass(frozen=True, slots=True)
class PredictionReference:
    """Where the predictions of a shard are, and what is in them.

    Attributes:
        stored: the file.
        num_samples: N.
        num_classes: C.
        k: classes listed of each row; None in the full form.
        optional: which of the optional columns there are.
    """

    stored: StoredObject
    num_samples: int
    num_classes: int
    k: int | None
    optional: tuple[str, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "PredictionReference":
        """Take it out of a record."""
        return cls(
            StoredObject(**record["object"]),
            record["num_samples"],
            record["num_classes"],
            record.get("k"),
            tuple(record.get("optional", ())),
        )

    @property
    def shard(self) -> str:
        """Digest of the shard, which names the file."""
        return self.stored.name

    @property
    def form(self) -> Form:
        """How probabilities are stored."""
        return "full" if self.k is None else "top_k"


class PredictionColumns:
    """The columns of one shard's predictions, each read when it is asked for."""

    def __init__(self, store: Store, reference: PredictionReference, *, verify: bool) -> None:
        """Open the file.

        Args:
            store: where it is.
            reference: of it.
            verify: read it whole and check its sha256, not the checksums of its pages alone.
        Raises: DamagedPredictions; ValueError for another schema or count.
        """
        self.reference = reference
        schema = predictions_schema(
            reference.num_classes, k=reference.k, optional=reference.optional
        )
        self._names: list[str] = schema.names
        with telling_damage():
            whole = read_stored(store, reference.stored) if verify else None
            self._file = open_table(
                store, reference.stored, whole, schema=schema, num_rows=reference.num_samples
            )
        self._where = store.url_of(reference.stored.path)

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        """Return name -> column: `key` as a `KeyColumn`, others of one value a row as (N,) arrays.

        Raises: DamagedPredictions; ValueError for a column that is not there, and for lists: see
            `probabilities`.
        """
        if unknown := [name for name in names if name not in self._names or name in _LISTS]:
            known = [name for name in self._names if name not in _LISTS]
            raise ValueError(f"{self._where}: unknown columns {unknown}; there are {known}")
        table = self._read(names)
        return {
            name: KeyColumn(table.column(name)) if name == "key" else column(table, name)
            for name in names
        }

    def probabilities(self) -> tuple[NDArray[np.float16], Listed | None]:
        """Return the log-probabilities, (N, C) or (N, k), and the classes of the latter."""
        k = self.reference.k
        if k is None:
            return matrix(self._read(["log_probs"]), "log_probs"), None
        table = self._read(["class_ids", "log_probs", "rest_mass"])
        listed = Listed(
            matrix(table, "class_ids"), column(table, "rest_mass"), self.reference.num_classes
        )
        return matrix(table, "log_probs"), listed

    def _read(self, names: Sequence[str]) -> Any:
        with telling_damage():
            return self._file.read(names)


def read_columns(
    store: Store, record: Mapping[str, Any], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Read some columns of a shard's predictions, each (N,), without the rest of the file.

    `key` is an array of str objects. The optional ones and `rest_mass` are known where the record's
    predictions have them. `class_ids` and `log_probs` are refused: see `PredictionColumns`.
    """
    found = PredictionColumns(store, PredictionReference.of(record), verify=False).read(names)
    if "key" in found:
        found["key"] = np.array(list(found["key"]), dtype=object)
    return found
