"""Which batch norms can be folded: those that take the result of a convolution, and nothing else does.

A module whose forward torch.fx can trace tells it exactly. In others, an nn.Sequential tells it of its own layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import fx, nn

from fastdl.nn.conv import Conv1d, Conv2d, Conv3d
from fastdl.nn.folded import FOLDED, Pair
from fastdl.nn.swapped import Swapped

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    Conv1d: nn.BatchNorm1d,
    Conv2d: nn.BatchNorm2d,
    Conv3d: nn.BatchNorm3d,
}


class _Tracer(fx.Tracer):
    """Takes fastdl's layers for what they are, and leaves no trace in modules that it fails on."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Swapped) or super().is_leaf_module(m, module_qualified_name)


def fold(model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None) -> None:
    """Fold what can be folded, `wanted(norm, fqn)` permitting."""
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    for conv, norm in list(_pairs(model)):
        if len(names[conv]) != 1 or len(names[norm]) != 1 or not _fits(conv, norm):
            continue  # a layer with two names may be called by either
        fqn = names[norm][0]
        if wanted is None or wanted(norm, fqn):
            parent, _, attribute = fqn.rpartition(".")
            pair = Pair(conv, norm, (names[conv][0], fqn), (model.get_submodule(parent), attribute))
            conv._fold = norm._fold = pair
            norm.__class__ = FOLDED[type(norm)]


def unfold(module: nn.Module) -> None:
    """Forget the pair of a convolution or a batch norm."""
    module.__dict__.pop("_fold", None)


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(norm) is _NORMS.get(type(conv))
        and norm.num_features == conv.out_channels
        and norm.running_mean is not None
        and norm.running_var is not None
        and "forward" not in norm.__dict__
        and "forward" not in conv.__dict__
        and conv._fold is None
    )


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(convolution, batch norm), without repeats."""
    if isinstance(module, Swapped) or not any(True for _ in module.children()):
        return
    graph = _trace(module)
    if graph is not None:
        yield from _in_graph(module, graph)
        return
    if type(module) is nn.Sequential:
        yield from pairwise(module)
    for child in dict.fromkeys(module.children()):
        yield from _pairs(child)


def _trace(module: nn.Module) -> fx.Graph | None:
    try:
        with torch.no_grad():
            return _Tracer().trace(module)
    except Exception:  # whatever the model's code raises when it is given symbols
        return None


def _in_graph(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    called = {node: module.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    times = Counter(called.values())
    for node, norm in called.items():
        given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        conv = called.get(given) if isinstance(given, fx.Node) else None
        if conv is not None and len(given.users) == 1 and times[conv] == times[norm] == 1:
            yield conv, norm
