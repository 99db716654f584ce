"""Which predictions are confident enough to be pseudo-labels."""

from models.thresholds.fixed import FixedThresholdConfig, ThresholdConfig, reaches_threshold

__all__ = ["FixedThresholdConfig", "ThresholdConfig", "reaches_threshold"]
