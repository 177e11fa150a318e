"""freeze and unfreeze: packs that persist across calls."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn

from fastdl.nn.swapped import Swapped
from fastdl.ops.plain import KERNEL_DTYPES, is_plain
from fastdl.optimize import REGISTRY, derived_reason, named_layers

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, max_bytes: int | None = None) -> Model:
    """Pack the weights of every swapped layer for reuse across calls; returns `model`.

    Freezing again packs anew.

    For weights that will not change: a pack holds the contents of this moment, and no cheap test notices every later
    write (fused optimizers and `p.data` leave no trace). Writing weights of a frozen model without `unfreeze` is an
    error that goes unnoticed unless FASTDL_CHECK_FROZEN=1 was set before `freeze`: then each call compares contents
    and raises RuntimeError naming the layer. Gradients flow as without packs.

    A pack takes up to four bytes (level amx, float32: six) for each element of its weight, whatever the dtype, and
    rounds its rows up to a panel, of 64 at most. It is no part of the state dict, and is dropped when the layer is
    copied, pickled, moved, converted, or loaded into. Recurrent layers pack anew in every call.

    Args:
        model: a module that `optimize` has been applied to.
        max_bytes: what the packs may take together; layers are packed in the model's order until one does not fit.

    Warns:
        UserWarning naming the layers left unfrozen, and when there is nothing to freeze.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastdl.freeze: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"fastdl.freeze: argument 'max_bytes': expected None or at least 0, got {max_bytes}")
    packs: dict[Any, Any] = {}  # by identity of the weight: tied layers share one
    left: list[str] = []
    frozen = spent = 0
    full = False
    unfreeze(model)
    for fqn, module in named_layers(model):
        if isinstance(module, Swapped) and module.packed_weight is None:
            continue  # the layers inside have the weights
        reason = _unpackable(module)
        key = None if reason is not None else module.pack_key()
        if reason is None and key not in packs:
            size = module.pack_size()
            full = full or (max_bytes is not None and spent + size > max_bytes)
            if full:
                reason = f"its pack of {size} bytes does not fit max_bytes={max_bytes} with {spent} spent before it"
            else:
                packs[key] = module.make_pack(fqn)
                spent += size
        if reason is None:
            module._pack = packs[key]
            frozen += 1
        elif isinstance(module, Swapped):
            left.append(f"{fqn}: {reason}")
    if left:
        warnings.warn("fastdl.freeze: left unfrozen: " + "; ".join(left), stacklevel=2)
    elif not frozen:
        swapped = any(isinstance(module, Swapped) for module in model.modules())
        why = "no weights that are packed between calls" if swapped else "no swapped layer: optimize it first"
        warnings.warn(f"fastdl.freeze: {type(model).__name__} has {why}", stacklevel=2)
    return model


def unfreeze(model: Model) -> Model:
    """Drop the packs of every layer of `model`; returns `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastdl.unfreeze: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Swapped):
            module.drop_pack()
    return model


def _unpackable(module: nn.Module) -> str | None:
    """Why this layer gets no pack, or None."""
    if type(module) not in REGISTRY.values():
        return derived_reason(module)
    if module.unpackable is not None:
        return module.unpackable
    weight = getattr(module, module.packed_weight)
    if weight is None:
        return "query, key and value have weights of their own, which are not packed"
    if not is_plain(weight) or weight.dtype not in KERNEL_DTYPES:
        got = f"{type(weight).__name__} of {weight.dtype} on {weight.device}"
        return f"expected a float32, bfloat16 or float16 weight on cpu, got {got}"
    return "its weight is empty" if weight.numel() == 0 else None
