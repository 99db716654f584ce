"""What one round made of one image: the prediction, how it was judged, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.corpus import Corpus, Shard, load_locations, read_samples
from storage.manifest import Manifest
from storage.predictions import Predictions, prediction_record, read_predictions
from storage.samples import sample_key
from storage.selections import Reason, Selection
from storage.store import Store
from tasks.guarding import Leak, read_leaks
from tasks.judged_predictions import calibrated_confidences, is_debiased, judged
from tasks.report_formats import words
from tasks.selection import read_summary
from tasks.shard_openers import read_chosen
from tasks.specifications import finished_result

TOP_CLASSES = 3


@dataclass(frozen=True)
class ScoredClass:
    """A class by name and its probability in [0, 1]."""

    label: str
    probability: float


@dataclass(frozen=True)
class Judgement:
    """How a selection judged one image in one round, and what it gave the student.

    Attributes:
        label: class after calibration and debiasing, which the threshold is of.
        confidence: of that class, which was compared with the threshold.
        calibrated_confidence: after calibration alone; None where nothing was calibrated.
        debiased_confidence: None where nothing was debiased.
        threshold: that the class had to reach; None where balancing hides the rule's own.
        kept_from: lowest confidence at which the class was kept, quota included; None where no
            rule depends on the corpus.
        reason: name of the stored reason.
        reason_in_words: the same for people, with the numbers.
        copies: 0 where rejected.
        weight: 0 where rejected.
        target: soft, hard, or None where rejected.
        target_top: most probable classes of the target.
        rest_mass: probability of the classes that the target does not list.
    """

    label: str
    confidence: float
    calibrated_confidence: float | None
    debiased_confidence: float | None
    threshold: float | None
    kept_from: float | None
    reason: str
    reason_in_words: str
    copies: int
    weight: float
    target: str | None
    target_top: tuple[ScoredClass, ...]
    rest_mass: float

    @property
    def is_kept(self) -> bool:
        """Whether the student of the round learns the image."""
        return self.reason == "kept"


@dataclass(frozen=True)
class SampleInRound:
    """One image in one round.

    Attributes:
        predicted: the teacher's own most probable classes, as stored, most probable first.
        confidence: of the first of them, in [0, 1].
        margin: over the second.
        entropy: nats.
        uncertainty: deviation of its probability over views, teachers or passes; None where it
            was not measured.
        agreement: share of their votes; None where one prediction was made.
        judgement: of the selection.
        truth: name of the true class where the corpus has it: diagnosis only, nothing reads it.
    """

    predicted: tuple[ScoredClass, ...]
    confidence: float
    margin: float
    entropy: float
    uncertainty: float | None
    agreement: float | None
    judgement: Judgement
    truth: str | None


def keys_of_shard(store: Store, labeling: Manifest, shard: Shard) -> tuple[str, ...]:
    """Return the in-shard keys of the images that a labelling has a prediction for."""
    return _predictions(store, labeling, shard).keys


def explain_round(
    store: Store,
    shard: Shard,
    key: str,
    *,
    labeling: Manifest,
    selection: Manifest,
    class_names: Sequence[str],
) -> SampleInRound | None:
    """Return what one round made of a sample; of the data, only its shard's objects are read.

    Args:
        store: of the run.
        shard: that holds the sample.
        key: in the shard.
        labeling: the round's, finished.
        selection: the round's, finished.
        class_names: of the run.
    Returns: None if the labelling has no prediction for the key.
    """
    predictions = _predictions(store, labeling, shard)
    if key not in predictions.keys:
        return None
    row = predictions.keys.index(key)
    chosen = read_chosen(store, selection, labeling, shard)
    chosen_row = chosen.keys.index(key)
    is_leaked = chosen.reason[chosen_row] == Reason.LEAKED
    truth = int(predictions.true_label[row])
    return SampleInRound(
        predicted=_top(
            np.exp(predictions.log_probs[row].astype(np.float64)),
            _listed_names(predictions, row, class_names),
        ),
        confidence=float(predictions.confidence[row]),
        margin=float(predictions.margin[row]),
        entropy=float(predictions.entropy[row]),
        uncertainty=_at(predictions.uncertainty, row),
        agreement=_at(predictions.agreement, row),
        judgement=_judgement(
            predictions,
            row,
            chosen,
            chosen_row,
            rules=selection.settings["selection"],
            summary=read_summary(store, selection),
            class_names=class_names,
            leak=_leak(store, selection, shard, key) if is_leaked else None,
        ),
        truth=class_names[truth] if truth >= 0 else None,
    )


def read_image(store: Store, corpus: Corpus, stem: str, key: str) -> bytes:
    """Return the image file of one sample of a corpus, out of its shard.

    Raises: MissingShard, CorruptShard; ValueError if the shard has no such sample.
    """
    wanted = sample_key(stem, key)
    for sample in read_samples(corpus, load_locations(store, corpus.digest), stem):
        if sample.key == wanted:
            return bytes(sample.image)
    raise ValueError(f"shard {stem} has no sample {wanted!r}")


def _predictions(store: Store, labeling: Manifest, shard: Shard) -> Predictions:
    labeler = labeling.inputs["labeler"].fingerprint
    return read_predictions(store, prediction_record(store, labeler, shard.digest))


def _listed_names(predictions: Predictions, row: int, class_names: Sequence[str]) -> Sequence[str]:
    """Return the names of the classes that a row's probabilities are of."""
    if predictions.listed is None:
        return class_names
    return [class_names[int(class_id)] for class_id in predictions.listed.class_ids[row]]


def _at(values: NDArray[np.float32] | None, row: int) -> float | None:
    return None if values is None else float(values[row])


def _judgement(
    predictions: Predictions,
    row: int,
    chosen: Selection,
    chosen_row: int,
    *,
    rules: Mapping[str, Any],
    summary: Mapping[str, Any],
    class_names: Sequence[str],
    leak: Leak | None,
) -> Judgement:
    labels, confidences = judged(predictions, summary)
    label, confidence = int(labels[row]), float(confidences[row])
    threshold, kept_from = _thresholds(rules, summary, label)
    reason = Reason(int(chosen.reason[chosen_row]))
    target, target_top = _target(chosen, chosen_row, class_names, kind=rules["target"])
    return Judgement(
        label=class_names[label],
        confidence=confidence,
        calibrated_confidence=_at(calibrated_confidences(predictions, summary), row),
        debiased_confidence=confidence if is_debiased(summary) else None,
        threshold=threshold,
        kept_from=kept_from,
        reason=reason.name.lower(),
        reason_in_words=_reason_in_words(
            reason,
            confidence,
            threshold,
            kept_from,
            rule=rules["threshold"],
            uncertainty=_at(predictions.uncertainty, row),
            agreement=_at(predictions.agreement, row),
            max_std=summary["class_max_std"][label] if "class_max_std" in summary else None,
            leak=leak,
        ),
        copies=int(chosen.copies[chosen_row]),
        weight=float(chosen.weight[chosen_row]),
        target=target,
        target_top=target_top,
        rest_mass=float(chosen.rest_mass[chosen_row]),
    )


def _leak(store: Store, selection: Manifest, shard: Shard, key: str) -> Leak:
    """Return what the selection's leak guard found of a sample that leaked."""
    guard = finished_result(store, "guard", selection.inputs["leaks"].fingerprint)
    return next(leak for leak in read_leaks(store, guard)[shard.stem] if leak.key == key)


def _thresholds(
    rules: Mapping[str, Any], summary: Mapping[str, Any], label: int
) -> tuple[float | None, float | None]:
    """Return the threshold of a class, and the confidence from which on its quota kept it.

    A learned one that a quota followed is None of selections that did not store it by itself.
    """
    by_class = summary.get("class_thresholds")
    kept_from = None if by_class is None else float(by_class[label])
    rule = rules["threshold"]
    if rule["kind"] in ("fixed", "uncertainty", "agreement"):
        return float(rule["confidence"]), kept_from
    if "learned_thresholds" in summary:
        return float(summary["learned_thresholds"][label]), kept_from
    return (kept_from if rules["balance"]["kind"] == "none" else None), kept_from


def _reason_in_words(
    reason: Reason,
    confidence: float,
    threshold: float | None,
    kept_from: float | None,
    *,
    rule: Mapping[str, Any],
    uncertainty: float | None,
    agreement: float | None,
    max_std: float | None,
    leak: Leak | None,
) -> str:
    match reason:
        case Reason.KEPT:
            return "kept"
        case Reason.LEAKED if leak is not None:
            return f"leaked: a copy of {leak.of} of {leak.split}, similarity {leak.similarity:.3f}"
        case Reason.BELOW_THRESHOLD if threshold is None:
            return f"confidence {confidence:.4f} is below the threshold of its class"
        case Reason.BELOW_THRESHOLD if _is_below(confidence, threshold):
            return f"confidence {confidence:.4f} is below {threshold:.4f}"
        case Reason.BELOW_THRESHOLD if rule["kind"] == "uncertainty":
            return f"deviation {uncertainty:.4f} is not below {rule['max_std']}"
        case Reason.BELOW_THRESHOLD if rule["kind"] == "agreement":
            return f"{agreement:.0%} of the votes are for it, {rule['min_fraction']:.0%} are asked"
        case Reason.OVER_QUOTA if max_std is not None:
            return f"over quota: its class is full with deviations up to {max_std:.4f}"
        case Reason.OVER_QUOTA if _is_below(confidence, kept_from):
            return f"over quota: its class is full from confidence {kept_from:.4f} on"
        case Reason.OVER_QUOTA:
            return "over quota: its class is thinned at random, and the draw gave it no copy"
        case _:
            return words(reason.name.lower())


def _is_below(confidence: float, bound: float | None) -> bool:
    """Compare as the rules do, in float32: a confidence written as 0.9 reaches a cut at 0.9."""
    return bound is not None and bool(np.float32(confidence) < np.float32(bound))


def _target(
    chosen: Selection, row: int, class_names: Sequence[str], *, kind: str
) -> tuple[str | None, tuple[ScoredClass, ...]]:
    if not chosen.kept[row]:
        return None, ()
    span = slice(int(chosen.target_offsets[row]), int(chosen.target_offsets[row + 1]))
    if span.start == span.stop:
        return "hard", (ScoredClass(class_names[int(chosen.label[row])], 1.0),)
    probs = np.exp(chosen.target_log_probs[span].astype(np.float64))
    names = [class_names[int(class_id)] for class_id in chosen.target_ids[span]]
    return kind, _top(probs, names)


def _top(probs: NDArray[np.float64], names: Sequence[str]) -> tuple[ScoredClass, ...]:
    best = np.argsort(-probs, kind="stable")[:TOP_CLASSES]
    return tuple(ScoredClass(names[int(i)], float(probs[i])) for i in best)
