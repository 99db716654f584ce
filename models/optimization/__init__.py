"""Optimisers, learning-rate schedules and averages of the weights."""

from models.optimization.ema import EmaConfig, ema_decay, update_ema
from models.optimization.lars import LARS
from models.optimization.optimizers import (
    AdamWConfig,
    LARSConfig,
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
    FixMatchCosineConfig,
    LinearConfig,
    OneCycleConfig,
    ScheduleConfig,
    StaircaseConfig,
    learning_rate,
)
from models.optimization.swa import (
    SwaConfig,
    is_averaged,
    num_averaged,
    recompute_batchnorm,
    update_swa,
)

__all__ = [
    "LARS",
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "EmaConfig",
    "FixMatchCosineConfig",
    "LARSConfig",
    "LinearConfig",
    "OneCycleConfig",
    "OptimizerConfig",
    "RMSpropTF",
    "RMSpropTFConfig",
    "SGDConfig",
    "ScheduleConfig",
    "StaircaseConfig",
    "SwaConfig",
    "build_optimizer",
    "ema_decay",
    "is_averaged",
    "learning_rate",
    "num_averaged",
    "peak_learning_rate",
    "recompute_batchnorm",
    "update_ema",
    "update_swa",
]
