"""Half-precision arithmetic of a training: autocast, and the loss scale that fp16 needs."""

import torch
from torch import Tensor

from models.training_config import Precision

_SMALLEST_SCALE = 2.0**-14
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward pass; with fp32 it does nothing."""
    return torch.autocast(
        device.type, _DTYPES.get(precision, torch.bfloat16), enabled=precision != "fp32"
    )


def build_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scale of fp16, whose gradients would vanish below 6e-8; None for the others.

    It starts at 65,536, halves at every step whose gradient overflows (that step is skipped) and
    doubles after 2,000 steps without one.

    Raises: ValueError for fp16 on another device than CUDA.
    """
    if precision != "fp16":
        return None
    if device.type != "cuda":
        raise ValueError(
            f"precision=fp16 on device {device.type}: fp16 training runs on CUDA only; set "
            "precision to bf16, which needs no loss scale, or to fp32"
        )
    return torch.amp.GradScaler(device.type)


def scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """What a checkpoint holds of the scaler: the scale, and the steps since it last changed."""
    state = scaler.state_dict()
    return {
        "scale": torch.tensor(state["scale"], dtype=torch.float64),
        "growth_tracker": torch.tensor(state["_growth_tracker"], dtype=torch.int64),
    }


def load_scaler(scaler: torch.amp.GradScaler, tensors: dict[str, Tensor]) -> None:
    """Take over what `scaler_tensors` gave.

    Raises: ValueError if that is not its form.
    """
    if tensors.keys() != {"scale", "growth_tracker"}:
        raise ValueError(
            f"checkpoint with loss scale tensors {sorted(tensors)}: must be growth_tracker, scale"
        )
    scaler.load_state_dict(
        scaler.state_dict()
        | {
            "scale": tensors["scale"].item(),
            "_growth_tracker": int(tensors["growth_tracker"].item()),
        }
    )


def has_collapsed(scaler: torch.amp.GradScaler) -> bool:
    """Whether 30 steps more have overflowed than the scale could make up for: none will succeed.

    Waits for the device.
    """
    return scaler.get_scale() < _SMALLEST_SCALE
