"""Errors of the recurrent CUDA kernels: a single step against bounds derived from its roundings, long sequences against
torch's own errors.

A bound that is derived for one step grows with each further one by the norm of W, far beyond what happens: sequences of
a few steps have the measured tolerances of test_cuda_rnn.py.
"""

import pytest
import torch

from conftest import DTYPES
from cuda_rnn_problem import MODES_OF, ROWS, GpuProblem, every_case
from fastdl.testing import UNIT_ROUNDOFF, assert_within_bound, gemm_bound, gemm_reference

pytestmark = pytest.mark.skipif(not ROWS, reason="neither the host twin nor the CUDA kernels are built")


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's, of tiny operations: beside other processes its team waits for longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


U = UNIT_ROUNDOFF[torch.float32]
FUNCTION = 4 * U  # of sigmoid and tanh: polynomial, reciprocal, and the roundings between them
GRADIENT = 24 * U  # products and sums on the way to a gate's gradient, and the functions in it


def rounded(bound, value, dtype):
    """`bound` after rounding to dtype."""
    if dtype == torch.float32:
        return bound
    info = torch.finfo(dtype)
    return bound + UNIT_ROUNDOFF[dtype] * (value.abs() + bound) + info.smallest_normal * info.eps / 2


def assert_within(name, actual, expected, bound):
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"{name}: {(error / bound).max().item():.2f} times the bound"  # NaN too


def step(p, precision):
    """name -> (value, bound) of one step in float64: what is saved, c and h, before a projection."""
    x, h, w = p.x[0].double(), p.h0.double(), p.w.double()
    b = torch.zeros(w.shape[0]) if p.b is None else p.b.double()
    lstm, gru, H = p.mode == "lstm", p.mode == "gru", p.H
    if gru:  # the n gate's product stays apart from x
        x = torch.cat([x[:, : 2 * H], torch.zeros_like(x[:, :H])], 1)
    z = h @ w.T + b + x
    e = gemm_bound(p.width + 2, h.abs() @ w.abs().T + b.abs() + x.abs(), z, torch.float32, precision=precision)
    if lstm:
        i, f, g, o = z.sigmoid().chunk(4, 1)
        g, c0 = z.chunk(4, 1)[2].tanh(), p.c0.double()
        ei, ef, eg, eo = (part / 4 + FUNCTION for part in e.chunk(4, 1))
        eg = 4 * eg
        c = f * c0 + i * g
        ec = c0.abs() * ef + g.abs() * ei + i * eg + ei * eg + 2 * U * ((f * c0).abs() + (i * g).abs())
        t, et = c.tanh(), ec + FUNCTION
        out = {"i": (i, ei), "f": (f, ef), "g": (g, eg), "o": (o, eo), "c": (c, ec)}
        return out | {"h": (o * t, t.abs() * eo + o * et + eo * et + 2 * U * (o * t).abs())}
    if gru:
        r, k, n = z.chunk(3, 1)
        r, k, n_in = r.sigmoid(), k.sigmoid(), p.x[0].double()[:, 2 * H :]
        er, ek, es = e.chunk(3, 1)
        er, ek = er / 4 + FUNCTION, ek / 4 + FUNCTION
        pre = n_in + r * n
        m = pre.tanh()
        em = n.abs() * er + r * es + er * es + 2 * U * (n_in.abs() + (r * n).abs()) + FUNCTION
        new = m + k * (h - m)
        eh = (h - m).abs() * ek + (1 + k) * em + ek * em + 3 * U * (h.abs() + m.abs())
        return {"r": (r, er), "k": (k, ek), "n": (m, em), "s": (n, es), "h": (new, eh)}
    return {"h": (z.tanh(), e + FUNCTION) if p.mode == "rnn_tanh" else (z.relu(), e)}


def gate_gradients(p, saved, y):
    """(value, size) of d_gates in float64 from what the forward pass saved, for an error of GRADIENT * size."""
    dh, size = p.dy[0].double() + p.dh_n.double(), p.dy[0].double().abs() + p.dh_n.double().abs()
    if p.mode == "lstm":
        i, f, g, o, c = saved
        c0, dc = p.c0.double(), p.dc_n.double()
        t = c.tanh()
        d, ds = dc + dh * o * (1 - t * t), dc.abs() + size * o
        value = d * g * i * (1 - i), d * c0 * f * (1 - f), d * i * (1 - g * g), dh * t * o * (1 - o)
        sizes = ds * g.abs() * i, ds * c0.abs() * f, ds * i, size * o
        return torch.cat(value, 1), torch.cat(sizes, 1)
    if p.mode == "gru":
        r, k, n, s = saved
        h0 = p.h0.double()
        fresh, fs = dh * (1 - k) * (1 - n * n), size
        value = fresh * s * r * (1 - r), dh * (h0 - n) * k * (1 - k), fresh
        return torch.cat(value, 1), torch.cat((fs * s.abs() * r, size * (h0.abs() + n.abs()) * k, fs), 1)
    return (dh * (1 - y * y), size) if p.mode == "rnn_tanh" else (dh * (y > 0), size)


@every_case
def test_one_step(row, mode, gpu):
    dtype, precision = DTYPES[row["dtype"]], row["precision"]
    for B, H in ((1, 1), (5, row["units"] + 3), (9, 37)):
        p = GpuProblem(mode, 1, B, H, dtype=dtype, gpu=gpu, kernel=row["name"])
        forward = p.forward()
        expected = step(p, precision)
        h, eh = expected.pop("h")
        assert_within("y", forward["y"][0], h, rounded(eh, h, dtype))
        assert torch.equal(forward["y"][0], forward["h_n"])
        saved = forward["saved"].view(-1)
        gates = saved[: B * H * (len(expected) - 1)].view(B, -1) if expected else saved
        parts = [*gates.split(H, 1), saved[gates.numel() :].view(B, H)] if expected else []
        for (name, (value, bound)), part in zip(expected.items(), parts, strict=True):
            assert_within(name, part, value, rounded(bound, value, dtype))
        if mode == "lstm":
            assert torch.equal(forward["c_n"], parts[-1])

        grads = p.backward(forward)
        value, size = gate_gradients(p, [part.double() for part in parts], forward["y"][0].double())
        assert_within("d_gates", grads["d_gates"][0], value, rounded(GRADIENT * size, value, dtype))
        d, initial = grads["d_gates"][0], None
        if mode == "gru":  # what W is multiplied with, and what skips it
            d = torch.cat([d[:, : 2 * H], grads["d_recurrent"][0]], 1)
            initial = (p.dy[0].double() + p.dh_n.double()) * parts[1].double()
        reference = gemm_reference(d, p.w, None, initial)
        assert_within_bound(grads["dh0"], reference, precision=precision)


@pytest.mark.parametrize("row", [r for r in ROWS if r["kind"] == "lstm"], ids=lambda row: row["name"])
def test_one_projected_step(row, gpu):
    """Both products, the second one of a state rounded to the dtype."""
    dtype, precision = DTYPES[row["dtype"]], row["precision"]
    p = GpuProblem("lstm", 1, 5, 37, 19, dtype=dtype, gpu=gpu, kernel=row["name"])
    forward = p.forward()
    h, eh = step(p, precision)["h"]
    eh, r = rounded(eh, h, dtype), p.r.double()
    y, size = h @ r.T, (h.abs() + eh) @ r.abs().T
    bound = eh @ r.abs().T + gemm_bound(p.H, size, y, torch.float32, precision=precision)
    assert_within("y", forward["y"][0], y, rounded(bound, y, dtype))
    grads = p.backward(forward)
    d_hidden = p.dy[0].double() + p.dh_n.double()
    assert_within("d_hidden", grads["d_hidden"][0], d_hidden, rounded(U * d_hidden.abs(), d_hidden, dtype))
    assert_within_bound(grads["dh0"], gemm_reference(grads["d_gates"][0], p.w), precision=precision)


# --- 200 steps --------------------------------------------------------------------------------------------------------
LONG = [r for r in ROWS if r["resident"] and r["dtype"] != "float16" and r["precision"] != "tf32"]


@pytest.mark.parametrize("row", LONG, ids=lambda row: row["name"])
def test_errors_of_200_steps_are_torchs(row, gpu):
    """The root mean square over the elements of each step, against torch's at the same step."""
    T, B, H, dtype = 200, 8, row["units"], DTYPES[row["dtype"]]
    p = GpuProblem(MODES_OF[row["kind"]][0], T, B, H, dtype=dtype, gpu=gpu, kernel=row["name"])
    exact, theirs, forward = p.reference(), p.reference(dtype), p.forward()
    ours = forward | p.backward(forward)
    for name in ("y", "d_gates"):
        mine, his = ((v[name].double() - exact[name]).square().mean((1, 2)).sqrt() for v in (ours, theirs))
        limit = 2 * his + UNIT_ROUNDOFF[dtype] * exact[name].square().mean((1, 2)).sqrt()
        assert bool((mine <= limit).all()), (name, (mine / limit).max().item())
