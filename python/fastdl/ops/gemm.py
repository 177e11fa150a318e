"""linear and matmul, forward and backward.

    linear   y[..., N] = x[..., K] @ w[N, K]^T + b[N]
             dx = dy @ w        dw = sum over rows of dy^T x        db = sum over rows of dy
    matmul   c[..., M, N] = a[..., M, K] @ b[..., K, N]
             da = dc @ b^T      db = a^T @ dc      each summed over the batch dimensions it was broadcast along

Every gradient is again one of linear, matmul, linear_wgrad (dw) and sum_rows (db), and so are theirs: the four close
under differentiation.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import functional as F

from fastdl import _C
from fastdl.ops import cuda, cuda_gemm, gemm_native, reference, shapes
from fastdl.ops import gemm_library as _registered  # noqa: F401  (defines torch.ops.fastdl)
from fastdl.ops.plain import MAX_BATCH_DIMS, eager_is_plain, is_plain
from fastdl.ops.route import Operation, call


# --- public ------------------------------------------------------------------------------------------------------
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.linear`, and what often follows it: y = activation(x @ w^T + b) + residual, in one pass.

    input [..., K], weight [N, K], bias [N] or None -> [..., N]; any strides, nothing is copied. float32,
    bfloat16 and float16 on the CPU run fastdl's kernels, which sum in float32 and round once; at level amx
    `torch.backends.mkldnn.matmul.fp32_precision` says how exact products of float32 must be. float64 runs the
    reference; every other call is handed to torch and recorded with the reason. torch.autocast casts as in torch.

    Args:
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu". Its gradient needs what it is applied to,
            which is kept for the backward pass; differentiating twice computes that again.
        residual: of the shape of the output, added last. One that is not contiguous is copied.

    Raises TypeError for an argument that is not a tensor, RuntimeError for shapes, dtypes or devices that do not fit
    together. Unlike torch, a mix of meta and cpu tensors is an error, too.
    """
    # The short way, for what nearly every eager call is. It may skip torch.library and autograd only because
    # nothing that hooks into them is there; whatever is not obviously plain takes the general path.
    if activation is not None or residual is not None:
        from fastdl.ops.fused import linear_fused  # here: it builds on this module

        return linear_fused(input, weight, bias, residual, activation)
    if not is_dynamo_compiling():
        out = _C.plain_linear(input, weight, bias, None)
        if out is True:
            return apply_plain_linear(input, weight, bias, None)
        if out is not None:
            return out
    return call(LINEAR, input, weight, bias, constants=(None,))


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """`torch.matmul`: c = a @ b over broadcast batch dimensions.

    input [..., M, K], other [..., K, N] -> [..., M, N]; a 1-D input is a row, a 1-D other a column, and that dimension
    is missing from the result. Dtypes, hand-backs and errors as in `linear`.
    """
    if not is_dynamo_compiling():
        out = _C.plain_matmul(input, other)
        if out is True:
            return _apply_plain_matmul(input, other)
        if out is not None:
            return out
    return call(_MATMUL, input, other)


def linear_wgrad(grad: Tensor, input: Tensor) -> Tensor:
    """The weight gradient of linear, differentiable: grad [..., N], input [..., K] -> [N, K]."""
    return call(_LINEAR_WGRAD, grad, input)


def sum_rows(x: Tensor) -> Tensor:
    """The bias gradient of linear, differentiable: x [..., N] -> [N]."""
    return call(_SUM_ROWS, x)


# --- autograd ----------------------------------------------------------------------------------------------------
def backend(*tensors: Tensor | None) -> Any:
    """Who computes a gradient from these: an object with linear, matmul, linear_wgrad and sum_rows."""
    if is_compiling():
        return torch.ops.fastdl
    if not torch.is_grad_enabled() and eager_is_plain() and all(map(is_plain, tensors)):
        return gemm_native
    return _DIFFERENTIABLE  # create_graph=True, transforms, modes


def _linear_gradients(
    ctx: Any, grad: Tensor, input: Tensor | None, weight: Tensor | None, run: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias, each where needed, and None for the pack."""
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        run.matmul(grad, weight) if needs_input else None,
        run.linear_wgrad(grad, input) if needs_weight else None,
        run.sum_rows(grad) if needs_bias else None,
        None,
    )


class LinearFunction(Function):
    """linear as a node of the graph, its forward through the dispatcher; packed: the weight's frozen pack, or None."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
        return torch.ops.fastdl.linear(input, weight, bias, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight = inputs[:2]
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors  # once: torch's checkpoints allow no second reading
        return _linear_gradients(ctx, grad, input, weight, backend(grad, input, weight))


class MatmulFunction(Function):
    """matmul as a node of the graph, its forward through the dispatcher."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, other: Tensor) -> Tensor:
        return torch.ops.fastdl.matmul(input, other)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, other = inputs
        needs_input, needs_other = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_other else None, other if needs_input else None)
        ctx.shapes = input.shape, other.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        a_shape, b_shape = ctx.shapes
        needs_a, needs_b = ctx.needs_input_grad
        run = backend(grad, a, b)
        # A 1-D operand is a matrix of one row or column; grad gets back the dimension that the product lost.
        if len(b_shape) == 1:
            grad = grad.unsqueeze(-1)
            b = b if b is None else b.unsqueeze(-1)
        if len(a_shape) == 1:
            grad = grad.unsqueeze(-2)
            a = a if a is None else a.unsqueeze(0)
        da = db = None
        if needs_a:
            da = run.matmul(grad, b.mT)
            da = da.sum_to_size(1, *a_shape).view(a_shape) if len(a_shape) == 1 else da.sum_to_size(a_shape)
        if needs_b:
            if len(b_shape) == 2:  # one b for the whole batch: rows of all of it, without a product for each
                db = run.linear_wgrad(a.expand(*grad.shape[:-2], *a.shape[-2:]), grad)
            else:
                db = run.matmul(a.mT, grad)
                db = db.sum_to_size(*b_shape, 1).squeeze(-1) if len(b_shape) == 1 else db.sum_to_size(b_shape)
        return da, db


class LinearWgradFunction(Function):
    """linear_wgrad as a node of the graph: bilinear, so its gradients are a linear and a matmul."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, input: Tensor) -> Tensor:
        return torch.ops.fastdl.linear_wgrad(grad, input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad, input = ctx.saved_tensors
        needs_grad, needs_input = ctx.needs_input_grad
        run = backend(outer, grad, input)
        return (
            run.linear(input, outer, None) if needs_grad else None,
            run.matmul(grad, outer) if needs_input else None,
        )


class SumRowsFunction(Function):
    """sum_rows as a node of the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.ops.fastdl.sum_rows(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        return outer.expand(ctx.shape)


class _PlainLinear(LinearFunction):
    """LinearFunction for arguments known to be plain: its forward calls the kernel, its backward looks at grad only."""

    forward = staticmethod(gemm_native.linear)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_gradients(ctx, grad, *ctx.saved_tensors, backend(grad))


class _PlainMatmul(MatmulFunction):
    """MatmulFunction for arguments known to be plain: its forward calls the kernel."""

    forward = staticmethod(gemm_native.matmul)


# Function.apply binds the signature by inspection on every call (22 us of an 8x8 call's 27) and dispatches functorch
# transforms; where none is active, the method under it does the same in 5.
apply_plain_linear = super(Function, _PlainLinear).apply
_apply_plain_matmul = super(Function, _PlainMatmul).apply


# --- the table ---------------------------------------------------------------------------------------------------
def linear_unsupported(input: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any) -> str | None:
    """Why shapes that torch takes are left to it, or None; RuntimeError for those that torch refuses as well."""
    if weight.ndim == 1:
        return "weight is 1-D"
    if input.ndim - 2 > MAX_BATCH_DIMS:
        return f"more than {MAX_BATCH_DIMS} batch dimensions"
    if bias is not None and bias.shape != weight.shape[:1]:
        out = shapes.linear(input, weight, None)
        padded = (1,) * (len(out) - bias.ndim) + tuple(bias.shape)
        if len(padded) == len(out) and all(x in (1, y) for x, y in zip(padded, out, strict=True)):
            return "bias is broadcast"
    shapes.linear(input, weight, bias)
    return None


def _matmul_unsupported(input: Tensor, other: Tensor) -> str | None:
    shapes.matmul(input, other)
    return f"more than {MAX_BATCH_DIMS} batch dimensions" if max(input.ndim, other.ndim) - 2 > MAX_BATCH_DIMS else None


def linear_plan(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> str:
    """The kernel that `linear` runs for these."""
    if out.dtype is torch.float64:
        return "reference"
    if cuda.runs(out):
        return cuda_gemm.linear_plan(out, input, weight)
    return _C.linear_plan(out, input, weight, packed is not None)["kernel"]


def _matmul_plan(out: Tensor, input: Tensor, other: Tensor) -> str:
    if out.dtype is torch.float64:
        return "reference"
    if cuda.runs(out):
        return cuda_gemm.matmul_plan(out, input, other)
    a = input.unsqueeze(0) if input.ndim == 1 else input
    b = other.unsqueeze(1) if other.ndim == 1 else other
    return _C.matmul_plan(out.new_empty(shapes.matmul(a, b)), a, b)["kernel"]


LINEAR = Operation(
    name="linear",
    arguments=("input", "weight", "bias"),
    optional=("bias",),
    torch_function=lambda input, weight, bias, packed: F.linear(input, weight, bias),
    overload=torch.ops.fastdl.linear.default,
    function=LinearFunction,
    unsupported=linear_unsupported,
    plan=linear_plan,
    autocast=True,
    unsupported_on_cuda=lambda *args: None,
)
_MATMUL = Operation(
    name="matmul",
    arguments=("input", "other"),
    torch_function=torch.matmul,
    overload=torch.ops.fastdl.matmul.default,
    function=MatmulFunction,
    unsupported=_matmul_unsupported,
    plan=_matmul_plan,
    autocast=True,
    unsupported_on_cuda=lambda *args: None,
)
_LINEAR_WGRAD = Operation(
    name="linear_wgrad",
    arguments=("grad", "input"),
    torch_function=reference.linear_wgrad,
    overload=torch.ops.fastdl.linear_wgrad.default,
    function=LinearWgradFunction,
    unsupported=lambda grad, input: None,
    unsupported_on_cuda=lambda *args: None,
    plan=lambda out, grad, input: "gemm",
)
_SUM_ROWS = Operation(
    name="sum_rows",
    arguments=("x",),
    torch_function=reference.sum_rows,
    overload=torch.ops.fastdl.sum_rows.default,
    function=SumRowsFunction,
    unsupported=lambda x: None,
    unsupported_on_cuda=lambda *args: None,
    plan=lambda out, x: "sum_rows",
)

_DIFFERENTIABLE = SimpleNamespace(linear=linear, matmul=matmul, linear_wgrad=linear_wgrad, sum_rows=sum_rows)
