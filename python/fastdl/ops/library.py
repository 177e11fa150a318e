"""torch.ops.fastdl: the library object, and how an operation enters it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastdl.ops import cuda as cuda_module

_library = torch.library.Library("fastdl", "DEF")  # the registrations live as long as this object


def register(
    schema: str,
    native: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    flops: Callable[..., int] | None,
    raw_flops: bool = False,
    exact_strides: bool = False,
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Define torch.ops.fastdl.<name> by its schema, CPU implementation, fake, vmap rule and FLOP count.

    `cuda` implements it for CUDA tensors, with the signature of `native`; under the host twin for CPU tensors too.
    `flops` gets the shapes of the tensors, with `raw_flops` the tensors themselves. exact_strides: Inductor is to keep
    the layouts that eager tensors had; without it, it need not, since the kernels take any strides.
    """
    layout = torch.Tag.needs_exact_strides if exact_strides else torch.Tag.flexible_layout
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, layout))
    name = schema.partition("(")[0]
    _library.impl(name, _on_cpu(name, native, cuda), "CPU")
    if cuda is not None:
        _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"fastdl::{name}", fake, lib=_library)
    torch.library.register_vmap(f"fastdl::{name}", vmap, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastdl, name), get_raw=raw_flops)(flops)


def _on_cpu(name: str, native: Callable[..., Any], cuda: Callable[..., Any] | None) -> Callable[..., Any]:
    @functools.wraps(native)
    def run(*args: Any) -> Any:
        if not cuda_module.twin_active:
            return native(*args)
        if cuda is None:
            raise RuntimeError(f"fastdl.{name}: no CUDA kernels for this operation")
        return cuda(*args)

    return run
