"""Predictions lost or damaged after their labelling was finished: found where they are read.

Nobody looks for them beforehand: to check all predictions is to read them, which costs as much as
a selection.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from storage.predictions import DamagedPredictions

T = TypeVar("T")


def reading_predictions(
    read: Callable[[], T],
    mend: Callable[[], object],
    *,
    log: "logging.Logger | logging.LoggerAdapter[Any]",
) -> T:
    """Return what `read` gives; where it finds damaged predictions, mend them and read once more.

    Args:
        read: reads predictions of finished labellings.
        mend: looks at all of them, and labels again what is lost or damaged.
        log: is told.
    Raises: as both; DamagedPredictions if mending did not help.
    """
    try:
        return read()
    except DamagedPredictions as error:
        log.warning("%s. Damaged predictions are made again", error)
        mend()
        return read()
