"""Output shapes of the GEMM operations: RuntimeError where the arguments do not fit. Sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor


def refuse(op: str, argument: str, expected: str, got: Tensor) -> NoReturn:
    """RuntimeError naming operation, argument, what was expected and the shape that came."""
    raise RuntimeError(f"fastdl.{op}: argument '{argument}': expected {expected}, got shape {list(got.shape)}")


def require(condition: bool, op: str, argument: str, expected: str, got: Tensor) -> None:
    """`refuse` unless the condition holds."""
    if not condition:
        refuse(op, argument, expected, got)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """input [..., K], weight [N, K], bias [N] -> [..., N]."""
    require(input.ndim >= 1, "linear", "input", "at least 1 dimension", input)
    require(weight.ndim == 2, "linear", "weight", "2 dimensions, [N, K]", weight)
    N, K = weight.shape
    require(input.shape[-1] == K, "linear", "input", f"[..., {K}] to match weight {list(weight.shape)}", input)
    if bias is not None:
        require(bias.ndim == 1 and bias.shape[0] == N, "linear", "bias", f"shape [{N}]", bias)
    return (*input.shape[:-1], N)


def linear_packed(input: Tensor, out_features: int, bias: Tensor | None) -> tuple[int, ...]:
    """input [..., K], bias [N] -> [..., N] for a pack of weight [N, K]."""
    require(input.ndim >= 1, "linear_packed", "input", "at least 1 dimension", input)
    if bias is not None:
        fits = bias.ndim == 1 and bias.shape[0] == out_features
        require(fits, "linear_packed", "bias", f"shape [{out_features}]", bias)
    return (*input.shape[:-1], out_features)


def matmul(input: Tensor, other: Tensor) -> tuple[int, ...]:
    """input [..., M, K], other [..., K, N] -> [..., M, N]; a 1-D operand is a row (input) or a column (other)."""
    require(input.ndim >= 1, "matmul", "input", "at least 1 dimension", input)
    require(other.ndim >= 1, "matmul", "other", "at least 1 dimension", other)
    K = other.shape[-2] if other.ndim > 1 else other.shape[0]
    require(input.shape[-1] == K, "matmul", "input", f"[..., {K}] to match other {list(other.shape)}", input)
    rows = input.shape[-2:-1]
    columns = other.shape[-1:] if other.ndim > 1 else ()
    batch = _broadcast(input.shape[:-2], other.shape[:-2], input, other)
    return (*batch, *rows, *columns)


def _broadcast(a: Sequence[int], b: Sequence[int], input: Tensor, other: Tensor) -> list[int]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    batch = list(longer)
    for i in range(1, len(shorter) + 1):
        x, y = longer[-i], shorter[-i]
        fits = x == y or x == 1 or y == 1
        require(fits, "matmul", "other", f"a batch that broadcasts with input {list(input.shape)}", other)
        batch[-i] = y if x == 1 else x
    return batch


def linear_wgrad(grad: Tensor, input: Tensor) -> tuple[int, int]:
    """grad [..., N], input [..., K] of equal leading dimensions -> [N, K]."""
    require(grad.ndim >= 1, "linear_wgrad", "grad", "at least 1 dimension", grad)
    fits = grad.ndim == input.ndim and grad.shape[:-1] == input.shape[:-1]
    require(fits, "linear_wgrad", "grad", f"the leading dimensions of input {list(input.shape)}", grad)
    return (grad.shape[-1], input.shape[-1])


def sum_rows(x: Tensor) -> tuple[int]:
    """x [..., N] -> [N]."""
    require(x.ndim >= 1, "sum_rows", "x", "at least 1 dimension", x)
    return (x.shape[-1],)


def linear_fused(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[int, ...]:
    """`linear`, and a residual of the output's shape."""
    shape = linear(input, weight, bias)
    if residual is not None:
        require(tuple(residual.shape) == shape, "linear", "residual", f"the output's shape {list(shape)}", residual)
    return shape
