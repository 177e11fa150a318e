"""Which batch norms can be folded: those that take the result of a convolution, and nothing else does.

A module whose forward torch.fx can trace, and which decides nothing by what it is given, tells it exactly. In others,
an nn.Sequential tells it of its own layers, where it is only ever called as a whole.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
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
    """Takes fastdl's layers for what they are, and gives up where one run of a forward does not speak for all."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Swapped) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., object], args: tuple, kwargs: dict) -> object:
        if not self.is_leaf_module(m, self.path_of_module(m)):
            _require_one_path(m)
        return super().call_module(m, forward, args, kwargs)


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
            pair = Pair(model, conv, norm, (names[conv][0], fqn))
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


def _pairs(module: nn.Module, whole: bool = True) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(convolution, batch norm), without repeats; whole: the module is only ever called as a whole."""
    if isinstance(module, Swapped) or not any(True for _ in module.children()):
        return
    graph = _trace(module) if whole else None
    if graph is not None:
        yield from _in_graph(module, graph)
        return
    sequential = type(module) is nn.Sequential
    if sequential and whole:
        yield from pairwise(module)
    for name, child in module.named_children():
        parts = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        yield from _pairs(child, not parts or (sequential and whole) or _calls_whole(type(module), name))


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of what the module does in eval mode, of a copy: forwards leave things in what they belong to."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        twin = copy.deepcopy(module, {id(p): p for p in module.parameters()}).eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            _require_one_path(twin)
            return _Tracer().trace(twin)
    except Exception:  # whatever the model's code raises when it is copied, or given symbols
        return None


def _in_graph(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    called = {node: module.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    times = Counter(called.values())
    for node, norm in called.items():
        given = _only_argument(node)
        conv = called.get(given)
        if conv is None or _only_argument(given) is None:
            continue  # given an activation or a residual, the convolution has an epilogue before the norm
        if len(given.users) == 1 and times[conv] == times[norm] == 1:
            yield conv, norm


def _only_argument(node: fx.Node) -> fx.Node | None:
    given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return given if isinstance(given, fx.Node) else None


# --- what the source of a module says ------------------------------------------------------------------------------
@cache
def _source(definition: Callable[..., object]) -> ast.Module:
    """OSError where there is none."""
    return ast.parse(textwrap.dedent(inspect.getsource(definition)))


def _require_one_path(module: nn.Module) -> None:
    """ValueError for a forward that may go another way than it did: symbols are never None, of no type, and small.

    What it asks of itself alone stays the same, `training` included: folding acts in eval mode only.
    """
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        return
    (definition,) = _source(forward).body
    itself = definition.args.args[0].arg
    for node in ast.walk(definition):
        tests = []
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            tests = [node.test]
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        elif isinstance(node, ast.BoolOp):
            tests = node.values
        elif isinstance(node, (ast.Try, ast.Match)):
            raise ValueError("may go another way")
        if any(isinstance(name, ast.Name) and name.id != itself for test in tests for name in ast.walk(test)):
            raise ValueError("decides by more than itself")


@cache
def _calls_whole(parent: type[nn.Module], name: str) -> bool:
    """Whether the code of a module's class has nothing to do with its child `name` but to call it, once it is made."""
    for cls in parent.__mro__[: parent.__mro__.index(nn.Module)]:
        try:
            (definition,) = _source(cls).body
        except (OSError, TypeError):
            return False
        methods = [node for node in definition.body if not _INITIALISES(getattr(node, "name", ""))]
        nodes = [node for method in methods for node in ast.walk(method)]
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in ("getattr", "vars"):
                return False
            if isinstance(node, ast.Attribute) and (
                node.attr in _WALKS or (node.attr == name and id(node) not in called)
            ):
                return False
    return True


_WALKS = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "__dict__"}
_INITIALISES = re.compile("init|reset").search
