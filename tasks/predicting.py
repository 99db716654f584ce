"""Raw samples through classifiers: decode ahead in threads, forward batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.top_k_probs import cut_to_top_k
from storage.predictions import Listed, Predictions
from storage.samples import RawSample, in_shard_key
from tasks.decode_processes import view_batches_from_processes
from tasks.decoding import decode_threads
from tasks.ensembles import BatchPrediction, Ensemble
from tasks.overlapping import taken_ahead
from tasks.shard_items import BadSampleBudget
from tasks.view_batches import OpenShard, view_batches


class Cut(NamedTuple):
    """How whole distributions become the top_k form."""

    k: int
    temperature: float


@dataclass(frozen=True)
class Predicted:
    """What a classifier says of the decodable samples of one shard, in the shard's order.

    Attributes:
        keys: N in-shard keys.
        labels: N labels of the `.cls` members, None where there is none.
        log_probs: (N, C) float32.
        logsumexp: (N,) float32 of the logits.
        uncertainty: (N,) float32, where it is measured.
        agreement: (N,) float32, where several predictions were made of every image.
    """

    keys: tuple[str, ...]
    labels: tuple[int | None, ...]
    log_probs: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None

    def to_predictions(
        self, true_labels: Sequence[int], *, cut: Cut | None = None
    ) -> tuple[Predictions, NDArray[np.int64] | None]:
        """Return what is stored, and the exact sum of the whole distributions where they are cut.

        Args:
            true_labels: in the run's class order, -1 unknown.
            cut: to the top_k form; None for the full form.
        """
        truth = np.asarray(true_labels, dtype=np.int32)
        if cut is None:
            return self._in_full(truth), None
        rows = cut_to_top_k(self.log_probs, temperature=cut.temperature, k=cut.k)
        predictions = Predictions(
            keys=self.keys,
            label=rows.class_ids[:, 0].astype(np.uint32),
            confidence=rows.confidences.astype(np.float32),
            margin=rows.margins.astype(np.float32),
            entropy=rows.entropies.astype(np.float32),
            log_probs=rows.log_probs.astype(np.float16),
            logsumexp=self.logsumexp,
            true_label=truth,
            listed=Listed(
                rows.class_ids.astype(np.uint32),
                rows.rest_mass.astype(np.float32),
                self.log_probs.shape[1],
            ),
            uncertainty=self.uncertainty,
            agreement=self.agreement,
        )
        return predictions, rows.sums

    def _in_full(self, true_label: NDArray[np.int32]) -> Predictions:
        probs = np.exp(self.log_probs)
        top_two = np.partition(probs, -2, axis=1)[:, -2:]  # (N, C) -> (N, 2), ascending
        return Predictions(
            keys=self.keys,
            label=self.log_probs.argmax(axis=1).astype(np.uint32),
            confidence=top_two[:, 1],
            margin=top_two[:, 1] - top_two[:, 0],
            entropy=np.maximum(-(probs * self.log_probs).sum(axis=1), 0),
            log_probs=self.log_probs.astype(np.float16),
            logsumexp=self.logsumexp,
            true_label=true_label,
            uncertainty=self.uncertainty,
            agreement=self.agreement,
        )


def predict_shards(
    shards: Iterable[OpenShard],
    ensemble: Ensemble,
    *,
    batch_size: int,
    decode_processes: int = 0,
) -> Iterator[tuple[OpenShard, Predicted]]:
    """Predict every decodable sample, shard by shard.

    Batches are cut by position in the shard, so that a run that skips a shard computes the same
    bits for the others. Undecodable samples are counted in the shard's budget and left out.

    Args:
        shards: in the order in which they come back.
        ensemble: who predicts.
        batch_size: samples of a batch.
        decode_processes: children of this process that decode; 0: it decodes itself.
    Raises: TooManyBadSamples; ValueError if a model gives NaN.
    """
    is_beside_gpu = ensemble.device.type == "cuda"
    if decode_processes:
        # Put together while the network computes the one before.
        batches = taken_ahead(
            view_batches_from_processes(
                shards,
                ensemble.views,
                batch_size=batch_size,
                processes=decode_processes,
                is_pinned=is_beside_gpu,
            )
        )
    else:
        batches = view_batches(
            shards,
            ensemble.views,
            batch_size=batch_size,
            threads=decode_threads(ensemble.device),
            is_beside_gpu=is_beside_gpu,
        )
    kept: list[RawSample] = []
    predicted: list[BatchPrediction] = []
    for batch in batches:
        for key, error in batch.bad.items():
            batch.shard.budget.spend(key, error)
        kept.extend(batch.samples)
        if batch.views:
            predicted.append(
                ensemble.predict(
                    batch.views,
                    shard=batch.shard.digest,
                    batch=batch.number,
                    batch_size=batch_size,
                )
            )
        if batch.is_last:
            yield batch.shard, _joined(batch.shard, kept, ensemble.joined(predicted))
            kept, predicted = [], []


def predict_samples(
    samples: Sequence[RawSample],
    ensemble: Ensemble,
    *,
    shard: str,
    batch_size: int,
    budget: BadSampleBudget,
) -> Predicted:
    """Predict one shard, as `predict_shards` does; `shard` is its digest."""
    opened = OpenShard(shard, samples, budget)
    ((_, predicted),) = predict_shards([opened], ensemble, batch_size=batch_size)
    return predicted


def _joined(shard: OpenShard, kept: Sequence[RawSample], together: BatchPrediction) -> Predicted:
    return Predicted(
        keys=tuple(in_shard_key(sample.key, shard.budget.stem) for sample in kept),
        labels=tuple(sample.label for sample in kept),
        log_probs=together.log_probs,
        logsumexp=together.logsumexp,
        uncertainty=together.uncertainty,
        agreement=together.agreement,
    )
