"""torch.compile as an option: the first step shows whether it works here, and if not, says so."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class CompileFallback(UserWarning):
    """The network could not be compiled, and training goes on without."""


def compile_network(model: nn.Module) -> None:
    """Compile a network in place, at its next forward pass; names and weights stay as they are."""
    model.compile(dynamic=False)  # pyright: ignore[reportUnknownMemberType]


def compiled_or_not(model: nn.Module, first_step: Callable[[], T]) -> tuple[T, str | None]:
    """Compile `model` in place and return what the first step gives, and why it failed, if it did.

    Compilation happens during the first forward and backward pass. If any error comes out of them
    the network is put back, gradients are dropped, and the step is done again without compilation;
    an error that has another cause then comes again.

    Args:
        model: the network itself, not a wrapper of it.
        first_step: forward and backward; called once, or twice.
    Returns: its result; None, or the reason in one line, which has been warned of too.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    compile_network(model)
    try:
        return first_step(), None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    model._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    _restore(buffers)
    for parameter in model.parameters():
        parameter.grad = None
    result = first_step()
    message = f"torch.compile failed, training goes on without it: {reason}"
    warnings.warn(message, CompileFallback, stacklevel=2)
    return result, message


@torch.no_grad()
def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)
