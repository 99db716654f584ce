"""What was selected, counted per shard and merged; and whether it is fit to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.evaluation.pseudo_labels import PseudoLabelQuality, pseudo_label_quality
from storage.array_text import from_text, to_text
from storage.selections import Reason, Selection

SUMMARY_SCHEMA = 1
CONFIDENCE_BINS = 20


class EmptySelection(ValueError):
    """A selection that keeps nothing."""


class CollapsedSelection(ValueError):
    """A selection in which one class dominates or most classes are absent."""


@dataclass(frozen=True)
class ShardCounts:
    """Counts of one shard, or of several: they add.

    Attributes:
        quality: samples, items, distinct images, and how many of those are truly labelled.
        predicted: (C,) samples by predicted class, after what calibration and debiasing moved.
        unique: (C,) selected images by class.
        copies: (C,) selected items by class, copies counted.
        reasons: number of samples by the name of the reason.
        kept_by_confidence: (20,) selected images by bin of calibrated confidence.
        rejected_by_confidence: (20,) the others.
        correct_by_confidence: (20,) predictions that are true, of all with known truth.
        known_by_confidence: (20,) predictions with known truth.
    """

    quality: PseudoLabelQuality
    predicted: NDArray[np.int64]
    unique: NDArray[np.int64]
    copies: NDArray[np.int64]
    reasons: dict[str, int]
    kept_by_confidence: NDArray[np.int64]
    rejected_by_confidence: NDArray[np.int64]
    correct_by_confidence: NDArray[np.int64]
    known_by_confidence: NDArray[np.int64]

    @property
    def items(self) -> int:
        """Selected items, copies counted."""
        return self.quality.kept

    @classmethod
    def of(
        cls,
        selection: Selection,
        true_labels: NDArray[np.int32],
        confidences: NDArray[np.float32],
        num_classes: int,
        *,
        item_classes: NDArray[np.integer] | None = None,
    ) -> "ShardCounts":
        """Count one shard; true labels enter here, after everything has been decided.

        Args:
            selection: of the shard.
            true_labels: (N,), -1 unknown.
            confidences: (N,) as the threshold saw them.
            num_classes: C.
            item_classes: (M,) class of each selected item; None: the label of its image.
        """
        # Numbers of rows, for a mask picks them at a tenth of the speed.
        labels, kept = selection.label.astype(np.int64), np.flatnonzero(selection.kept)
        kept_labels, kept_copies = labels[kept], selection.copies[kept]
        if item_classes is None:
            copies = np.bincount(kept_labels, weights=kept_copies, minlength=num_classes)
        else:
            copies = np.bincount(item_classes, minlength=num_classes)
        reasons = np.bincount(selection.reason, minlength=len(Reason))
        bins = (confidences * CONFIDENCE_BINS).astype(np.int32)
        np.minimum(bins, CONFIDENCE_BINS - 1, out=bins)
        known = np.flatnonzero(true_labels >= 0)  # of an unlabelled corpus mostly none
        correct = known[labels[known] == true_labels[known]]
        kept_by_bin = _counts_of_bins(bins[kept])
        return cls(
            quality=pseudo_label_quality(labels, true_labels, selection.copies),
            predicted=np.bincount(labels, minlength=num_classes),
            unique=np.bincount(kept_labels, minlength=num_classes),
            copies=copies.astype(np.int64),
            reasons={reason.name.lower(): int(reasons[reason]) for reason in Reason},
            kept_by_confidence=kept_by_bin,
            rejected_by_confidence=_counts_of_bins(bins) - kept_by_bin,
            correct_by_confidence=_counts_of_bins(bins[correct]),
            known_by_confidence=_counts_of_bins(bins[known]),
        )

    def __add__(self, other: "ShardCounts") -> "ShardCounts":
        return ShardCounts(
            quality=self.quality + other.quality,
            reasons={name: count + other.reasons[name] for name, count in self.reasons.items()},
            **{name: getattr(self, name) + getattr(other, name) for name in _ARRAYS},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        quality = self.quality
        return {
            "total": quality.total,
            "kept": quality.kept,
            "unique_total": quality.unique,
            "known": quality.known,
            "correct": quality.correct,
            "reasons": self.reasons,
            "num_classes": len(self.predicted),
            "arrays": to_text(np.concatenate([getattr(self, name) for name in _ARRAYS])),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "ShardCounts":
        """Read the stored form."""
        sizes = [stored["num_classes"]] * 3 + [CONFIDENCE_BINS] * 4
        flat = from_text(stored["arrays"], (sum(sizes),))
        arrays = np.split(flat, np.cumsum(sizes)[:-1])
        return cls(
            quality=PseudoLabelQuality(
                total=stored["total"],
                kept=stored["kept"],
                unique=stored["unique_total"],
                known=stored["known"],
                correct=stored["correct"],
            ),
            reasons=stored["reasons"],
            **dict(zip(_ARRAYS, arrays, strict=True)),
        )


_ARRAYS = (
    "predicted",
    "unique",
    "copies",
    "kept_by_confidence",
    "rejected_by_confidence",
    "correct_by_confidence",
    "known_by_confidence",
)


def _counts_of_bins(bins: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.bincount(bins, minlength=CONFIDENCE_BINS).astype(np.int64)


def summarize(
    counts: Sequence[ShardCounts], *, class_names: Sequence[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Merge the shards' counts into the stored summary of a selection.

    Args:
        counts: of all shards, one each or added up before.
        class_names: of the run.
        facts: what else to record, such as the temperature and the quota.
    """
    total = counts[0]
    for one in counts[1:]:
        total = total + one
    quality = total.quality
    return {
        "schema": SUMMARY_SCHEMA,
        "samples": quality.total,
        "kept": quality.kept,
        "unique": quality.unique,
        "coverage": quality.coverage,
        "precision": quality.precision,
        "precision_known": quality.known,
        "reasons": total.reasons,
        "classes": [
            {
                "name": name,
                "predicted": int(total.predicted[i]),
                "unique": int(total.unique[i]),
                "copies": int(total.copies[i]),
            }
            for i, name in enumerate(class_names)
        ],
        "confidence_histogram": {
            "kept": total.kept_by_confidence.tolist(),
            "rejected": total.rejected_by_confidence.tolist(),
            "correct": total.correct_by_confidence.tolist(),
            "known": total.known_by_confidence.tolist(),
        },
        **facts,
    }


def check_selection_is_sound(
    summary: dict[str, Any],
    *,
    max_class_share: float,
    allow_collapse: bool,
    remedy: str = "lower selection.threshold.confidence",
) -> None:
    """Refuse a selection that would teach the student a collapsed class balance.

    Args:
        summary: of the selection.
        max_class_share: of all selected items, of one class.
        allow_collapse: refuse only an empty selection.
        remedy: how more would be kept.
    Raises: EmptySelection; CollapsedSelection with the class table, unless it is allowed.
    """
    kept = summary["kept"]
    if kept == 0:
        raise EmptySelection(
            f"the selection keeps none of {summary['samples']} predictions"
            f" (rejected: {_reasons(summary)}): {remedy}, or look at the teacher's dev accuracy"
            " and calibration"
        )
    if allow_collapse:
        return
    classes = summary["classes"]
    largest = max(classes, key=lambda c: c["copies"])
    share = largest["copies"] / kept
    empty = [c["name"] for c in classes if c["copies"] == 0]
    problems: list[str] = []
    if share > max_class_share:
        problems.append(
            f"class {largest['name']!r} holds {share:.0%} of {kept} selected items (limit"
            f" max_class_share={max_class_share:.2f})"
        )
    if 2 * len(empty) > len(classes):
        problems.append(f"{len(empty)} of {len(classes)} classes get nothing")
    if problems:
        raise CollapsedSelection(
            f"the selection has collapsed: {'; '.join(problems)}. A student trained on it would"
            f" forget the other classes. {remedy[0].upper()}{remedy[1:]}, balance with a quota,"
            " train a better teacher, or set selection.allow_collapse=true\n" + class_table(summary)
        )


def class_table(summary: dict[str, Any]) -> str:
    """Return the classes with their counts before and after selection, as aligned text."""
    width = max(len(c["name"]) for c in summary["classes"])
    lines = [f"{'class':<{width}}  predicted  unique  copies"]
    lines += [
        f"{c['name']:<{width}}  {c['predicted']:>9}  {c['unique']:>6}  {c['copies']:>6}"
        for c in summary["classes"]
    ]
    return "\n".join(lines)


def _reasons(summary: dict[str, Any]) -> str:
    rejected = {k: n for k, n in summary["reasons"].items() if n and k != "kept"}
    return ", ".join(f"{k} {n}" for k, n in rejected.items()) or "nothing was predicted"
