"""One recurrent layer in one direction in float64, step by step as torch defines it, and what the native calls need.

`Problem` draws a problem; `forward` and `backward` run `_C.rnn` and `_C.rnn_backward` on it, `reference` and its
gradients come from autograd on plain float64 operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastdl import _C

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
MODES = tuple(GATES)
SAVED = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}


def cell(mode, x, h, c, w, b, r):
    """(h, c) after one step."""
    s = h @ w.T
    s = s if b is None else s + b
    if mode == "gru":
        H = w.shape[0] // 3
        reset, keep = torch.sigmoid(x + s)[:, : 2 * H].chunk(2, 1)
        fresh = torch.tanh(x[:, 2 * H :] + reset * s[:, 2 * H :])
        return (1 - keep) * fresh + keep * h, c
    if mode == "lstm":
        i, f, g, o = (x + s).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if r is None else h @ r.T), c
    return (torch.tanh(x + s) if mode == "rnn_tanh" else torch.relu(x + s)), c


@dataclass
class Problem:
    mode: str
    T: int
    B: int
    H: int
    P: int = 0  # projected size
    reverse: bool = False
    batch_sizes: list[int] | None = None
    dtype: torch.dtype = torch.float32
    bias: bool = True
    states: bool = True
    scale: float = 1.0
    seed: int = 0
    x: torch.Tensor = field(init=False)

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g) * scale).to(self.dtype)

        G, H, B = GATES[self.mode], self.H, self.B
        P = self.width = self.P or H
        lead = (self.T, B) if self.batch_sizes is None else (sum(self.batch_sizes),)
        self.lead = lead
        self.rows = self.T * B if self.batch_sizes is None else lead[0]
        self.x = draw(*lead, G * H, scale=self.scale)
        self.w = draw(G * H, P, scale=P**-0.5)
        self.b = draw(G * H, scale=0.3) if self.bias else None
        self.r = draw(P, H, scale=H**-0.5) if self.P else None
        self.h0 = draw(B, P) if self.states else None
        self.c0 = draw(B, H) if self.states and self.mode == "lstm" else None
        self.dy, self.dh_n = draw(*lead, P), draw(B, P)
        self.dc_n = draw(B, H) if self.mode == "lstm" else None
        self.sizes = None if self.batch_sizes is None else torch.tensor(self.batch_sizes, dtype=torch.int64)

    def reference(self, dtype=torch.float64):
        """y, h_n, c_n, then d of x, h0, c0, w, b (of the recurrent side), r; not in float64: as torch computes them."""
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, self.w)]
        x, w = leaves
        h0 = torch.zeros(self.B, self.width) if self.h0 is None else self.h0
        c0 = torch.zeros(self.B, self.H) if self.c0 is None else self.c0
        h0, c0 = h0.to(dtype).requires_grad_(), c0.to(dtype).requires_grad_()
        b = None if self.b is None else self.b.to(dtype).requires_grad_()
        r = None if self.r is None else self.r.to(dtype).requires_grad_()
        sizes = self.batch_sizes or [self.B] * self.T
        starts = [sum(sizes[:t]) for t in range(len(sizes))]
        flat, out = x.reshape(self.rows, x.shape[-1]), [None] * len(sizes)
        h, c = h0, c0
        for t in reversed(range(len(sizes))) if self.reverse else range(len(sizes)):
            n = sizes[t]
            hn, cn = cell(self.mode, flat[starts[t] : starts[t] + n], h[:n], c[:n], w, b, r)
            out[t] = hn
            h, c = torch.cat([hn, h[n:]]), torch.cat([cn, c[n:]])
        y = torch.cat(out) if out else torch.zeros(0, self.width, dtype=dtype)
        y = y.reshape(*self.lead, self.width)
        results = {"y": y, "h_n": h, "c_n": c}
        total = (h * self.dh_n).sum() + (y * self.dy).sum()
        if self.dc_n is not None:
            total = total + (c * self.dc_n).sum()
        names = {"d_gates": x, "dh0": h0, "dc0": c0, "dw": w, "db": b, "dr": r}
        names = {k: v for k, v in names.items() if v is not None}
        grads = torch.autograd.grad(total, list(names.values()), allow_unused=True)
        for (k, v), d in zip(names.items(), grads, strict=True):
            results[k] = torch.zeros_like(v) if d is None else d
        return {k: v.detach() for k, v in results.items()}

    def call(self, name, *tensors, **options):
        """The native call of this name; here is where other modules than _C come in."""
        getattr(_C, name)(*tensors, **options)

    def empty(self, *shape):
        return torch.full(shape, float("nan"), dtype=self.dtype)

    def forward(self, y=None, training=True, **options):
        y = self.empty(*self.lead, self.width) if y is None else y
        lstm = self.mode == "lstm"
        out = {"y": y, "h_n": self.empty(self.B, self.width), "c_n": self.empty(self.B, self.H) if lstm else None}
        shape = _C.rnn_saved_shape(self.mode, self.rows, self.B, self.H, self.width)
        out["saved"] = self.empty(*shape) if training else None
        self.call(
            "rnn", y, out["h_n"], out["c_n"], out["saved"], self.x, self.h0, self.c0, self.w, self.b, self.r,
            mode=self.mode, batch_sizes=self.sizes, reverse=self.reverse, **options,
        )  # fmt: skip
        return out

    def backward(self, forward, **options):
        G, H, lstm = GATES[self.mode], self.H, self.mode == "lstm"
        out = {"d_gates": self.empty(*self.lead, G * H), "dh0": self.empty(self.B, self.width)}
        out["dc0"] = self.empty(self.B, H) if lstm else None
        extra = {"d_recurrent": self.empty(*self.lead, H) if self.mode == "gru" else None}
        extra["d_hidden"] = self.empty(*self.lead, self.width) if self.P else None
        extra["hidden"] = self.empty(*self.lead, H) if self.P else None
        self.call(
            "rnn_backward", out["d_gates"], out["dh0"], out["dc0"], self.dy, self.dh_n, self.dc_n, forward["saved"],
            forward["y"], self.h0, self.c0, self.w, self.b, self.r,
            mode=self.mode, batch_sizes=self.sizes, reverse=self.reverse, **extra, **options,
        )  # fmt: skip
        return out | extra

    def weight_gradients(self, forward, grads):
        """dw, db, dr from what the native calls give, in float64: the products that Python makes after the loop."""
        d = grads["d_gates"].double().reshape(self.rows, self.x.shape[-1])
        if self.mode == "gru":
            d = torch.cat([d[:, : 2 * self.H], grads["d_recurrent"].double().reshape(self.rows, self.H)], 1)
        h0 = torch.zeros(self.B, self.width) if self.h0 is None else self.h0
        sizes = self.batch_sizes or [self.B] * self.T
        y = forward["y"].double().reshape(self.rows, self.width)
        steps = list(y.split(sizes)) if sizes else []
        before, h = [None] * len(sizes), h0.double()
        for t in reversed(range(len(sizes))) if self.reverse else range(len(sizes)):
            before[t] = h[: sizes[t]]
            h = torch.cat([steps[t], h[sizes[t] :]])
        before = torch.cat(before) if before else h0.double()[:0]
        out = {"dw": d.T @ before}
        if self.b is not None:
            out["db"] = d.sum(0)
        if self.P:
            d_hidden = grads["d_hidden"].double().reshape(self.rows, self.width)
            out["dr"] = d_hidden.T @ grads["hidden"].double().reshape(self.rows, self.H)
        return out
