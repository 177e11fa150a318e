"""Operands of benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values; a large tensor repeats a block of odd length, which takes less time."""
    generator = torch.Generator().manual_seed(seed)
    size, block = math.prod(shape), (1 << 22) + 1
    values = torch.randn(min(size, block), generator=generator).to(dtype)
    return values.repeat(math.ceil(size / block))[:size].view(shape) if size > block else values.view(shape)
