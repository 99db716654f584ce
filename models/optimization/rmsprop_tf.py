"""RMSProp as TensorFlow 1 computes it, which torch's own does not."""

# torch's optimisers are built from its _foreach functions, which it exports without a public name.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.optimization.grouped import GroupedOptimizer


class RMSpropTF(GroupedOptimizer):
    """RMSProp with epsilon inside the root, a mean square that starts at one, and L2 decay.

        mean_square <- decay * mean_square + (1 - decay) * grad^2
        momentum    <- momentum_rate * momentum + lr * grad / sqrt(mean_square + eps)
        weight      <- weight - momentum

    The learning rate is inside the momentum, so that a change of it takes effect gradually. torch's
    RMSprop has epsilon outside the root and starts the mean square at zero, which with the paper's
    eps of 1e-3 makes the first steps ten times as large.

    Source: tf.train.RMSPropOptimizer; noisystudent utils.py build_optimizer.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "decay": decay,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.state[param]["mean_square"] = torch.ones_like(param)
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        grads: Sequence[Tensor] = [p.grad for p in params if p.grad is not None]
        squares: list[Tensor] = [self.state[p]["mean_square"] for p in params]
        buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in params]
        if group["weight_decay"] != 0:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        torch._foreach_mul_(squares, group["decay"])
        torch._foreach_addcmul_(squares, grads, grads, value=1 - group["decay"])
        roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_addcdiv_(buffers, grads, roots, value=group["lr"])
        torch._foreach_sub_(params, buffers)
