"""Operands of benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdl.bench import place


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values; a large tensor repeats a block of odd length, which takes less time."""
    generator = torch.Generator().manual_seed(seed)
    size, block = math.prod(shape), (1 << 22) + 1
    values = torch.randn(min(size, block), generator=generator).to(dtype)
    values = values.repeat(math.ceil(size / block))[:size] if size > block else values
    return values.view(shape).to(place.device())
