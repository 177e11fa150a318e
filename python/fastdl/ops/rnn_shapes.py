"""Shapes of the recurrent layers and cells: RuntimeError where the arguments do not fit. Sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastdl.ops.rnn_reference import GATES
from fastdl.ops.shapes import require

SAVED = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
"""What the forward pass keeps for each row of the input, beside y, in units of H; no more than torch keeps."""


class Config(NamedTuple):
    """What a module is built as; `dropout` is the probability in force, 0 outside training."""

    op: str  # "lstm", "gru", "rnn", or with "_cell" behind it: for messages
    mode: str  # a key of GATES
    input_size: int
    hidden_size: int
    proj_size: int = 0  # 0: none
    num_layers: int = 1
    directions: int = 1
    bias: bool = True
    dropout: float = 0.0
    names: tuple[str, ...] = ()  # of the parameters

    @property
    def output_size(self) -> int:
        """Features of h: P."""
        return self.proj_size or self.hidden_size


_known: dict[Config, list[tuple[int, ...]]] = {}


def weights(config: Config) -> list[tuple[int, ...]]:
    """The shapes of a module's parameters in torch's order: layers, then directions, then w_ih, w_hh, b, b, w_hr."""
    H, P = config.hidden_size, config.output_size
    rows = GATES[config.mode] * H
    shapes: list[tuple[int, ...]] = []
    for index in range(config.num_layers * config.directions):
        width = config.input_size if index < config.directions else P * config.directions
        shapes += [(rows, width), (rows, P)]
        shapes += [(rows,), (rows,)] if config.bias else []
        shapes += [(P, H)] if config.proj_size else []
    return shapes


def fits(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, parameters: Sequence[Tensor], packed: bool, config: Config
) -> bool:
    """Whether `require_fit` would pass, asked on every plain eager call."""
    expected = _known.get(config)
    if expected is None:
        expected = _known[config] = weights(config)
    shape = input.shape
    if len(shape) != (2 if packed else 3) or shape[-1] != config.input_size or not (packed or shape[0]):
        return False
    states = config.num_layers * config.directions
    for x, size in ((hx, config.output_size), (cx, config.hidden_size)):
        if x is not None and (
            x.ndim != 3 or x.shape[0] != states or x.shape[2] != size or not (packed or x.shape[1] == shape[1])
        ):
            return False
    return [x.shape for x in parameters] == expected


def require_fit(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
    config: Config,
) -> None:
    """RuntimeError naming the argument or parameter that does not fit the module's configuration."""
    op, features = config.op, config.input_size
    if batch_sizes is None:
        require(input.ndim == 3, op, "input", f"[T, B, {features}]", input)
    else:
        require(input.ndim == 2, op, "input", f"packed data [rows, {features}]", input)
    require(input.shape[-1] == features, op, "input", f"[..., {features}] to match input_size", input)
    if batch_sizes is None:
        require(input.shape[0] > 0, op, "input", "at least one time step", input)
        batch = input.shape[1]
    else:
        batch = hx.shape[1] if hx is not None and hx.ndim == 3 else 0
    states = config.num_layers * config.directions
    for name, x, size in (("hx", hx, config.output_size), ("cx", cx, config.hidden_size)):
        if x is not None:
            fit = x.ndim == 3 and x.shape[0] == states and x.shape[1] == batch and x.shape[2] == size
            require(fit, op, name, f"[{states}, {batch}, {size}] (layers and directions, batch, features)", x)
    for name, x, shape in zip(config.names, parameters, weights(config), strict=True):
        fit = x.ndim == len(shape) and all(a == b for a, b in zip(x.shape, shape, strict=True))
        require(fit, op, name, f"shape {list(shape)}", x)


def steps(op: str, batch_sizes: Tensor, rows: int, batch: int) -> list[int]:
    """batch_sizes as numbers; RuntimeError unless they run from `batch` downwards, stay positive and sum to `rows`."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.ndim != 1:
        raise RuntimeError(
            f"fastdl.{op}: argument 'batch_sizes': expected a 1-D int64 tensor on cpu, got {batch_sizes.ndim}-D "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    falling = all(a >= b for a, b in pairwise(sizes))
    if not sizes or sizes[-1] < 1 or sizes[0] != batch or not falling or sum(sizes) != rows:
        shown = str(sizes if len(sizes) < 12 else [*sizes[:10], "..."])
        raise RuntimeError(
            f"fastdl.{op}: argument 'batch_sizes': expected positive numbers that never grow, the first {batch} "
            f"(the batch of hx), that sum to {rows} (the rows of the packed data), got {shown}"
        )
    return sizes


def layer(
    input: Tensor, h0: Tensor | None, parameters: Sequence[Tensor], packed: bool, mode: str, directions: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of y, h_n, c_n and saved for one layer: input [T, B, I] or packed [rows, I]."""
    lead = input.shape[:-1]
    batch = h0.shape[1] if packed and h0 is not None else lead[-1]
    P, H = parameters[1].shape[1], parameters[1].shape[0] // GATES[mode]
    c_n = (directions, batch, H) if mode == "lstm" else (0,)
    return (*lead, directions * P), (directions, batch, P), c_n, (directions, *lead, SAVED[mode] * H)
