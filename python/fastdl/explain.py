"""explain: which layer runs on which kernel, and why the others do not."""

from __future__ import annotations

import contextlib
import io
import sys
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from fastdl.nn.swapped import Swapped
from fastdl.ops import calls
from fastdl.optimize import FORWARD_OVERRIDDEN, named_layers, unswappable

UNKNOWN = "unknown until called"
_TABLE_WIDTH = 200  # printed to a string: the terminal, or whoever reads the log, wraps


@dataclass(frozen=True)
class Row:
    """What became of one layer; one row for each distinct way it was called."""

    fqn: str  # dotted name in the model, "(model)" for the root
    type: str  # class name; "MultiheadAttention: linear" for one of a layer's several operations,
    #            "Attention: functional.matmul" for a call by a module that is no known layer
    status: str  # "fastdl" | "fastdl, frozen" | "torch" | "not swapped" | "forward overridden" | "not called"
    kernel: str  # a row of the kernel table, "reference" (float64), "torch", or "unknown until called"
    shapes: str  # of the tensor arguments: "8x64 32x64 32"
    dtype: str
    reason: str  # why torch runs it, or ""
    calls: int


@dataclass(frozen=True, repr=False)
class Explanation:
    """The rows, and a table of them when printed."""

    rows: list[Row]

    def __str__(self) -> str:
        from rich.console import Console  # here: only printing needs it
        from rich.table import Table
        from rich.text import Text

        names = [field.name for field in fields(Row)]
        table = Table(*names)
        for row in self.rows:
            table.add_row(*(Text(str(getattr(row, name))) for name in names))
        out = io.StringIO()
        Console(file=out, width=_TABLE_WIDTH).print(table)
        return out.getvalue()

    __repr__ = __str__


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Which layers of `model` run on which kernel, and why the others do not.

    With inputs, calls `model(*inputs, **kwargs)` once, as it stands: in its training or eval mode, under the grad
    mode of the caller, eagerly even where it is compiled. Without inputs nothing runs and kernels are "unknown until
    called". Calls of `fastdl.functional` by other modules get rows of their own.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastdl.explain: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")
    watched = _watch(model, inputs, kwargs) if inputs or kwargs else None
    rows: list[Row] = []
    layers = dict(named_layers(model))
    running = {fqn: _runner(fqn, layers, watched) for fqn in layers} if watched else {}
    for fqn, module in layers.items():
        rows += _layer_rows(fqn, module, watched, running.get(fqn))
    if watched is not None:
        names = {module: fqn or "(model)" for fqn, module in model.named_modules()}
        known = set(layers.values())
        for (module, made), count in watched.made.items():
            if module not in known:
                label = f"{type(module).__name__}: functional.{made.op}"
                rows.append(_call_row(names.get(module, "?"), label, made, count))
    return Explanation(rows)


@dataclass
class _Watched:
    """What one run of a model showed."""

    entered: Counter[nn.Module]  # module -> times called
    made: Counter[tuple[nn.Module, calls.Call]]  # (innermost module, call) -> times


def _watch(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> _Watched:
    watched = _Watched(Counter(), Counter())
    stack: list[nn.Module] = [model]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)
        watched.entered[module] += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    enter.only_watches = leave.only_watches = True  # the layers run as they do without them

    def observe(made: calls.Call) -> None:
        watched.made[stack[-1], made] += 1

    with contextlib.ExitStack() as cleanup:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # holds no layer of ours, and takes no hooks
                cleanup.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                cleanup.callback(module.register_forward_hook(leave, always_call=True).remove)
        cleanup.callback(setattr, calls, "observer", calls.observer)
        calls.observer = observe
        cleanup.enter_context(_uncompiled())
        model(*inputs, **kwargs)
    return watched


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled models run eagerly in here. Where the compiler was never imported there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _runner(fqn: str, layers: dict[str, nn.Module], watched: _Watched) -> str | None:
    """The swapped layer around this one that was called, and may have run it without calling it."""
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        if isinstance(layers.get(fqn), Swapped) and watched.entered[layers[fqn]]:
            return fqn
    root = layers.get("(model)")
    return "(model)" if isinstance(root, Swapped) and watched.entered[root] else None


def _layer_rows(fqn: str, module: nn.Module, watched: _Watched | None, runner: str | None) -> list[Row]:
    name = type(module).__name__
    entered = watched.entered[module] if watched else 0
    made = [(c, n) for (m, c), n in watched.made.items() if m is module] if watched else []
    weight = getattr(module, getattr(module, "packed_weight", None) or "weight", None)
    weight = next(module.parameters(recurse=False), None) if weight is None else weight
    dtype = str(getattr(weight, "dtype", "")).removeprefix("torch.")
    reason = unswappable(module)
    if not isinstance(module, Swapped):
        status = "forward overridden" if reason == FORWARD_OVERRIDDEN else "not swapped"
        reason = reason or "optimize() was not applied to it, or filter_fn kept it"
        return [Row(fqn, name, status, "torch", "", dtype, reason, entered)]
    pair = getattr(module, "_fold", None)
    if pair is not None and module is pair.norm:
        why = pair.obstacle()
        status = ("torch", "torch", f"not folded into {pair.conv_name} now: {why}")
        status = status if why else ("fastdl", f"in {pair.conv_name}", f"folded into {pair.conv_name}")
        return [Row(fqn, name, status[0], status[1], "", dtype, status[2], entered)]
    if pair is not None and pair.holds():
        note = "; ".join(filter(None, (reason, f"with {pair.norm_name} folded in")))
    elif reason is None and not isinstance(module, module.stock_class):
        stock = module.stock_class.__name__
        note = f"isinstance(module, torch.nn.{stock}) is False while swapped: what looks for that passes it by"
    else:
        note = reason or ""
    if made:
        status = "fastdl, frozen" if module._pack is not None else "fastdl"
        several = len({c.op for c, _ in made}) > 1
        return [_call_row(fqn, f"{name}: {c.op}" if several else name, c, n, status, note) for c, n in made]
    if reason is not None:
        return [Row(fqn, name, "forward overridden", "torch", "", dtype, reason, entered)]
    if watched is None:
        return [Row(fqn, name, "fastdl", UNKNOWN, "", dtype, note, 0)]
    if entered:
        return [Row(fqn, name, "fastdl", "those of the layers inside", "", dtype, "", entered)]
    if runner is not None:
        return [Row(fqn, name, "fastdl", f"in {runner}", "", dtype, f"run by {runner}", 0)]
    return [Row(fqn, name, "not called", UNKNOWN, "", dtype, "this run did not call it", 0)]


def _call_row(fqn: str, name: str, made: calls.Call, count: int, status: str = "fastdl", note: str = "") -> Row:
    shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in made.shapes)
    dtype = str(made.dtype).removeprefix("torch.")
    if made.recomputed:
        note = "; ".join(filter(None, (note, f"{made.recomputed} elements recomputed by FMA: Inf, NaN or tiny values")))
    return Row(fqn, name, "torch" if made.reason else status, made.kernel, shapes, dtype, made.reason or note, count)
