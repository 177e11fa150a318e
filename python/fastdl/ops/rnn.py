"""LSTM, GRU and RNN layers and cells, forward and backward; the math is at the head of `rnn_reference`.

A layer is one operation: the products of all time steps with W_ih, then the loop over time, in one or both directions.
Its gradient is the loop backwards, then one product for the input and one for each weight. Layers, and the dropout
between them, are composed here. A gradient that is differentiated again runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _VF, Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.nn import functional as F

from fastdl import _C
from fastdl.ops import cuda, cuda_rnn
from fastdl.ops import rnn_library as _registered  # noqa: F401  (defines torch.ops.fastdl.rnn_layer)
from fastdl.ops import rnn_native as native
from fastdl.ops import rnn_reference as reference
from fastdl.ops import rnn_shapes as shapes
from fastdl.ops.plain import KERNEL_DTYPES, PLAIN_TYPES, eager_is_plain, is_plain
from fastdl.ops.rnn_shapes import Config
from fastdl.ops.route import Operation, call

Results = tuple[Tensor, Tensor, Tensor | None]


# --- what the modules call -----------------------------------------------------------------------------------------
def layers(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
    config: Config,
) -> Results:
    """(y, h_n, c_n) of all layers: input [T, B, I] -> y [T, B, D*P], or packed [rows, I] -> [rows, D*P].

    hx, h_n [L*D, B, P], cx, c_n [L*D, B, H]; None: zeros, packed input needs them; c_n None but for lstm. parameters in
    torch's order. Raises RuntimeError for shapes, dtypes or devices that do not fit together.
    """
    if not is_compiling() and _is_plain_call(input, hx, cx, parameters, batch_sizes, config):
        run = _inference
        if torch.is_grad_enabled() and _any_requires_grad(input, hx, cx, parameters):
            run = _apply_plain
        return _compose(run, input, hx, cx, parameters, batch_sizes, config)
    return call(_OPERATIONS[config.op], input, hx, cx, *parameters, constants=(batch_sizes, config), more=config.names)


def cell(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    parameters: Sequence[Tensor],
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """(h', c') of one step: input [B, I], hx, h' [B, H], cx, c' [B, H], c' None but for lstm."""
    x, h, c = input[None], None if hx is None else hx[None], None if cx is None else cx[None]
    _, h, c = layers(x, h, c, parameters, None, config)
    return h[0], None if c is None else c[0]


def plain_cell(mode: str, H: int, x: Tensor, h: Tensor, c: Tensor | None, parameters: dict[str, Tensor | None]) -> Any:
    """What the module of a cell gives without grad, where the call is plain, of rank 2, and fits; otherwise None.

    For streams of single steps, where checks take the longest: one native call makes them.
    """
    try:
        w_ih, w_hh = parameters["weight_ih"], parameters["weight_hh"]
        b_ih, b_hh = parameters["bias_ih"], parameters["bias_hh"]
    except KeyError:  # parametrised or pruned
        return None
    return _C.rnn_cell(mode, H, x, h, c, w_ih, w_hh, b_ih, b_hh)


def _any_requires_grad(input: Tensor, hx: Tensor | None, cx: Tensor | None, parameters: Sequence[Tensor]) -> bool:
    return (
        input.requires_grad
        or (hx is not None and hx.requires_grad)
        or (cx is not None and cx.requires_grad)
        or any(x.requires_grad for x in parameters)
    )


def _is_plain_call(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
    config: Config,
) -> bool:
    """Whether the call and its tensors are plain, of one of KERNEL_DTYPES, and fit."""
    if not (type(input) in PLAIN_TYPES and input.dtype in KERNEL_DTYPES and eager_is_plain() and is_plain(input)):
        return False
    dtype = input.dtype
    for x in (hx, cx, *parameters):
        if x is not None and not (x.dtype is dtype and is_plain(x)):
            return False
    return shapes.fits(input, hx, cx, parameters, batch_sizes is not None, config)


# --- layers, one after the other -----------------------------------------------------------------------------------
Layer = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
"""(input, h0, c0, batch_sizes, mode, directions, *parameters) -> (y, h_n, c_n, saved), as RnnLayerFunction.apply."""


def _inference(
    input: Tensor, h0: Any, c0: Any, batch_sizes: Any, mode: str, directions: int, *parameters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.rnn_layer(input, h0, c0, parameters, batch_sizes, mode, directions, False)


def _dispatched(
    input: Tensor, h0: Any, c0: Any, batch_sizes: Any, mode: str, directions: int, *parameters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.fastdl.rnn_layer(input, h0, c0, parameters, batch_sizes, mode, directions, False)


def _compose(
    run: Layer,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
    config: Config,
) -> Results:
    L, D, mode = config.num_layers, config.directions, config.mode
    lstm = mode == "lstm"
    if L == 1:
        y, h_n, c_n, _ = run(input, hx, cx, batch_sizes, mode, D, *parameters)
        return y, h_n, c_n if lstm else None
    each = len(parameters) // L
    hs, cs = [], []
    for index in range(L):
        part = slice(index * D, (index + 1) * D)
        h0, c0 = None if hx is None else hx[part], None if cx is None else cx[part]
        y, h, c, _ = run(input, h0, c0, batch_sizes, mode, D, *parameters[index * each : (index + 1) * each])
        hs.append(h)
        cs.append(c)
        input = F.dropout(y, config.dropout) if config.dropout and index + 1 < L else y
    return y, torch.cat(hs), torch.cat(cs) if lstm else None


# --- autograd ----------------------------------------------------------------------------------------------------
class RnnLayerFunction(Function):
    """A layer as a node of the graph, its forward through the dispatcher; its fourth result is for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        mode: str,
        directions: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.fastdl.rnn_layer(input, h0, c0, parameters, batch_sizes, mode, directions, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, h0, c0, batch_sizes, ctx.mode, ctx.directions, *parameters = inputs
        y, _, c_n, saved = output
        ctx.mark_non_differentiable(*((saved,) if ctx.mode == "lstm" else (c_n, saved)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h0, c0, batch_sizes, y, saved, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads, *ctx.saved_tensors)


def _gradients(
    ctx: Any,
    grads: tuple[Tensor | None, ...],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor | None, ...]:
    """What RnnLayerFunction.backward gives, from what it saved."""
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:]]
    grads = (*grads[:2], grads[2] if ctx.mode == "lstm" else None)
    rest = (None, None, None)  # batch_sizes, mode, directions
    if all(grad is None for grad in grads):
        return (None, None, None, *rest, *(None for _ in parameters))
    if not is_compiling() and _needs_reference((*grads, input, h0, c0, *parameters)):
        steps = None if batch_sizes is None else batch_sizes.tolist()
        dx, dh0, dc0, dweights = reference.layer_backward(
            grads, input, h0, c0, parameters, ctx.mode, ctx.directions, steps
        )
        found = [x if need else None for x, need in zip((dx, dh0, dc0, *dweights), needs, strict=True)]
        return (*found[:3], *rest, *found[3:])
    run = torch.ops.fastdl.rnn_layer_backward
    if not is_compiling() and eager_is_plain() and all(map(is_plain, grads)):
        run = native.rnn_layer_backward
    dx, dh0, dc0, dweights = run(
        *grads, input, h0, c0, parameters, batch_sizes, y, saved, ctx.mode, ctx.directions, needs
    )
    found = [x if need else None for x, need in zip((dx, dh0, dc0, *dweights), needs, strict=True)]
    return (*found[:3], *rest, *found[3:])


def _needs_reference(tensors: Sequence[Tensor | None]) -> bool:
    """create_graph=True, torch.func, and the mapped tensors that is_grads_batched=True sets up."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) in PLAIN_TYPES and not torch._C._has_storage(x) for x in tensors)
    )


class _PlainRnnLayer(RnnLayerFunction):
    """RnnLayerFunction for arguments known to be plain: its forward calls the kernel.

    y may be written in place before the backward pass, as stock GRU and RNN allow: what is saved is y under a version
    counter of its own, and y is made again where a tensor without memory that shares y's counter tells of a write.
    """

    @staticmethod
    def forward(
        input: Tensor, h0: Any, c0: Any, batch_sizes: Any, mode: str, directions: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return native.rnn_layer(input, h0, c0, parameters, batch_sizes, mode, directions, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        y, *rest = output
        RnnLayerFunction.setup_context(ctx, inputs, (y.data, *rest))
        ctx.witness = y.detach()
        ctx.witness.data = y.new_empty(0)
        ctx.version = ctx.witness._version

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, h0, c0, batch_sizes, y, saved, *parameters = ctx.saved_tensors
        if ctx.witness._version != ctx.version:
            y = native.rnn_layer(input, h0, c0, parameters, batch_sizes, ctx.mode, ctx.directions, True)[0]
        return _gradients(ctx, grads, input, h0, c0, batch_sizes, y, saved, *parameters)


_apply_plain = super(Function, _PlainRnnLayer).apply  # see ops/gemm.py


# --- the table ---------------------------------------------------------------------------------------------------
def _run(run: Layer, input: Tensor, hx: Any, cx: Any, *rest: Any) -> Results:
    *parameters, batch_sizes, config = rest
    return _compose(run, input, hx, cx, parameters, batch_sizes, config)


class _Composed:
    """What Operation.function asks for: layers, each a node of the graph."""

    @staticmethod
    def apply(*args: Any) -> Results:
        return _run(RnnLayerFunction.apply, *args)


def _unsupported(input: Tensor, hx: Any, cx: Any, *rest: Any) -> str | None:
    *parameters, batch_sizes, config = rest
    shapes.require_fit(input, hx, cx, parameters, batch_sizes, config)
    return None


def _cast(args: tuple[Tensor | None, ...], dtype: torch.dtype, batch_sizes: Any, config: Config) -> tuple[Any, ...]:
    """What torch.autocast makes of the arguments on the CPU, all then of one dtype, that of torch's results.

    torch keeps the states of GRU, of packed LSTM and of their cells in the dtype that they come in; where that is
    float32, so is the whole call here, which is more accurate than torch's, whose products are of `dtype`.
    """
    input, hx, *_ = args
    whole = config.mode.startswith("rnn") or (config.op == "lstm" and batch_sizes is None)
    state = (input if hx is None else hx).dtype
    if not whole and state.is_floating_point:
        dtype = torch.promote_types(dtype, state)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in args
    )


def _torchs(input: Tensor, hx: Tensor | None, cx: Tensor | None, *rest: Any) -> Results:
    """The call as torch's own modules make it."""
    *parameters, batch_sizes, config = rest
    lstm = config.mode == "lstm"
    name = config.op if lstm or config.mode == "gru" else config.mode + ("_cell" if config.op == "rnn_cell" else "")
    states = config.num_layers * config.directions
    if hx is None:
        hx = torch.zeros(states, input.shape[1], config.output_size, dtype=input.dtype, device=input.device)
    if lstm and cx is None:
        cx = torch.zeros(states, input.shape[1], config.hidden_size, dtype=input.dtype, device=input.device)
    function = getattr(_VF, name)
    if config.op.endswith("_cell"):
        biases = parameters[2:] if config.bias else (None, None)
        out = function(input[0], (hx[0], cx[0]) if lstm else hx[0], *parameters[:2], *biases)
        h, c = out if lstm else (out, None)
        return h[None], h[None], None if c is None else c[None]
    where = (input,) if batch_sizes is None else (input, batch_sizes)
    training = config.dropout > 0
    out = function(
        *where,
        (hx, cx) if lstm else hx,
        parameters,
        config.bias,
        config.num_layers,
        config.dropout,
        training,
        config.directions == 2,
        *((False,) if batch_sizes is None else ()),
    )
    return (*out, None) if len(out) == 2 else out


def _plan(out: Tensor, input: Tensor, hx: Tensor | None, cx: Any, *rest: Any) -> str:
    if out.dtype is torch.float64:
        return "reference"
    *_, batch_sizes, config = rest
    T, B = input.shape[:2] if batch_sizes is None else (len(batch_sizes), hx.shape[1])
    if cuda.runs(out):
        return cuda_rnn.plan(out, T, B, config.hidden_size, config.proj_size, config.mode)["kernel"]
    dtype = str(out.dtype).removeprefix("torch.")
    return _C.rnn_plan(T, B, config.hidden_size, config.proj_size, mode=config.mode, dtype=dtype)["kernel"]


_OPERATIONS = {
    name: Operation(
        name=name,
        arguments=("input", "hx", "cx"),
        optional=("hx", "cx"),
        torch_function=_torchs,
        overload=lambda *args: _run(_dispatched, *args),
        function=_Composed,
        unsupported=_unsupported,
        plan=_plan,
        autocast=True,
        cast=_cast,
        several=True,
        unsupported_on_cuda=lambda *args: None,
    )
    for name in ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")
}
