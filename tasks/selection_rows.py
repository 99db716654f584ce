"""The predictions of one shard as a pass of a selection sees them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from models.balancing import BalanceConfig, classes_per_image, ranking, ranks_by_uncertainty
from models.randomness import hash_utf8_keys
from models.thresholds import FinishedThresholds, reaches_thresholds
from models.top_k_probs import TopKProbs
from models.weighting import FinishedWeighting, SoftMatchWeights, weights_of
from storage.key_columns import KeyColumn
from storage.prediction_columns import PredictionColumns, PredictionReference
from storage.samples import sample_key
from storage.selections import Reason
from storage.store import Store
from tasks.distributions import Calibration, Distributions, most_probable
from tasks.kept_arrays import KeptArrays
from tasks.ranked_shard import Ranked, RankedShard
from tasks.selection_gates import NO_GATES, Gates, outputs_of

Step = Literal["gate", "calibrate", "debias", "threshold", "weight", "balance", "write"]
STEPS: tuple[Step, ...] = get_args(Step)
"""The order of selection: what is dropped must not count in what comes after it."""


@dataclass(frozen=True)
class SelectionInputs:
    """What every pass over the shards needs to know, with what the steps so far have found.

    Attributes:
        corpus: digest of the labelled corpus.
        labeler: address of its predictions.
        num_classes: C.
        calibration: of the stored distributions, with what debiasing adds to them.
        stream: of the draws that round copies.
        round_index: of the selection.
        labeled_counts: (C,) labelled images of each class, where a rule reads them.
        thresholds: of the classes.
        weighting: how rows are weighted.
        shards: stem -> where its predictions are.
        gates: what is turned down before anything is counted.
        kept: where a pass keeps its `RankedShard`s for the next ones; None: nowhere.
        done: the steps so far, in their order.
    """

    corpus: str
    labeler: str
    num_classes: int
    calibration: Calibration
    stream: int
    round_index: int
    labeled_counts: NDArray[np.int64] | None = None
    thresholds: FinishedThresholds | None = None
    weighting: FinishedWeighting | None = None
    shards: Mapping[str, PredictionReference] = field(default_factory=dict, repr=False)
    gates: Gates = NO_GATES
    kept: KeptArrays | None = None
    done: tuple[Step, ...] = ()

    def of_shards(self, stems: Sequence[str]) -> "SelectionInputs":
        """Return what a pass over some of the shards needs to know: it may be sent to a process."""
        shards = {stem: self.shards[stem] for stem in stems}
        kept = None if self.kept is None else self.kept.of_shards(stems)
        return replace(self, shards=shards, gates=self.gates.of_shards(stems), kept=kept)

    def keeping_ranked(self, descriptor: int, balance: BalanceConfig) -> "SelectionInputs":
        """Return the inputs of passes that keep what they rank in an open, empty file."""
        row_bytes = RankedShard.most_bytes_of_a_row(balance)
        most_bytes = ((stem, row_bytes * shard.num_samples) for stem, shard in self.shards.items())
        return replace(self, kept=KeptArrays.of(descriptor, most_bytes))

    def ranked_before(self, stem: str) -> RankedShard | None:
        """Return what an earlier pass found of a shard, where that was kept."""
        arrays = None if self.kept is None else self.kept.kept(stem)
        return None if arrays is None else RankedShard.of_arrays(arrays)

    def after(self, step: Step, **found: Any) -> "SelectionInputs":
        """Return the inputs with what a step found; steps come in their order only."""
        self.assert_next(step)
        return replace(self, done=(*self.done, step), **found)

    def assert_next(self, step: Step) -> None:
        """Assert that all steps before this one are done, and no other."""
        before = STEPS[: STEPS.index(step)]
        assert self.done == before, f"{step} comes after {before}, but {self.done} are done"


@dataclass
class Rows:
    """The predictions of one shard with what calibration and debiasing make of them.

    Distributions and keys are read only if a rule asks for them.

    Attributes:
        stem: of the shard.
        labels: (N,).
        confidences: (N,).
        columns: as stored.
        calibration: applied to them.
        keys: in-shard keys, once they were wanted.
        true_labels: (N,) int32, -1 unknown, where the rows are read to be written: for counts, once
            everything has been decided.
        uncertainty: (N,) float32, where it is stored.
        agreement: (N,) float32, where it is stored.
        turned_down: (N,) int8, the reason of a gate, KEPT where there is none; None for no row.
        before: what an earlier pass found of them.
    """

    stem: str
    labels: NDArray[np.integer]
    confidences: NDArray[np.floating]
    columns: PredictionColumns
    calibration: Calibration
    keys: KeyColumn | None = None
    true_labels: NDArray[np.int32] | None = None
    uncertainty: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None
    turned_down: NDArray[np.int8] | None = None
    before: RankedShard | None = None

    @classmethod
    def read(
        cls,
        store: Store,
        inputs: SelectionInputs,
        stem: str,
        *,
        to_write: bool = False,
    ) -> "Rows":
        """Read one shard's predictions, calibrate and debias them as far as is known.

        Where an earlier pass has done so for good, what it kept is taken.

        Args:
            store: where they are.
            inputs: of the selection.
            stem: of the shard.
            to_write: read all that a selection is written from, and check the sha256 of the whole
                file; else the checksums of what is read of it.
        """
        before = inputs.ranked_before(stem)
        names = ["label", "confidence"] if before is None else []
        names += ["key", "true_label"] if to_write else []
        names += inputs.shards[stem].optional
        columns = PredictionColumns(store, inputs.shards[stem], verify=to_write)
        found = columns.read(names)
        calibration = inputs.calibration
        if before is not None:
            labels, confidences = before.labels, before.confidences
        else:
            labels, confidences = found["label"], found["confidence"]
            if calibration.changes_confidences:
                labels, confidences = calibration.labels_and_confidences(
                    labels, confidences, *columns.probabilities()
                )

        def keys() -> KeyColumn:
            if "key" not in found:
                found.update(columns.read(["key"]))
            return found["key"]

        turned_down = inputs.gates.reasons(
            stem,
            keys=keys,
            outputs=lambda: outputs_of(columns),
        )
        return cls(
            stem,
            labels,
            confidences,
            columns,
            calibration,
            found.get("key"),
            found.get("true_label"),
            found.get("uncertainty"),
            found.get("agreement"),
            turned_down,
            before,
        )

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.labels)

    def in_shard_keys(self) -> KeyColumn:
        """Return the keys of all rows, read now if they were not before."""
        if self.keys is None:
            self.keys = cast("KeyColumn", self.columns.read(["key"])["key"])
        return self.keys

    def sample_keys(self, rows: NDArray[np.intp]) -> NDArray[np.str_]:
        """Return the sample keys of some rows."""
        if not len(rows):
            return np.zeros(0, dtype=np.str_)
        return sample_keys_of(self.stem, self.in_shard_keys(), rows)

    def key_hashes(self, rows: NDArray[np.intp]) -> NDArray[np.uint64]:
        """Return the hashes of the sample keys of some rows, see `models.randomness`."""
        before = sample_key(self.stem, "").encode()
        return hash_utf8_keys(self.in_shard_keys().utf8_of_rows(rows), prefix=before)

    def blocks(self) -> Iterator[tuple[slice, Distributions]]:
        """Yield the calibrated and debiased distributions, a few rows at a time."""
        return self.calibration.blocks(*self.columns.probabilities())

    @property
    def admitted(self) -> NDArray[np.intp] | slice:
        """The rows that no gate turned down: all that may be counted."""
        if self.turned_down is None:
            return slice(None)
        return np.flatnonzero(self.turned_down == Reason.KEPT)

    def admitted_blocks(self) -> Iterator[tuple[NDArray[np.intp] | slice, Distributions]]:
        """Yield row numbers and distributions of the admitted rows, a few at a time."""
        for rows, found in self.blocks():
            if self.turned_down is None:
                yield rows, found
                continue
            is_in = self.turned_down[rows] == Reason.KEPT
            some = found.only(is_in) if isinstance(found, TopKProbs) else found[is_in]
            yield rows.start + np.flatnonzero(is_in), some

    def passes(self, inputs: SelectionInputs) -> NDArray[np.bool_]:
        """Return which rows are admitted and reach the threshold, (N,)."""
        assert inputs.thresholds is not None, "the threshold comes before"
        passes = reaches_thresholds(
            inputs.thresholds,
            self.labels,
            self.confidences,
            uncertainty=self.uncertainty,
            agreement=self.agreement,
        )
        return passes if self.turned_down is None else passes & (self.turned_down == Reason.KEPT)

    def ranked(self, inputs: SelectionInputs, balance: BalanceConfig) -> RankedShard:
        """Return them with those that pass as a balancing rule ranks them."""
        if self.before is not None:
            return self.before
        passes, otherwise = self.passes(inputs), None
        if classes_per_image(balance) > 1 or ranks_by_uncertainty(balance):
            otherwise = self._ranked_otherwise(passes, balance)
        return RankedShard(self.labels, self.confidences, passes, otherwise)

    def _ranked_otherwise(self, passes: NDArray[np.bool_], balance: BalanceConfig) -> Ranked:
        count, passing = classes_per_image(balance), np.flatnonzero(passes)
        if count == 1:
            values = ranking(balance, self.confidences, self.uncertainty)
            return Ranked(passing, self.labels[passing], values[passing])
        classes = np.empty((self.num_samples, count), np.int64)
        probs = np.empty((self.num_samples, count), np.float32)
        for rows, found in self.blocks():
            classes[rows], probs[rows] = most_probable(found, count)
        return Ranked(
            np.repeat(passing, count), classes[passing].reshape(-1), probs[passing].reshape(-1)
        )

    def weights(self, weighting: FinishedWeighting) -> NDArray[np.float32]:
        """Return the weight of each row in the loss, (N,)."""
        if not isinstance(weighting, SoftMatchWeights):
            return weights_of(weighting, self.confidences, _not_asked, agreement=self.agreement)
        weights = [weighting.of(found) for _, found in self.blocks()]
        return np.concatenate([*weights, np.zeros(0, np.float32)])

    def soft_targets(
        self,
    ) -> tuple[NDArray[np.floating], NDArray[np.integer] | None, NDArray[np.floating] | None]:
        """Return what a student learns: log-probabilities, their classes, the rest mass.

        The teacher's own distribution, in the top_k form the calibrated one that was stored; where
        a step may change the class, the distribution that class and confidence are of, for a target
        must not contradict its label.
        """
        log_probs, listed = self.columns.probabilities()
        if not self.calibration.moves_labels:
            if listed is None:
                return log_probs, None, None
            return log_probs, listed.class_ids, listed.rest_mass
        parts = [found for _, found in self.calibration.blocks(log_probs, listed)]
        if listed is None:
            # Half floats at once: float64 of a whole shard would be four times the stored size.
            dense = [found.astype(np.float16) for found in parts if isinstance(found, np.ndarray)]
            return np.concatenate([*dense, log_probs[:0]]), None, None
        tops = [found for found in parts if isinstance(found, TopKProbs)]
        return (
            np.concatenate([*(found.log_probs for found in tops), log_probs[:0]]),
            np.concatenate([*(found.class_ids for found in tops), listed.class_ids[:0]]),
            np.concatenate([*(found.rest_mass for found in tops), listed.rest_mass[:0]]),
        )


def sample_keys_of(stem: str, keys: KeyColumn, rows: NDArray[np.intp]) -> NDArray[np.str_]:
    """Return the sample keys of some rows of a shard, from its in-shard keys."""
    return np.array([sample_key(stem, key) for key in keys.of_rows(rows)], dtype=np.str_)


def _not_asked() -> NDArray[np.floating]:
    raise AssertionError("only SoftMatch asks for log-probabilities")
