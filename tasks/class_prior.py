"""The mean prediction of a teacher over the unlabelled corpus: the prior of the adaptive margin."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.exact_sums import exact_mean, exact_sum
from storage.addresses import labeling_folder
from storage.corpus import Shard, load_corpus
from storage.manifest import Manifest, create_record
from storage.manifest import read_record as read_sealed
from storage.predictions import prediction_record, probability_sums, read_predictions
from storage.store import Store

_SCHEMA = 1
_READERS = 8


def class_prior(store: Store, labeling: Manifest) -> Tensor:
    """Return (C,) float64, the mean of the teacher's probabilities over a labelled corpus.

    Uncalibrated, as published, and of every prediction, selected or not; of the top_k form
    the calibrated mean, for these are stored calibrated. What is computed once is kept beside
    the labelling, so that a resumed training need not read all predictions again.

    Source: Wang et al. 2022 (DebiasPL), whose moving average over batches becomes exact here.
    """
    path = f"{labeling_folder(labeling.fingerprint)}/class_prior.json"
    body = read_sealed(store, path)
    if body is None:
        body = create_record(store, path, {"schema": _SCHEMA, "prior": _mean(store, labeling)})
    return torch.tensor(body["prior"], dtype=torch.float64)


def sum_of_probabilities(log_probs: NDArray[np.float16]) -> NDArray[np.int64]:
    """Return the exact sum over one shard's predictions, (2, C) as `exact_sum` makes it.

    Args:
        log_probs: (N, C) float16, as stored. Their rows sum to 1 within half precision only, and
            each is divided by its sum.
    """
    probs = np.exp(log_probs.astype(np.float64))
    return exact_sum(probs / probs.sum(axis=1, keepdims=True))


def _mean(store: Store, labeling: Manifest) -> list[float]:
    labeler = labeling.inputs["labeler"].fingerprint
    corpus = load_corpus(store, labeling.inputs["corpus"].fingerprint)

    def sums_of(shard: Shard) -> tuple[NDArray[np.int64], int]:
        record = prediction_record(store, labeler, shard.digest)
        sums = probability_sums(record)
        if sums is not None:
            return sums, record["num_samples"]
        predictions = read_predictions(store, record)
        return sum_of_probabilities(predictions.log_probs), predictions.num_samples

    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(sums_of, corpus.shards)
        total, num_rows = next(found)
        for sums, count in found:  # added as they come: all shards' sums at a time may be GBs
            total, num_rows = total + sums, num_rows + count
    return exact_mean(total, num_rows).tolist()
