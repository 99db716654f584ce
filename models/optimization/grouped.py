"""What the optimisers of our own share: a step is made group by group."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimiser whose groups are updated one after another, each as a whole."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    @abstractmethod
    def _step_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of one group."""
