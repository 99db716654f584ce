"""Optimisers, learning-rate schedules and the moving average of the weights."""

from models.optimization.ema import EmaConfig, ema_decay, update_ema
from models.optimization.optimizers import (
    AdamWConfig,
    OptimizerConfig,
    RMSpropTFConfig,
    SGDConfig,
    build_optimizer,
    peak_learning_rate,
)
from models.optimization.rmsprop_tf import RMSpropTF
from models.optimization.schedules import (
    ConstantConfig,
    CosineConfig,
    ScheduleConfig,
    StaircaseConfig,
    learning_rate,
)

__all__ = [
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "EmaConfig",
    "OptimizerConfig",
    "RMSpropTF",
    "RMSpropTFConfig",
    "SGDConfig",
    "ScheduleConfig",
    "StaircaseConfig",
    "build_optimizer",
    "ema_decay",
    "learning_rate",
    "peak_learning_rate",
    "update_ema",
]
