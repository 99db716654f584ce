"""Optimisers: their settings, and how parameters are split by weight decay."""

from typing import Annotated, Any, Literal, assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.optimization.lars import LARS
from models.optimization.rmsprop_tf import RMSpropTF

LrScaling = Literal["none", "linear_256"]


class _OptimizerSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(
        gt=0, allow_inf_nan=False, description="Peak learning rate, before lr_scaling."
    )
    lr_scaling: LrScaling = Field(
        default="none",
        description="none: lr is the peak. linear_256: lr is per 256 labelled images, the peak is "
        "lr * batch_size / 256; the unlabelled ratio never counts.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Applied to convolution and matrix weights, never to biases and BatchNorm.",
    )


class AdamWConfig(_OptimizerSettings):
    """AdamW; weight decay is decoupled from the gradient and scaled by the learning rate."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    weight_decay: float = Field(
        default=0.05, ge=0, allow_inf_nan=False, description="Decoupled weight decay."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay of the first and second moment, each in [0, 1)."
    )


class SGDConfig(_OptimizerSettings):
    """Stochastic gradient descent with momentum; weight decay is L2."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.03, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="0 is plain SGD.")
    nesterov: bool = Field(
        default=True, description="Nesterov momentum; needs momentum above 0 to take effect."
    )
    weight_decay: float = Field(
        default=5e-4, ge=0, allow_inf_nan=False, description="L2: gradient + weight_decay * weight."
    )


class RMSpropTFConfig(_OptimizerSettings):
    """TensorFlow's RMSProp with the settings of the Noisy Student release; weight decay is L2.

    The release decays biases too; here biases and BatchNorm are never decayed.
    """

    kind: Literal["rmsprop_tf"] = "rmsprop_tf"
    lr: float = Field(default=0.016, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    lr_scaling: LrScaling = Field(
        default="linear_256", description="As of the release: lr per 256 labelled images."
    )
    decay: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean square.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="0 is none.")
    eps: float = Field(default=1e-3, gt=0, description="Added to the mean square inside the root.")
    weight_decay: float = Field(
        default=1e-5, ge=0, allow_inf_nan=False, description="L2: gradient + weight_decay * weight."
    )


class LARSConfig(_OptimizerSettings):
    """Momentum SGD with steps scaled to each layer's weights; weight decay is L2.

    Biases and BatchNorm are neither decayed nor scaled.
    """

    kind: Literal["lars"] = "lars"
    lr: float = Field(default=0.3, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    lr_scaling: LrScaling = Field(
        default="linear_256", description="As of SimCLR: lr per 256 labelled images."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="0 is none.")
    trust_coefficient: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="Length of a layer's step over that of its weights, at learning rate 1.",
    )
    weight_decay: float = Field(
        default=1e-6, ge=0, allow_inf_nan=False, description="L2: gradient + weight_decay * weight."
    )


OptimizerConfig = Annotated[
    AdamWConfig | SGDConfig | RMSpropTFConfig | LARSConfig, Field(discriminator="kind")
]


def peak_learning_rate(config: OptimizerConfig, *, batch_size: int) -> float:
    """The learning rate at the top of the schedule for `batch_size` labelled images a step."""
    match config.lr_scaling:
        case "none":
            return config.lr
        case "linear_256":
            return config.lr * batch_size / 256
        case _:
            assert_never(config.lr_scaling)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser over the trainable parameters; its learning rate is set before every step.

    Only what has two axes longer than 1 is decayed: no biases, no scales and shifts of
    normalisations, no layer scales (C, 1, 1), no class token (1, 1, D).

    Raises: ValueError for nesterov with momentum 0, which could not take effect.
    """
    trainable: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trainable if _is_matrix(p)],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trainable if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        case SGDConfig():
            return torch.optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
            )
        case RMSpropTFConfig():
            return RMSpropTF(
                groups,
                lr=config.lr,
                decay=config.decay,
                momentum=config.momentum,
                eps=config.eps,
            )
        case LARSConfig():
            groups[1]["adapt"] = False
            return LARS(
                groups,
                lr=config.lr,
                momentum=config.momentum,
                trust_coefficient=config.trust_coefficient,
            )
        case _:
            assert_never(config)


def _is_matrix(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2
