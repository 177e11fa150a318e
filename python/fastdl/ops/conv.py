"""conv and conv_transpose in 1, 2 and 3 dimensions, forward and backward.

    conv            y(n,k,o) = sum_{c,t} w(k,c,t) x(n, g*C/G + c, o*stride - padding + t*dilation) + b(k), 0 outside x
    conv_transpose  x and y change places: it computes what the gradient of x is in the other

With an epilogue, out = activation(y) + residual. The gradient of x is the other of the two, that of w is conv_wgrad
(dw(k,c,t) = sum_{n,o} dy(n,k,o) x(n,c,o*stride - padding + t*dilation)), and so are theirs: the three close under
differentiation.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fastdl import _C
from fastdl.ops import calls, conv_reference, cuda, cuda_conv, reference
from fastdl.ops import conv_library as _registered  # noqa: F401  (defines torch.ops.fastdl.conv)
from fastdl.ops import conv_native as native
from fastdl.ops import conv_shapes as shapes
from fastdl.ops.conv_shapes import Geometry
from fastdl.ops.gemm import sum_rows
from fastdl.ops.plain import KERNEL_DTYPES, PLAIN_TYPES, eager_is_plain, is_plain
from fastdl.ops.route import Operation, call, handback_reason

Ints = int | tuple[int, ...]


# --- public ------------------------------------------------------------------------------------------------------
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv1d`: input [N, C, L] or [C, L], weight [K, C/groups, k]; see `conv2d`."""
    return convolve("conv1d", input, weight, bias, residual, stride, padding, 0, dilation, groups, activation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`, and what often follows it: y = activation(conv(x, w) + b) + residual, in one pass.

    input [N, C, H, W] or [C, H, W], weight [K, C/groups, kH, kW], bias [K] or None; any strides.
    The result is channels_last where torch's would be: where input or weight are. float32, bfloat16 and float16 on
    the CPU run fastdl's kernels, which sum in float32 and round once; at level amx
    `torch.backends.mkldnn.conv.fp32_precision` says how exact products of float32 must be. float64 runs the reference;
    every other call is handed to torch and recorded with the reason. torch.autocast casts as in torch.

    Args:
        padding: ints, "valid", or "same" (stride 1), which pads behind what cannot be halved.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu". Its gradient needs what it is applied to,
            which is kept for the backward pass; differentiating twice computes that again.
        residual: of the shape of the output, added last. One in another layout is copied.

    Raises TypeError for an argument of the wrong type, RuntimeError for values, shapes, dtypes or devices that do not
    fit together, before anything is allocated. Unlike torch, an input without channels gives the bias.
    """
    return convolve("conv2d", input, weight, bias, residual, stride, padding, 0, dilation, groups, activation)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv3d`: input [N, C, D, H, W] or [C, D, H, W]; see `conv2d`."""
    return convolve("conv3d", input, weight, bias, residual, stride, padding, 0, dilation, groups, activation)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d`: weight [C, K/groups, k]; see `conv2d`."""
    return convolve(
        "conv_transpose1d",
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        activation,
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`: weight [C, K/groups, kH, kW]; see `conv2d`."""
    return convolve(
        "conv_transpose2d",
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        activation,
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv_transpose3d`: weight [C, K/groups, kD, kH, kW]; see `conv2d`."""
    return convolve(
        "conv_transpose3d",
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        activation,
    )


# --- what the public functions and the modules call ----------------------------------------------------------------
def convolve(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    activation: str | None,
    packed: Tensor | None = None,
) -> Tensor:
    """The convolution of that name; output_padding is 0 for those that have none. packed: the weight's frozen pack."""
    operation = _OPERATIONS[op]
    if activation is not None and activation not in reference.ACTIVATIONS:
        known = ", ".join(map(repr, reference.ACTIVATIONS))
        raise RuntimeError(f"fastdl.{op}: argument 'activation': expected None, {known}, got {activation!r}")
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    if not tensors or input.is_nested or weight.is_nested or (not is_compiling() and torch._C._is_tracing()):
        arguments = (stride, padding, output_padding, groups, dilation)
        return _foreign(op, input, weight, bias, residual, arguments, activation)
    shapes.require_rank(op, int(op[-2]), input, weight)
    g = shapes.geometry(op, weight.shape[2:], stride, padding, output_padding, dilation, groups, op[4] == "_")
    unbatched = input.ndim < weight.ndim
    if unbatched:
        input, residual = input.unsqueeze(0), residual if residual is None else residual.unsqueeze(0)
    if not is_compiling() and _is_plain_call(input, weight, bias, residual) and not _reaches_beyond(g):
        constants = (*g, activation, shapes.channels_last(input, weight))
        if torch.is_grad_enabled() and (
            input.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            out = _apply_plain(input, weight, bias, residual, *constants, packed)[0]
        else:
            out = native.conv(input, weight, bias, residual, *constants, False, packed)[0]
    else:
        strided = input.layout is torch.strided and weight.layout is torch.strided
        last = strided and shapes.channels_last(input, weight)
        if torch.is_autocast_enabled("cpu") or cuda.runs(input):  # the weight may be cast, or the kernels not those
            packed = None
        out = call(operation, input, weight, bias, residual, constants=(*g, activation, last, packed))
    return out.squeeze(0) if unbatched else out


def _reaches_beyond(g: Geometry) -> bool:
    """Whether a transposed convolution has results, behind the others, that nothing but the bias goes into."""
    return g.transposed and any(x - p >= s for x, p, s in zip(g.extra, g.padding, g.stride, strict=True))


def _is_plain_call(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    dtype = input.dtype
    return (
        type(input) in PLAIN_TYPES
        and type(weight) in PLAIN_TYPES
        and dtype in KERNEL_DTYPES
        and weight.dtype is dtype
        and eager_is_plain()
        and is_plain(input)
        and is_plain(weight)
        and (bias is None or (isinstance(bias, Tensor) and bias.dtype is dtype and is_plain(bias)))
        and (residual is None or (isinstance(residual, Tensor) and residual.dtype is dtype and is_plain(residual)))
    )


def _foreign(
    op: str, input: Any, weight: Any, bias: Any, residual: Any, arguments: tuple[Any, ...], activation: str | None
) -> Any:
    """Where no shape can be asked: TypeError, or torch's own, which may know what it is (a torch.fx proxy, say)."""
    given = {"input": input, "weight": weight, "bias": bias, "residual": residual}
    reason = handback_reason(op, {k: x for k, x in given.items() if x is not None or k in ("input", "weight")})
    calls.handback(op, reason or "input is unknown to fastdl")
    stride, padding, output_padding, groups, dilation = arguments
    if op[4] == "_":
        out = getattr(torch.nn.functional, op)(input, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        out = getattr(torch.nn.functional, op)(input, weight, bias, stride, padding, dilation, groups)
    return reference.epilogue(out, residual, activation)


# --- autograd ----------------------------------------------------------------------------------------------------
def _differentiable_conv(*args: Any) -> tuple[Tensor, None]:
    input, weight, bias, _, stride, padding, extra, dilation, groups, transposed, _, last, _ = args
    op = native._name(weight, transposed)
    constants = (stride, padding, extra, dilation, groups, transposed, None, last, None)
    return call(_OPERATIONS[op], input, weight, bias, None, constants=constants), None


def _differentiable_wgrad(grad: Tensor, input: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    return call(_CONV_WGRAD, grad, input, constants=constants)


_DIFFERENTIABLE = SimpleNamespace(
    conv=_differentiable_conv,
    conv_wgrad=_differentiable_wgrad,
    bias_grad=lambda grad: sum_rows(grad.movedim(1, -1)),
)
_DISPATCHED = SimpleNamespace(
    conv=torch.ops.fastdl.conv,
    conv_wgrad=torch.ops.fastdl.conv_wgrad,
    bias_grad=lambda grad: torch.ops.fastdl.sum_rows(grad.movedim(1, -1)),
    activation_grad=lambda grad, pre, activation: _dispatched_activation_grad(grad, pre, activation),
)


def _dispatched_activation_grad(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    last = pre.movedim(1, -1)
    if last.is_contiguous():
        return torch.ops.fastdl.activation_grad(grad.movedim(1, -1), last, activation).movedim(-1, 1)
    return torch.ops.fastdl.activation_grad(grad, pre, activation)


def _backend(*tensors: Tensor | None) -> Any:
    """Who computes a gradient from these: an object with conv, conv_wgrad and bias_grad."""
    if is_compiling():
        return _DISPATCHED
    if not torch.is_grad_enabled() and eager_is_plain() and all(map(is_plain, tensors)):
        return native
    return _DIFFERENTIABLE  # create_graph=True, transforms, modes


def _activation_gradient(ctx: Any, grad: Tensor, saved: tuple[Any, ...], run: Any) -> Tensor:
    """The gradient of what the activation was applied to."""
    if ctx.activation is None:
        return grad
    input, weight, bias, pre = saved
    if torch.is_grad_enabled() and not is_compiling():
        z, _ = _differentiable_conv(input, weight, bias, None, *ctx.geometry, None, ctx.channels_last, False)
        return reference.activation_grad(grad, z, ctx.activation)
    if run is _DIFFERENTIABLE:
        run = _DISPATCHED
    return run.activation_grad(grad, pre, ctx.activation)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of input, weight, bias and residual, each where needed."""
    if grad is None:
        return (None,) * 4
    saved = ctx.saved_tensors
    input, weight = saved[:2]
    needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    run = _backend(grad, *saved)
    dz = _activation_gradient(ctx, grad, saved, run)
    dx = dw = db = None
    g = Geometry(*ctx.geometry)
    kernel = ctx.kernel
    if needs_input:
        back = g.inverse(ctx.input_shape[2:], dz.shape[2:], kernel)
        dx = run.conv(dz, weight, None, None, *back, None, ctx.channels_last, False)[0]
    if needs_weight:
        first, second = (input, dz) if g.transposed else (dz, input)
        extra = tuple(-x for x in g.extra) if g.transposed else g.extra
        options = (g.stride, g.padding, extra, g.dilation, g.groups, ctx.weight_last)
        dw, db = run.conv_wgrad(first, second, kernel, *options, needs_bias and not g.transposed)
    if needs_bias and (db is None or g.transposed):
        db = run.bias_grad(dz)
    return dx, dw, db if needs_bias else None, grad if needs_residual else None


class ConvFunction(Function):
    """conv or conv_transpose as a node of the graph; its second result, before the activation, is for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        extra: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        transposed: bool,
        activation: str | None,
        channels_last: bool,
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        save_pre = activation is not None
        return torch.ops.fastdl.conv(
            input,
            weight,
            bias,
            residual,
            stride,
            padding,
            extra,
            dilation,
            groups,
            transposed,
            activation,
            channels_last,
            save_pre,
            packed,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, _, *geometry, ctx.activation, ctx.channels_last, _ = inputs
        ctx.geometry = tuple(geometry)
        ctx.input_shape, ctx.kernel = input.shape, tuple(weight.shape[2:])
        ctx.weight_last = shapes.weight_channels_last(weight)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        if ctx.activation is None:
            ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        else:  # a second derivative computes the argument of the activation again
            ctx.save_for_backward(input, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad), *(None,) * 9)


class ConvWgradFunction(Function):
    """conv_wgrad as a node of the graph: bilinear, so its gradients are a conv and a conv_transpose."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        input: Tensor,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        extra: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        channels_last: bool,
        bias: bool,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastdl.conv_wgrad(
            grad, input, kernel, stride, padding, extra, dilation, groups, channels_last, bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad, input, ctx.kernel, *geometry, _, ctx.bias = inputs
        ctx.geometry = Geometry(*geometry, False)
        ctx.grad_last, ctx.input_last = (shapes.channels_last(x, x) for x in (grad, input))
        ctx.shapes = grad.shape, input.shape
        if not ctx.bias:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, input)

    @staticmethod
    def backward(ctx: Any, outer: Tensor | None, outer_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, input = ctx.saved_tensors
        grad_shape, input_shape = ctx.shapes
        g, d_grad, d_input = ctx.geometry, None, None
        if outer is not None:
            run = _backend(outer, outer_bias, grad, input)
            if ctx.needs_input_grad[0]:
                d_grad = run.conv(input, outer, None, None, *g, None, ctx.grad_last, False)[0]
            if ctx.needs_input_grad[1]:
                back = g.inverse(input_shape[2:], grad_shape[2:], ctx.kernel)
                d_input = run.conv(grad, outer, None, None, *back, None, ctx.input_last, False)[0]
        if ctx.bias and outer_bias is not None and ctx.needs_input_grad[0]:
            of_bias = outer_bias.view(1, -1, *[1] * len(ctx.kernel)).expand(grad_shape)
            d_grad = of_bias if d_grad is None else d_grad + of_bias
        return (d_grad, d_input, *(None,) * 8)


class _PlainConv(ConvFunction):
    """ConvFunction for arguments known to be plain: its forward calls the kernel."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *constants: Any
    ) -> tuple[Tensor, Tensor]:
        *rest, packed = constants
        return native.conv(input, weight, bias, residual, *rest, rest[6] is not None, packed)


_apply_plain = super(Function, _PlainConv).apply  # see ops/gemm.py


# --- the table ---------------------------------------------------------------------------------------------------
def _torchs(op: str, input: Tensor, weight: Tensor, bias: Any, residual: Any, *constants: Any) -> Tensor:
    *g, activation, _, _ = constants
    return conv_reference.conv_fused(input, weight, bias, residual, Geometry(*g), activation)


def _unsupported(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *constants: Any
) -> str | None:
    g = Geometry(*constants[:6])
    shapes.require_fit(op, input, weight, bias, residual, g)
    return "output_padding of at least the stride" if _reaches_beyond(g) and input.dtype != torch.float64 else None


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _plan(out: Tensor, input: Tensor, weight: Tensor, bias: Any, residual: Any, *constants: Any) -> str:
    if out.dtype is torch.float64:
        return "reference"
    *geometry, _, last, packed = constants
    g = Geometry(*geometry)
    if cuda.runs(out):
        return cuda_conv.plan(out, input, weight, g, last)
    x, y = (out, input) if g.transposed else (input, out)
    return _C.conv_plan(
        "dgrad" if g.transposed else "forward",
        tuple(x.shape),
        tuple(weight.shape),
        tuple(y.shape),
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        dtype=_dtype(out),
        channels_last=last,
        frozen=packed is not None,
    )["kernel"]


def _row(op: str) -> Operation:
    return Operation(
        name=op,
        arguments=("input", "weight", "bias", "residual"),
        optional=("bias", "residual"),
        torch_function=lambda *args: _torchs(op, *args),
        overload=lambda *args: torch.ops.fastdl.conv(*args[:-1], False, args[-1]),
        function=ConvFunction,
        unsupported=lambda *args: _unsupported(op, *args),
        unsupported_on_cuda=lambda *args: None,
        plan=_plan,
        autocast=True,
    )


_OPERATIONS = {f"conv{kind}{n}d": _row(f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)}


def _torchs_wgrad(grad: Tensor, input: Tensor, kernel: Any, *constants: Any) -> tuple[Tensor, Tensor]:
    *g, _, bias = constants
    dw = conv_reference.conv_wgrad(grad, input, kernel, Geometry(*g, False))
    return dw, grad.sum([0, *range(2, grad.ndim)]) if bias else grad.new_empty(0)


_CONV_WGRAD = Operation(
    name="conv_wgrad",
    arguments=("grad", "input"),
    torch_function=_torchs_wgrad,
    overload=torch.ops.fastdl.conv_wgrad,
    function=ConvWgradFunction,
    unsupported=lambda *args: None,
    unsupported_on_cuda=lambda *args: None,
    plan=lambda out, *args: "reference" if out.dtype is torch.float64 else "conv_wgrad",
    several=True,
)
