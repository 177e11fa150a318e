"""optimize and restore: swapping modules in place by setting their class."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

from fastdl.fold import fold, unfold
from fastdl.nn import (
    GRU,
    LSTM,
    RNN,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    GRUCell,
    Linear,
    LSTMCell,
    MultiheadAttention,
    NonDynamicallyQuantizableLinear,
    RNNCell,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastdl.nn.folded import FOLDED
from fastdl.nn.swapped import Swapped

FORWARD_OVERRIDDEN = "forward overridden on the instance: the class is called only if that calls it"

Model = TypeVar("Model", bound=nn.Module)

# Stock class -> fastdl class with the same attributes. A new operation adds its rows here; those of other libraries
# come with `_integrate`.
REGISTRY: dict[type[nn.Module], type[Swapped]] = {
    cls.stock_class: cls
    for cls in (
        Linear,
        NonDynamicallyQuantizableLinear,
        Conv1d,
        Conv2d,
        Conv3d,
        ConvTranspose1d,
        ConvTranspose2d,
        ConvTranspose3d,
        MultiheadAttention,
        TransformerEncoderLayer,
        TransformerDecoderLayer,
        LSTM,
        GRU,
        RNN,
        LSTMCell,
        GRUCell,
        RNNCell,
    )
}


def optimize(
    model: Model,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    fold_batchnorm: bool = False,
) -> Model:
    """Set the class of every known layer of `model` to its fastdl counterpart, in place, and return `model`.

    Parameters, buffers, hooks, names, state dicts and optimizers stay what they are. Known are exact types only; a
    subclass is left alone. Doing it twice does nothing more; `restore` undoes it. Where transformers is imported, its
    Conv1D is known, too, and attn_implementation="fastdl" is registered.

    Args:
        model: any module; itself swapped when it is a known layer.
        filter_fn: `filter_fn(module, fqn) -> bool`, asked for each layer that could be swapped; False leaves it.
        strict: RuntimeError, with `model` untouched, naming every layer that could not be swapped and the reason.
        fold_batchnorm: in eval mode, have each convolution do the work of the batch norm that takes its result, where
            torch.fx or an nn.Sequential shows that nothing else does. Parameters and buffers stay untouched, training
            mode computes the two apart, and `explain` names the pairs. The folded weight is made on each call, once
            after `freeze`. Copies and pickles are not folded. Before changing how the model calls these layers,
            `restore` it. filter_fn is asked for each batch norm, too.

    Warns:
        UserWarning when `model` ends up without any fastdl layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastdl.optimize: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")
    _integrate()
    swaps: list[nn.Module] = []
    left: list[str] = []
    present = 0
    for fqn, module in named_layers(model):
        reason = unswappable(module)
        if isinstance(module, Swapped):
            present += 1
        elif reason is not None:
            left.append(f"{fqn} ({type(module).__name__}): {reason}")
        elif filter_fn is None or filter_fn(module, fqn):
            swaps.append(module)
    if strict and left:
        raise RuntimeError("fastdl.optimize: strict=True, and these layers cannot be swapped:\n  " + "\n  ".join(left))
    for module in swaps:
        module.__class__ = REGISTRY[type(module)]
    if fold_batchnorm:
        fold(model, filter_fn)
    if not swaps and not present:
        found = "; left alone: " + ", ".join(left) if left else ""
        warnings.warn(f"fastdl.optimize: nothing was swapped in {type(model).__name__}{found}", stacklevel=2)
    return model


def _integrate() -> None:
    """Take in what other libraries bring, once they are imported; nothing is imported for their sake."""
    if "transformers.modeling_utils" in sys.modules:
        try:
            from fastdl.integrations.transformers import Conv1D
        except ImportError:  # older than the interfaces that it registers with
            return
        REGISTRY.setdefault(Conv1D.stock_class, Conv1D)


def restore(model: Model) -> Model:
    """Set every swapped layer of `model` back to its stock class, in place, and return `model`.

    Only exact fastdl classes are touched. A layer whose class was derived from one since (by a parametrisation or
    fully_shard) is left as it is, with a UserWarning naming it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastdl.restore: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")
    left: list[str] = []
    for fqn, module in named_layers(model):
        if type(module) in REGISTRY.values() or type(module) in FOLDED.values():
            module.drop_pack()
            unfold(module)
            module.__class__ = type(module).stock_class
        elif isinstance(module, Swapped):
            left.append(f"{fqn} ({type(module).__name__}): {derived_reason(module)}")
    if left:
        warnings.warn("fastdl.restore: left as they are: " + ", ".join(left), stacklevel=2)
    return model


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that concern fastdl, each once: (name or "(model)" for the root, module)."""
    for fqn, module in model.named_modules():
        if isinstance(module, (Swapped, *REGISTRY)):
            yield fqn or "(model)", module


def unswappable(module: nn.Module) -> str | None:
    """Why a layer of a known kind cannot be swapped, or None."""
    if "forward" in module.__dict__:
        return FORWARD_OVERRIDDEN
    if type(module) in REGISTRY or isinstance(module, Swapped):
        return None
    return derived_reason(module)


def derived_reason(module: nn.Module) -> str:
    """How the class of this module came to differ from the one it derives from."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: call the model once, then optimize it"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrised"
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ())):
        return "wrapped by fully_shard"
    return f"a subclass, {type(module).__module__}.{type(module).__qualname__}"
