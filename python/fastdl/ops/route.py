"""The general path of every operation: all checks, all modes, and a reason for each call handed to torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

from fastdl import _C
from fastdl.ops import calls, cuda
from fastdl.ops.plain import DTYPES, HAS_VECTOR_LEVEL

# torch.export writes programs that load without fastdl, unless FASTDL_EXPORT_OPS=1 asks to keep its operations.
EXPORT_OPS = os.environ.get("FASTDL_EXPORT_OPS", "0") not in ("", "0")
_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # exactly these: a subclass may redefine any operation
# Tensors that stand for a plain one while torch traces; the registered operations know what to do with them.
_TRACING_TYPES = (FakeTensor, FunctionalTensor)


@dataclass(frozen=True)
class Operation:
    """One operation as a table row: what it is called, how it is checked, who else can run it."""

    name: str
    arguments: tuple[str, ...]
    torch_function: Callable[..., Tensor]  # runs what is handed back
    overload: Callable[..., Tensor]  # torch.ops.fastdl.<name>
    function: Any  # the autograd.Function around it, or whatever has an `apply` that goes through one
    unsupported: Callable[..., str | None]  # why shapes that torch takes are not taken; raises where nobody takes them
    plan: Callable[..., str]  # (out, *arguments) -> the kernel's name, for `explain`
    optional: tuple[str, ...] = ()  # arguments that may be None
    own_dtype: tuple[str, ...] = ()  # arguments whose dtype may differ from the others'; `unsupported` checks them
    autocast: bool = False  # whether torch.autocast casts its tensors
    cast: Callable[..., Any] | None = None  # (args, dtype, *constants) -> args as autocast casts them; None: all alike
    several: bool = False  # whether all of several results are wanted, or the first
    # As `unsupported`, asked of CUDA tensors on top of it; None: the operation has no CUDA kernels.
    unsupported_on_cuda: Callable[..., str | None] | None = None


def call(op: Operation, *args: Any, constants: tuple[Any, ...] = (), more: tuple[str, ...] = ()) -> Any:
    """Run op on tensors of any kind: by fastdl, with autograd where needed, or by torch with the reason recorded.

    `constants` follow the tensors as further arguments; nothing is asked of them. `more` names the tensors beyond
    op.arguments.
    """
    tensors = _given(op, args, more)
    reason = handback_reason(op.name, tensors)
    if reason is None:
        device = tensors[op.arguments[0]].device.type
        if op.autocast and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            args = _cast(args, dtype) if op.cast is None else op.cast(args, dtype, *constants)
            tensors = _given(op, args, more)
        reason = _reason_from_dtype(op, tensors) or op.unsupported(*args, *constants)
        if reason is None and (device != "cpu" or cuda.twin_active):
            reason = _reason_on_cuda(op, *args, *constants)
    before = _recomputed()
    if reason is not None:
        calls.handback(op.name, reason)
        out = op.torch_function(*args, *constants)
    elif _needs_autograd(tensors):
        every = (*args, *constants)
        out = op.function.apply(*(_distinct(every) if is_compiling() else every))
    else:
        out = op.overload(*args, *constants)
    first = out[0] if isinstance(out, tuple) else out
    if not is_compiling() and calls.observer is not None:
        traced = any(isinstance(x, _TRACING_TYPES) for x in tensors.values())
        kernel = "torch" if reason else "no kernel: traced" if traced else op.plan(first, *args, *constants)
        sizes = calls.shapes(tensors.values())
        calls.observer(calls.Call(op.name, kernel, sizes, first.dtype, reason or "", _recomputed() - before))
    return out if op.several else first


@calls.run_while_tracing
def _recomputed() -> int:
    return _C.recomputed()


def _reason_on_cuda(op: Operation, *args: Any) -> str | None:
    if op.unsupported_on_cuda is None:
        return "the operation has no CUDA kernels"
    return op.unsupported_on_cuda(*args)


def _given(op: Operation, args: tuple[Tensor | None, ...], more: tuple[str, ...]) -> dict[str, Tensor]:
    given = zip(op.arguments + more, args, strict=True)
    return {name: x for name, x in given if x is not None or name not in op.optional}


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """Each tensor once, further ones as views of it: Dynamo refuses an autograd.Function that is given one twice."""
    out: list[Any] = []
    for i, x in enumerate(args):
        out.append(x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in args[:i]) else x)
    return out


def _cast(args: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """What torch.autocast does to the arguments of a matrix product: all floating-point ones but float64 are cast."""
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in args
    )


def _needs_autograd(tensors: dict[str, Tensor]) -> bool:
    if _exporting():  # the program is to hold the operation itself
        return False
    # Inside torch.func a tensor's requires_grad says nothing of the levels further out: always take the Function.
    if _transforms_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())


@calls.run_while_tracing  # torch 2.10 folds the bare call to True in everything it compiles
def _exporting() -> bool:
    return is_exporting()


@calls.run_while_tracing
def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def handback_reason(op: str, tensors: dict[str, Tensor]) -> str | None:
    """Why torch should run this call, dtypes aside, or None. TypeError and RuntimeError for what torch refuses too."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            if hasattr(type(x), "__torch_function__"):  # e.g. a torch.fx proxy
                return f"{name} is a {type(x).__name__}"
            raise TypeError(f"fastdl.{op}: argument '{name}': expected a torch.Tensor, got {type(x).__name__}")
    return _reason_from_context(tensors) or _reason_from_kind(op, tensors)


def _reason_from_context(tensors: dict[str, Tensor]) -> str | None:
    if not (HAS_VECTOR_LEVEL or cuda.twin_active or any(x.is_cuda for x in tensors.values())):
        return "this build has no vector level"
    if _exporting() and not EXPORT_OPS:
        return "torch.export (FASTDL_EXPORT_OPS=1 keeps fastdl's operations)"
    if not is_compiling() and torch._C._is_tracing():
        return "torch.jit.trace"
    if _transforms_active():
        if is_compiling():
            return "torch.func inside torch.compile"  # Dynamo would inline the Function and lose its gradient
        if any(level.key() == _FUNCTIONALIZE for level in torch._C._functorch.get_interpreter_stack() or ()):
            return "torch.func.functionalize"  # has no rule for an autograd.Function
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def _reason_from_kind(op: str, tensors: dict[str, Tensor]) -> str | None:
    for name, x in tensors.items():
        if type(x) not in _PLAIN_TYPES and not isinstance(x, _TRACING_TYPES):
            return f"{name} is a {type(x).__name__}"
    if len({x.device for x in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise RuntimeError(f"fastdl.{op}: expected all tensors on one device, got {got}")
    for name, x in tensors.items():
        if x.device.type == "cuda":
            if (why := cuda.reason(x.device)) is not None:
                return why
        elif x.device.type != "cpu":
            return f"{name} is on {x.device.type}"
        if x.is_quantized:
            return f"{name} is quantized"
        if x.layout != torch.strided or x.is_nested:
            return f"{name} is {'nested' if x.is_nested else _short(x.layout)}"
    return None


def _reason_from_dtype(op: Operation, tensors: dict[str, Tensor]) -> str | None:
    tensors = {name: x for name, x in tensors.items() if name not in op.own_dtype}
    dtypes = [x.dtype for x in tensors.values()]
    if any(dtype != dtypes[0] for dtype in dtypes):
        got = ", ".join(f"{name} {_short(x.dtype)}" for name, x in tensors.items())
        raise RuntimeError(f"fastdl.{op.name}: expected tensors of one dtype, got {got}")
    return None if dtypes[0] in DTYPES else f"dtype {_short(dtypes[0])}"


def _short(torch_constant: object) -> str:
    """torch.float32 -> float32."""
    return str(torch_constant).removeprefix("torch.")
