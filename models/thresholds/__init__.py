"""Which predictions are confident enough to be pseudo-labels.

A fixed threshold needs no look at the corpus, nor do uncertainty and agreement. The other rules
learn theirs, in passes of map, merge and finish over all predictions, so that order and grouping of
shards change no bit:

    thresholds = begin_thresholds(config, ...)
    while isinstance(thresholds, ThresholdSearch):
        counts = sum over shards of `count_for_thresholds(thresholds, ...)`    (merge: addition)
        thresholds = advance_thresholds(thresholds, counts)
    `reaches_thresholds(thresholds, ...)` for each shard
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, assert_never, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from models.thresholds.agreement import AgreementThresholdConfig, is_agreed
from models.thresholds.class_thresholds import ClassThresholds
from models.thresholds.configs import (
    ClassAdaptiveFlexConfig,
    FreeMatchConfig,
    HistogramValleyConfig,
    PercentileThresholdConfig,
    PerClassQuantileConfig,
)
from models.thresholds.fixed import FixedThresholdConfig, check_confidences, reaches_threshold
from models.thresholds.flex import flex_counts, flex_thresholds
from models.thresholds.freematch import freematch_sums, freematch_thresholds
from models.thresholds.histogram_valley import valley_histogram, valley_thresholds
from models.thresholds.order_statistics import QuantileSearch
from models.thresholds.uncertainty import UncertaintyThresholdConfig, is_certain

__all__ = [
    "AgreementThresholdConfig",
    "ClassAdaptiveFlexConfig",
    "ClassThresholds",
    "FinishedThresholds",
    "FixedThresholdConfig",
    "FreeMatchConfig",
    "GivenThresholds",
    "HistogramValleyConfig",
    "PerClassQuantileConfig",
    "PercentileThresholdConfig",
    "ThresholdConfig",
    "ThresholdSearch",
    "UncertaintyThresholdConfig",
    "advance_thresholds",
    "begin_thresholds",
    "count_for_thresholds",
    "kept_fraction",
    "reaches_threshold",
    "reaches_thresholds",
    "threshold_values",
]


def _fixed_without_kind(value: Any) -> Any:
    """Let `threshold: {confidence: 0.5}` mean the fixed rule."""
    if not isinstance(value, dict):
        return value
    return {"kind": "fixed"} | cast("dict[str, Any]", value)


ThresholdConfig = Annotated[
    Annotated[
        FixedThresholdConfig
        | PercentileThresholdConfig
        | PerClassQuantileConfig
        | ClassAdaptiveFlexConfig
        | FreeMatchConfig
        | HistogramValleyConfig
        | UncertaintyThresholdConfig
        | AgreementThresholdConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_fixed_without_kind),
]

_OnePass = ClassAdaptiveFlexConfig | FreeMatchConfig | HistogramValleyConfig


@dataclass(frozen=True)
class ThresholdSearch:
    """A rule that has yet to see the corpus, once or once more.

    Attributes:
        state: the rule, or how far the search for a quantile has come.
        num_classes: C.
    """

    state: _OnePass | QuantileSearch
    num_classes: int


GivenThresholds = FixedThresholdConfig | UncertaintyThresholdConfig | AgreementThresholdConfig
"""Rules that learn nothing from the corpus: one confidence for all classes, in their settings."""

FinishedThresholds = GivenThresholds | ClassThresholds


def begin_thresholds(
    config: ThresholdConfig, *, num_classes: int, round_index: int
) -> ThresholdSearch | FinishedThresholds:
    """The first pass's search; a given threshold is finished at once.

    Args:
        config: the rule.
        num_classes: C.
        round_index: 1 for the first round, which decides how much `percentile` keeps.
    """
    match config:
        case FixedThresholdConfig() | UncertaintyThresholdConfig() | AgreementThresholdConfig():
            return config
        case PercentileThresholdConfig():
            keep = kept_fraction(config, round_index)
            return ThresholdSearch(QuantileSearch.begin(keep, num_groups=1), num_classes)
        case PerClassQuantileConfig():
            keep = Fraction(str(config.keep_fraction))  # 0.2 is a fifth, not its nearest float64
            search = QuantileSearch.begin(keep, num_groups=num_classes)
            return ThresholdSearch(search, num_classes)
        case ClassAdaptiveFlexConfig() | FreeMatchConfig() | HistogramValleyConfig():
            return ThresholdSearch(config, num_classes)
        case _:
            assert_never(config)


def kept_fraction(config: PercentileThresholdConfig, round_index: int) -> Fraction:
    """The share of all predictions that `percentile` keeps in a round, from 1."""
    return Fraction(min(100, config.step * round_index), 100)


def count_for_thresholds(
    search: ThresholdSearch,
    labels: NDArray[np.integer],
    confidences: NDArray[np.float32],
    probs: Callable[[], NDArray[np.float64]],
) -> NDArray[np.int64]:
    """Map of a pass over all rows of one shard; the arrays of all shards are added.

    Args:
        search: of this pass.
        labels: (N,) predicted classes.
        confidences: (N,) in [0, 1].
        probs: gives the (N, C) whose largest values these are; only freematch asks.
    """
    check_confidences(confidences)
    state, num_classes = search.state, search.num_classes
    match state:
        case QuantileSearch():
            groups = labels if state.num_groups > 1 else np.zeros(len(labels), np.int64)
            return state.count(groups, confidences)
        case ClassAdaptiveFlexConfig():
            return flex_counts(state, labels, confidences, num_classes=num_classes)
        case FreeMatchConfig():
            return freematch_sums(confidences, probs())
        case HistogramValleyConfig():
            return valley_histogram(state, labels, confidences, num_classes=num_classes)
        case _:
            assert_never(state)


def advance_thresholds(
    search: ThresholdSearch, counts: NDArray[np.int64]
) -> ThresholdSearch | ClassThresholds:
    """Finish of a pass, from the counts of all shards."""
    state = search.state
    match state:
        case QuantileSearch():
            found = state.advance(counts)
            if isinstance(found, QuantileSearch):
                return ThresholdSearch(found, search.num_classes)
            return ClassThresholds(np.broadcast_to(found, (search.num_classes,)).copy())
        case ClassAdaptiveFlexConfig():
            return flex_thresholds(state, counts)
        case FreeMatchConfig():
            return freematch_thresholds(counts)
        case HistogramValleyConfig():
            return valley_thresholds(state, counts)
        case _:
            assert_never(state)


def reaches_thresholds(
    thresholds: FinishedThresholds,
    labels: NDArray[np.integer],
    confidences: NDArray[np.floating],
    *,
    uncertainty: NDArray[np.floating] | None = None,
    agreement: NDArray[np.floating] | None = None,
) -> NDArray[np.bool_]:
    """Whether each row reaches the threshold of its class, (N,).

    Args:
        thresholds: finished.
        labels: (N,) predicted classes.
        confidences: (N,) in [0, 1].
        uncertainty: (N,) deviation of the predicted class's probability, where it was measured.
        agreement: (N,) share of the votes for the label, where there were several.
    Raises: ValueError if the rule reads what was not measured.
    """
    match thresholds:
        case FixedThresholdConfig():
            return reaches_threshold(confidences, thresholds)
        case UncertaintyThresholdConfig():
            if uncertainty is None:
                raise ValueError(
                    "threshold=uncertainty reads the deviation of predictions, which these do not"
                    " have: label with labeling.uncertainty"
                )
            return is_certain(confidences, uncertainty, thresholds)
        case AgreementThresholdConfig():
            if agreement is None:
                raise ValueError(
                    "threshold=agreement counts votes, but one prediction was made of each image:"
                    " label with several teachers, views or dropout passes"
                )
            return is_agreed(confidences, agreement, thresholds)
        case ClassThresholds():
            return thresholds.are_reached(labels, confidences)
        case _:
            assert_never(thresholds)


def threshold_values(thresholds: FinishedThresholds) -> float | NDArray[np.float64]:
    """The one confidence that is asked for, or those of the classes, (C,)."""
    if isinstance(thresholds, ClassThresholds):
        return thresholds.values
    return thresholds.confidence
