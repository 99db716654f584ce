"""Predictions as values: what a labeler says of one shard's samples, and what it cannot mean."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

UNKNOWN_LABEL = -1

Form = Literal["full", "top_k"]
"""full: the log-probability of every class. top_k: of the k most probable, and the mass of the
rest."""

SCALARS: dict[str, type[np.generic]] = {
    "label": np.uint32,
    "confidence": np.float32,
    "margin": np.float32,
    "entropy": np.float32,
    "logsumexp": np.float32,
    "true_label": np.int32,
}
"""The columns of one value a row that every form has."""

OPTIONAL = ("uncertainty", "agreement")
"""The columns of one float32 a row that predictions have where several were made of every image."""

# Half floats of log-probabilities near 0 to -8 are off by at most 2**-9, so a row's sum by 0.2 %.
_SUM_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Listed:
    """Which classes the log-probabilities of the top_k form are of.

    Attributes:
        class_ids: (N, k) uint32, of falling probability; the first is the label.
        rest_mass: (N,) float32 in [0, 1], probability of all classes that are not listed.
        num_classes: C, at least k.
    """

    class_ids: NDArray[np.uint32]
    rest_mass: NDArray[np.float32]
    num_classes: int


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions for the samples of one shard, in the shard's order.

    In the top_k form all probabilities, confidence, margin and entropy among them, are calibrated
    and of the whole distribution before it was cut.

    Attributes:
        keys: N in-shard keys, unique.
        label: (N,) uint32, class of the largest probability.
        confidence: (N,) float32 in [0, 1], its probability.
        margin: (N,) float32 in [0, 1], over the second largest.
        entropy: (N,) float32, nats, at least 0.
        log_probs: (N, C) float16, natural logarithm; rows of exp sum to 1. In the top_k form
            (N, k), of the classes in `listed`; rows of exp sum to 1 with the rest mass.
        logsumexp: (N,) float32 of the logits, uncalibrated in either form, so that in the full
            form logits = log_probs + logsumexp.
        true_label: (N,) int32, -1 where unknown. For diagnosis: never given to a selection rule.
        listed: the classes of the top_k form; None in the full form.
        uncertainty: (N,) float32, standard deviation of the predicted class's probability over the
            passes, views or teachers that were averaged; None where it was not computed.
        agreement: (N,) float32 in [0, 1], share of the passes, views and teachers whose class is
            the label; None where one prediction was made.
    """

    keys: tuple[str, ...]
    label: NDArray[np.uint32]
    confidence: NDArray[np.float32]
    margin: NDArray[np.float32]
    entropy: NDArray[np.float32]
    log_probs: NDArray[np.float16]
    logsumexp: NDArray[np.float32]
    true_label: NDArray[np.int32]
    listed: Listed | None = None
    uncertainty: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.keys)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.log_probs.shape[1] if self.listed is None else self.listed.num_classes

    @property
    def optional(self) -> tuple[str, ...]:
        """Which of the optional columns there are."""
        return tuple(name for name in OPTIONAL if getattr(self, name) is not None)

    @property
    def form(self) -> Form:
        """How probabilities are stored."""
        return "full" if self.listed is None else "top_k"

    @property
    def k(self) -> int | None:
        """Classes listed of each row; None in the full form."""
        return None if self.listed is None else self.log_probs.shape[1]


def check_predictions(predictions: Predictions) -> None:
    """Refuse what no labeler can have meant.

    Raises: ValueError, naming the first key, for NaN, infinities, a wrong shape or type, a class
        or a probability out of range, rows that do not sum to 1, empty or repeated keys.
    """
    p = predictions
    n = len(p.keys)
    _check_shapes(p)
    if len(set(p.keys)) != n or "" in p.keys:
        repeated = next((k for i, k in enumerate(p.keys) if k in p.keys[:i]), "")
        raise ValueError(f"keys must be unique and not empty; {repeated!r} is not")
    for what, bad in _problems(p):
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {n} predictions are refused: {what}; first key "
                f"{p.keys[int(bad.argmax())]!r}"
            )


def _check_shapes(p: Predictions) -> None:
    n = len(p.keys)
    columns = "C" if p.listed is None else "k"
    if p.log_probs.ndim != 2 or p.log_probs.shape[0] != n or p.log_probs.dtype != np.float16:
        raise ValueError(
            f"log_probs must be ({n}, {columns}) float16, not {p.log_probs.shape} "
            f"{p.log_probs.dtype}"
        )
    wanted: list[tuple[str, Any, tuple[int, ...], type[np.generic]]] = [
        (name, getattr(p, name), (n,), kind) for name, kind in SCALARS.items()
    ]
    wanted += [(name, getattr(p, name), (n,), np.float32) for name in p.optional]
    if p.listed is not None:
        k = p.log_probs.shape[1]
        if not 1 <= k <= p.listed.num_classes:
            raise ValueError(f"{k} classes are listed of {p.listed.num_classes}: must be 1 to all")
        wanted.append(("rest_mass", p.listed.rest_mass, (n,), np.float32))
        wanted.append(("class_ids", p.listed.class_ids, (n, k), np.uint32))
    for name, values, shape, kind in wanted:
        array = cast("NDArray[Any]", values)
        if array.shape != shape or array.dtype != kind:
            shown = f"({n},)" if len(shape) == 1 else str(shape)
            raise ValueError(
                f"{name} must be {shown} {np.dtype(kind)}, not {array.shape} {array.dtype}"
            )


def _problems(p: Predictions) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    log_probs = p.log_probs.astype(np.float32)
    sums = np.exp(np.where(np.isnan(log_probs), -np.inf, log_probs)).sum(axis=1)
    yield "a value is NaN or infinite", ~_finite_rows(p)
    yield f"the label is not below {p.num_classes}", p.label >= p.num_classes
    yield (
        "the true label is not a class",
        (p.true_label < UNKNOWN_LABEL) | (p.true_label >= p.num_classes),
    )
    yield "the confidence is not in [0, 1]", (p.confidence < 0) | (p.confidence > 1.0001)
    yield "the margin is not in [0, 1]", (p.margin < 0) | (p.margin > 1.0001)
    yield "the entropy is negative", p.entropy < -0.0001
    if p.uncertainty is not None:
        yield "the uncertainty is negative", p.uncertainty < 0
    if p.agreement is not None:
        yield "the agreement is not in [0, 1]", (p.agreement < 0) | (p.agreement > 1)
    if p.listed is not None:
        ids, rest = p.listed.class_ids, p.listed.rest_mass
        yield "a listed class is not a class", ids.max(axis=1) >= p.num_classes
        repeated = np.diff(np.sort(ids, axis=1), axis=1) == 0
        yield "a class is listed twice", repeated.sum(axis=1) > 0
        yield "the first class listed is not the label", ids[:, 0] != p.label
        yield "the rest mass is not in [0, 1]", (rest < 0) | (rest > 1.0001)
        sums = sums + rest
    yield "the probabilities do not sum to 1", np.abs(sums - 1) > _SUM_TOLERANCE


def _finite_rows(p: Predictions) -> NDArray[np.bool_]:
    finite = cast("NDArray[np.bool_]", np.isfinite(p.log_probs).all(axis=1))
    scalars = [p.confidence, p.margin, p.entropy, p.logsumexp]
    scalars += [cast("NDArray[np.float32]", getattr(p, name)) for name in p.optional]
    scalars += [] if p.listed is None else [p.listed.rest_mass]
    for values in scalars:
        finite &= np.isfinite(values)
    return finite
