"""linear with an epilogue: y = activation(x @ w^T + b) + residual.

    dz = dy * activation'(z)    dx, dw, db from dz as in linear    dresidual = dy

z is written by the forward pass where a gradient is needed. A gradient that is differentiated again must depend on the
input and the weight through z, so that backward pass computes z anew, by operations that autograd sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fastdl.ops import gemm_native, reference, shapes
from fastdl.ops.gemm import backend, linear, linear_plan, linear_unsupported
from fastdl.ops.plain import is_plain, plain_linear_shape
from fastdl.ops.route import Operation, call


def linear_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    packed: Tensor | None = None,
) -> Tensor:
    """activation(linear(input, weight, bias)) + residual; see `ops.gemm.linear`. packed: the weight's frozen pack."""
    if activation is not None and activation not in reference.ACTIVATIONS:
        known = ", ".join(map(repr, reference.ACTIVATIONS))
        raise RuntimeError(f"fastdl.linear: argument 'activation': expected None, {known}, got {activation!r}")
    if not is_compiling() and _is_plain_call(input, weight, bias, residual):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias, residual)):
            return _apply_plain(input, weight, bias, residual, activation, packed)[0]
        return gemm_native.linear_fused(input, weight, bias, residual, activation, False, packed)[0]
    if torch.is_autocast_enabled("cpu"):  # the weight may be cast, and the pack is not of that
        packed = None
    return call(_LINEAR_FUSED, input, weight, bias, residual, constants=(activation, packed))


def _is_plain_call(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    shape = plain_linear_shape(input, weight, bias)
    if shape is None or residual is None:
        return shape is not None
    return is_plain(residual) and residual.dtype is input.dtype and tuple(residual.shape) == shape


def activation_gradient(activation: str | None, grad: Tensor, saved: tuple[Tensor | None, ...], run: Any) -> Tensor:
    """The gradient of what the activation was applied to; saved by LinearFusedFunction, run from `backend`."""
    if activation is None:
        return grad
    input, weight, bias, pre = saved
    if torch.is_grad_enabled() and not is_compiling():
        return reference.activation_grad(grad, linear(input, weight, bias), activation)
    native = run if run is gemm_native else torch.ops.fastdl
    return native.activation_grad(grad, pre, activation)


class LinearFusedFunction(Function):
    """linear_fused as a node of the graph; its second result, z, is for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        save_pre = activation is not None
        return torch.ops.fastdl.linear_fused(input, weight, bias, residual, activation, save_pre, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, _, ctx.activation, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, None if ctx.activation is None else output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        saved = ctx.saved_tensors  # once: torch's checkpoints allow no second reading
        input, weight, _bias, pre = saved
        needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        run = backend(grad, input, weight, pre)
        dz = activation_gradient(ctx.activation, grad, saved, run)
        return (
            run.matmul(dz, weight) if needs_input else None,
            run.linear_wgrad(dz, input) if needs_weight else None,
            run.sum_rows(dz) if needs_bias else None,
            grad if needs_residual else None,
            None,
            None,
        )


class _PlainLinearFused(LinearFusedFunction):
    """LinearFusedFunction for arguments known to be plain: its forward calls the kernel."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return gemm_native.linear_fused(input, weight, bias, residual, activation, activation is not None, packed)


_apply_plain = super(Function, _PlainLinearFused).apply  # see ops/gemm.py


def _unsupported(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *constants: Any
) -> str | None:
    reason = linear_unsupported(input, weight, bias)
    if residual is not None and weight.ndim == 2:
        shapes.linear_fused(input, weight, None, residual)
    return reason


_LINEAR_FUSED = Operation(
    name="linear",
    arguments=("input", "weight", "bias", "residual"),
    optional=("bias", "residual"),
    torch_function=lambda *args: reference.linear_fused(*args[:-1]),
    overload=lambda *args: torch.ops.fastdl.linear_fused(*args[:-1], False, args[-1]),
    function=LinearFusedFunction,
    unsupported=_unsupported,
    plan=lambda out, input, weight, bias, residual, activation, packed: linear_plan(out, input, weight, bias, packed),
    autocast=True,
    unsupported_on_cuda=lambda *args: None,
)
