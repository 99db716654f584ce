"""A network's convolutions with the BatchNorm behind them folded in, for inference alone."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_eval

_log = logging.getLogger(__name__)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def traced(network: nn.Module) -> fx.GraphModule | None:
    """Return the network as a graph that shares its modules, in evaluation mode.

    Returns: None for one whose Python code depends on the values it computes.
    """
    try:
        return fx.symbolic_trace(network.eval())
    except (TraceError, TypeError, NotImplementedError) as error:
        _log.debug("%s is not fused: it cannot be traced: %s", type(network).__name__, error)
        return None


def fold_batch_norms(graph: fx.GraphModule) -> int:
    """Fold every BatchNorm that alone reads a convolution into that, and return how many.

    The convolutions get new weights; modules that occur twice stay as they are.
    """
    modules = _modules(graph)
    uses = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    num_folded = 0
    for node in list(graph.graph.nodes):
        norm = _module(node, modules)
        if not isinstance(norm, _BATCH_NORMS) or not node.args:
            continue
        before = cast(fx.Node, node.args[0])
        convolution = _module(before, modules)
        is_alone = isinstance(convolution, _CONVOLUTIONS) and len(before.users) == 1
        if not is_alone or uses[node.target] > 1 or uses[before.target] > 1:
            continue
        fused = fuse_conv_bn_eval(cast(Any, convolution), cast(Any, norm))
        graph.set_submodule(str(before.target), fused)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
        num_folded += 1
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return num_folded


def fold_input_scale(graph: fx.GraphModule, scale: Tensor) -> bool:
    """Let the first convolution multiply the input's channels by `scale`; the caller does not.

    Exact up to rounding at the borders too, since padding by zeros is zeros times the scale.

    Args:
        graph: of (B, C, H, W) to anything.
        scale: (C,) float.
    Returns: whether a plain convolution is all that reads the input; else nothing was changed.
    """
    modules = _modules(graph)
    entrance = next(node for node in graph.graph.nodes if node.op == "placeholder")
    readers = list(entrance.users)
    first = _module(readers[0], modules) if len(readers) == 1 else None
    if not isinstance(first, nn.Conv2d) or first.groups != 1 or first.padding_mode != "zeros":
        return False
    with torch.no_grad():
        first.weight.mul_(scale.to(first.weight).view(1, -1, 1, 1))
    return True


def _modules(graph: fx.GraphModule) -> dict[str, nn.Module]:
    return dict(cast("Any", graph).named_modules())


def _module(node: Any, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return modules.get(str(node.target)) if is_call else None
