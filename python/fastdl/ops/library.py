"""torch.ops.fastdl: the library object, and how an operation enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("fastdl", "DEF")  # the registrations live as long as this object


def register(
    schema: str,
    native: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    flops: Callable[..., int] | None,
    raw_flops: bool = False,
    exact_strides: bool = False,
) -> None:
    """Define torch.ops.fastdl.<name> by its schema, CPU implementation, fake, vmap rule and FLOP count.

    `flops` gets the shapes of the tensors, with `raw_flops` the tensors themselves. exact_strides: Inductor is to keep
    the layouts that eager tensors had; without it, it need not, since the kernels take any strides.
    """
    layout = torch.Tag.needs_exact_strides if exact_strides else torch.Tag.flexible_layout
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, layout))
    name = schema.partition("(")[0]
    _library.impl(name, native, "CPU")
    torch.library.register_fake(f"fastdl::{name}", fake, lib=_library)
    torch.library.register_vmap(f"fastdl::{name}", vmap, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.fastdl, name), get_raw=raw_flops)(flops)
