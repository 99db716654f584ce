"""Raw samples through a classifier: decode ahead in threads, forward batch by batch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.inference import log_probabilities
from models.top_k_probs import cut_to_top_k
from storage.predictions import Listed, Predictions
from storage.samples import RawSample, in_shard_key
from tasks.classifiers import StoredClassifier
from tasks.images import BadImage, clean_view, decode_pixels
from tasks.shard_items import BadSampleBudget

_DECODE_THREADS = 4
_BATCHES_AHEAD = 2


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
    """

    keys: tuple[str, ...]
    labels: tuple[int | None, ...]
    log_probs: NDArray[np.float32]
    logsumexp: NDArray[np.float32]

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
        )


def predict_samples(
    samples: Sequence[RawSample],
    classifier: StoredClassifier,
    *,
    precision: Literal["fp32", "bf16"],
    batch_size: int,
    budget: BadSampleBudget,
) -> Predicted:
    """Predict the clean view of every decodable sample of one shard.

    Batches are cut by position in the shard, so that a run that skips a shard computes the same
    bits for the others. Undecodable samples are counted in the budget and left out.

    Raises: TooManyBadSamples; ValueError if the model gives NaN.
    """
    view = classifier.description

    def decode(sample: RawSample) -> NDArray[np.uint8] | BadImage:
        try:
            image = decode_pixels(sample.image, where=sample.key)
        except BadImage as error:
            return error
        return clean_view(image, view.image_size, view.crop_padding, view.interpolation)

    kept: list[RawSample] = []
    log_probs: list[NDArray[np.float32]] = []
    log_sums: list[NDArray[np.float32]] = []
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        ahead = [[pool.submit(decode, s) for s in batch] for batch in batches[:_BATCHES_AHEAD]]
        for number, batch in enumerate(batches):
            if number + _BATCHES_AHEAD < len(batches):
                following = batches[number + _BATCHES_AHEAD]
                ahead.append([pool.submit(decode, s) for s in following])
            views: list[NDArray[np.uint8]] = []
            for sample, future in zip(batch, ahead.pop(0), strict=True):
                found = future.result()
                if isinstance(found, BadImage):
                    budget.spend(sample.key, found)
                else:
                    kept.append(sample)
                    views.append(found)
            if views:
                probs, sums = forward(np.stack(views), classifier, precision)
                log_probs.append(probs)
                log_sums.append(sums)
    num_classes = len(classifier.class_names)
    return Predicted(
        keys=tuple(in_shard_key(sample.key, budget.stem) for sample in kept),
        labels=tuple(sample.label for sample in kept),
        log_probs=np.concatenate(log_probs) if kept else np.zeros((0, num_classes), np.float32),
        logsumexp=np.concatenate(log_sums) if kept else np.zeros(0, np.float32),
    )


def forward(
    views: NDArray[np.uint8], classifier: StoredClassifier, precision: Literal["fp32", "bf16"]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (B, C) log-probabilities and (B,) logsumexp of (B, S, S, 3) uint8 views."""
    # (B, S, S, 3) uint8 is (B, 3, S, S) in channels-last memory: no copy on the way to the device.
    images = torch.from_numpy(views).permute(0, 3, 1, 2).to(classifier.device)
    log_probs, log_sums = log_probabilities(classifier.network, images, precision)
    return log_probs.cpu().numpy(), log_sums.cpu().numpy()
