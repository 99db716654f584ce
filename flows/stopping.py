"""When the loop ends before its last round."""

from collections.abc import Sequence


def has_stalled(dev_accuracies: Sequence[float], patience_rounds: int | None) -> bool:
    """Return whether the last rounds brought no new best dev accuracy.

    Args:
        dev_accuracies: of round 0, 1, ... so far.
        patience_rounds: how many rounds in a row may pass without one; None: any number.
    """
    if patience_rounds is None or len(dev_accuracies) <= patience_rounds:
        return False
    best_before = max(dev_accuracies[:-patience_rounds])
    return max(dev_accuracies[-patience_rounds:]) <= best_before
