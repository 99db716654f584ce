"""LARS: momentum SGD whose step is scaled, layer by layer, to the size of the weights."""

# torch's optimisers are built from its _foreach functions, which it exports without a public name.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.optimization.grouped import GroupedOptimizer


class LARS(GroupedOptimizer):
    """Layer-wise adaptive rate scaling, for very large batches.

        g <- grad + weight_decay * weight
        trust = trust_coefficient * |weight| / |g|, or 1 where either norm is 0
        momentum <- momentum_rate * momentum + lr * trust * g
        weight   <- weight - momentum

    A group with `adapt` false (biases and BatchNorm) has trust 1. The learning rate is inside the
    momentum, as in the release.

    Source: You et al. 2017, algorithm 1; SimCLR lars_optimizer.py (classic momentum), which takes
    the norm of the decayed gradient where the paper adds the norms of its two terms.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "weight_decay": weight_decay,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        buffers: list[Tensor] = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        # A copy where nothing is added: it is scaled in place below.
        steps = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            sizes, lengths = torch._foreach_norm(params), torch._foreach_norm(steps)
            for step, size, length in zip(steps, sizes, lengths, strict=True):
                # On the device: asking for the numbers would make every step wait.
                ratio = group["trust_coefficient"] * size / length
                step.mul_(torch.where((size > 0) & (length > 0), ratio, 1.0))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps, alpha=group["lr"])
        torch._foreach_sub_(params, buffers)
