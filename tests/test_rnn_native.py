"""`_C.rnn` and `_C.rnn_backward` against float64, on every row of the recurrent kernel table."""

import itertools
import math
import signal

import pytest
import torch

from conftest import DTYPES
from fastdl import _C
from fastdl.testing import GuardedOutput
from rnn_reference import GATES, MODES, SAVED, Problem

ROWS = _C.kernels("rnn")
MODES_OF = {"lstm": ("lstm",), "gru": ("gru",), "rnn": ("rnn_tanh", "rnn_relu")}
CASES = [(row, mode) for row in ROWS for mode in MODES_OF[row["kind"]]]
every_case = pytest.mark.parametrize(
    "row, mode",
    [
        pytest.param(
            row,
            mode,
            id=f"{row['name']}-{mode}",
            marks=pytest.mark.skipif(not row["available"], reason=row["reason"] or "-"),
        )
        for row, mode in CASES
    ],
)
every_mode = pytest.mark.parametrize("mode", MODES)
TEAMS = (1, 2, 3)
# Of a few steps with values of order one: rounding of the dtype, grown by the recurrence and by sums of gradients.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LESS_EXACT = {"tf32": 1e-4, "bf16": 3e-2}  # float32 by fewer parts
PRECISION = {row["name"]: row["precision"] for row in ROWS}
DTYPE = {row["name"]: row["dtype"] for row in ROWS}


def assert_close(problem, got, expected, names=None, kernel=""):
    tolerance = LESS_EXACT.get(PRECISION.get(kernel), TOLERANCE[problem.dtype])
    for name, reference in expected.items():
        if got.get(name) is None or (names and name not in names):
            continue
        actual = got[name].double()
        assert actual.shape == reference.shape, name
        if not reference.numel():
            continue
        scale = max(1.0, reference.abs().max().item())
        error = (actual - reference).abs().max().item()
        assert error <= tolerance * scale, (name, error / scale)  # NaN: never written


def check(problem, **options):
    """Forward and backward of one problem against float64."""
    expected = problem.reference()
    # In 16 bits a rounded zero flips relu's derivative: no bound on what that does to gradients.
    coarse = problem.dtype != torch.float32 or PRECISION.get(options.get("kernel")) in LESS_EXACT
    names = ("y", "h_n") if problem.mode == "rnn_relu" and coarse else None
    kernel = options.get("kernel", "")
    forward = problem.forward(**options)
    grads = problem.backward(forward, **options)
    assert_close(problem, forward | grads | problem.weight_gradients(forward, grads), expected, names, kernel)
    inference = problem.forward(training=False, **options)
    for name in ("y", "h_n", "c_n"):
        if inference[name] is not None:
            assert torch.equal(inference[name], forward[name]), name


def small_integers(problem):
    """A relu problem whose sums float32 and 16 bits hold exactly: every step adds a few of h's ones and twos."""
    g = torch.Generator().manual_seed(3)
    H = problem.H
    problem.x = torch.randint(-1, 2, problem.x.shape, generator=g).to(problem.dtype)
    problem.b = torch.randint(-1, 2, (H,), generator=g).to(problem.dtype)
    problem.h0 = torch.randint(0, 2, (problem.B, H), generator=g).to(problem.dtype)
    w = torch.zeros(H, H)
    for k in range(3):  # three entries a row, spread over all columns
        w[torch.arange(H), (torch.arange(H) * 7 + 11 * k + k) % H] += (-1) ** k
    problem.w = w.to(problem.dtype)
    problem.dy = torch.randint(-1, 2, problem.dy.shape, generator=g).to(problem.dtype)
    problem.dh_n = torch.randint(-1, 2, problem.dh_n.shape, generator=g).to(problem.dtype)
    return problem


# --- every row --------------------------------------------------------------------------------------------------------
@every_case
def test_tails_of_tiles_and_vectors(row, mode):
    units, mr, dtype = row["units"], row["mr"], DTYPES[row["dtype"]]
    widths = (1, 3, units - 1, units, units + 1, 2 * units + 5)
    batches = (1, mr - 1, mr, mr + 1, 4 * mr + 1, 2)
    for H, B in zip(widths, batches, strict=True):
        check(Problem(mode, 3, B, H, dtype=dtype), kernel=row["name"])
    check(Problem(mode, 2, 2, 2 * row["units"] + 2, dtype=dtype, bias=False, states=False), kernel=row["name"])


@every_case
def test_depths_beyond_one_block(row, mode):
    """K blocks, and the first steps read W_hh in place where that is cheaper."""
    for T, B, H in ((3, 7, 521), (1, 1, 300), (2, 1, 521)):
        check(Problem(mode, T, B, H, dtype=DTYPES[row["dtype"]]), kernel=row["name"])


@every_case
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_packed(row, mode, reverse):
    sizes = [9, 9, 6, 3, 3, 1]
    for H in (row["units"] + 3, 5):
        problem = Problem(mode, 6, 9, H, batch_sizes=sizes, reverse=reverse, dtype=DTYPES[row["dtype"]])
        check(problem, kernel=row["name"], threads=2)
    check(Problem(mode, 4, 5, 19, reverse=reverse, dtype=DTYPES[row["dtype"]]), kernel=row["name"], threads=2)


@every_case
def test_projections(row, mode):
    if mode != "lstm":
        pytest.skip("projections belong to lstm")
    units, dtype = row["units"], DTYPES[row["dtype"]]
    for H, P, sizes, reverse in (
        (37, 19, None, False),
        (2 * units + 1, units, [7, 4, 4], True),
        (35, 34, [7, 4, 1], 0),
    ):
        problem = Problem(mode, 3, 7, H, P, batch_sizes=sizes, reverse=bool(reverse), dtype=dtype)
        check(problem, kernel=row["name"], threads=2)
    check(Problem(mode, 1, 1, 300, 290, dtype=dtype), kernel=row["name"])


@every_case
def test_same_bits_on_any_team_and_in_every_run(row, mode):
    cases = [((12, 4, 260), {}), ((1, 1, 400), {}), ((4, 5, 301), {"batch_sizes": [5, 5, 4, 4], "reverse": True})]
    if mode == "lstm":
        cases.append(((6, 4, 260, 131), {}))
    for (T, B, H, *P), options in cases:
        problem = Problem(mode, T, B, H, *P, **options, dtype=DTYPES[row["dtype"]])
        assert _C.rnn_plan(T, B, H, *P, mode=mode, threads=2)["threads"] == 2  # enough work for a team
        first = None
        for threads in (*TEAMS, 2):
            forward = problem.forward(kernel=row["name"], threads=threads)
            results = forward | problem.backward(forward, kernel=row["name"], threads=threads)
            first = first or results
            for name, value in results.items():
                assert value is None or torch.equal(value, first[name]), (name, threads)


@every_case
def test_integers_are_exact(row, mode):
    if mode != "rnn_relu":
        pytest.skip("tanh rounds")
    for B, H in ((1, 1), (row["mr"] + 1, row["units"] + 1), (3, 65), (2, 300)):
        problem = small_integers(Problem(mode, 3, B, H, dtype=DTYPES[row["dtype"]]))
        expected = problem.reference()
        forward = problem.forward(kernel=row["name"])
        assert torch.equal(forward["y"].double(), expected["y"])
        grads = problem.backward(forward, kernel=row["name"])
        assert torch.equal(grads["d_gates"].double(), expected["d_gates"])
        assert torch.equal(grads["dh0"].double(), expected["dh0"])


@every_case
def test_saturated_gates_are_exact(row, mode):
    """sigma(-1e4) is 0 and sigma(1e4) is 1: closed gates keep c and h bit for bit, whatever the rest holds."""
    problem = Problem(mode, 4, 3, row["units"] + 2, dtype=DTYPES[row["dtype"]], bias=False)
    H = problem.H
    if mode == "lstm":
        problem.x[..., :H], problem.x[..., H : 2 * H] = -1e4, 1e4
        assert torch.equal(problem.forward(kernel=row["name"])["c_n"], problem.c0)
        problem.x[..., 3 * H :] = -1e4
        assert bool((problem.forward(kernel=row["name"])["y"] == 0).all())
    elif mode == "gru":
        problem.x[..., H : 2 * H] = -1e4  # z = 0: h = n
        problem.x[..., 2 * H :] = 1e4
        assert bool((problem.forward(kernel=row["name"])["y"] == 1).all())
    elif mode == "rnn_tanh":
        problem.x.fill_(-1e4)
        assert bool((problem.forward(kernel=row["name"])["y"] == -1).all())
    forward = problem.forward(kernel=row["name"])
    for name, value in problem.backward(forward, kernel=row["name"]).items():
        assert value is None or bool(value.isfinite().all()), name


@every_case
def test_special_values_stay_in_their_row(row, mode):
    """NaN and Inf of one sequence reach no other one of the batch."""
    problem = Problem(mode, 3, 4, 21, dtype=DTYPES[row["dtype"]])
    clean = problem.forward(kernel=row["name"])["y"]
    problem.x[1, 2, 5], problem.x[0, 3, 0] = math.nan, math.inf
    y = problem.forward(kernel=row["name"])["y"]
    assert torch.equal(y[:, :2], clean[:, :2]) and torch.equal(y[0, 2], clean[0, 2])
    assert bool(y[1:, 2].isnan().any())


@pytest.mark.parametrize("isa", sorted({row["isa"] for row in ROWS}))
def test_guard_pages(isa, run_python):
    if not all(row["available"] for row in ROWS if row["isa"] == isa):
        pytest.skip(f"no {isa} here")
    run_python("guard_pages_rnn.py", isa)


def test_guard_pages_do_kill(run_python):
    run_python("guard_pages.py", "--touch", status=-signal.SIGSEGV)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["kind"] == "rnn" and row["dtype"] == "float32"], ids=lambda r: r["name"]
)
def test_tanh_is_within_its_error(row):
    """Relative error below 3 * 2^-24 (one more rounding without FMA) over all magnitudes; odd, exact ends, NaN kept."""
    if not row["available"]:
        pytest.skip(row["reason"])
    ends = torch.tensor([0.0, math.inf, -math.inf, math.nan, 1e4, -1e4])
    x = torch.cat([torch.linspace(-12, 12, 40000), torch.logspace(-37, 1, 40000 - len(ends)), ends])
    y = torch.empty(1, 1250, 64)
    gates, w = x.view_as(y), torch.zeros(64, 64)
    _C.rnn(y, None, None, None, gates, None, None, w, None, None, mode="rnn_tanh", kernel=row["name"])
    y, expected = y.flatten(), torch.tanh(x.double())
    error = ((y - expected) / expected)[: -len(ends)].abs().max().item()
    assert error <= (3 if row["isa"] != "scalar" else 4) * 2**-24, error * 2**24
    assert y[-6:-3].tolist() == [0, 1, -1] and y[-2:].tolist() == [1, -1] and bool(y[-3].isnan())


# --- shapes and layouts -----------------------------------------------------------------------------------------------
@every_mode
def test_every_batch_and_width(mode):
    for H in range(1, 71):
        check(Problem(mode, 2, H * 37 % 70 + 1, H, seed=H))


@every_mode
def test_nothing_to_do(mode):
    for T, B in ((0, 3), (4, 0), (0, 0)):
        problem = Problem(mode, T, B, 5)
        forward = problem.forward()
        grads = problem.backward(forward)
        assert torch.equal(forward["h_n"], problem.h0) and torch.equal(grads["dh0"], problem.dh_n)
        if mode == "lstm":
            assert torch.equal(forward["c_n"], problem.c0) and torch.equal(grads["dc0"], problem.dc_n)
    without = Problem(mode, 0, 3, 5, states=False)
    assert bool((without.forward()["h_n"] == 0).all())
    packed = Problem(mode, 0, 0, 5, batch_sizes=[])
    packed.backward(packed.forward())


@every_mode
@pytest.mark.parametrize("P", [0, 11])
def test_output_of_any_strides(mode, P):
    """y as half of a bidirectional output and batch first, with guards around; dy likewise."""
    if P and mode != "lstm":
        pytest.skip("projections belong to lstm")
    problem = Problem(mode, 4, 3, 21, P)
    expected, width = problem.forward()["y"], problem.width
    for swap in (False, True):
        shape = (3, 4, width) if swap else (4, 3, width)
        out = GuardedOutput(shape, row_gap=width)
        y = out.view.transpose(0, 1) if swap else out.view
        forward = problem.forward(y=y)
        assert torch.equal(y, expected)
        out.assert_guards_intact()
        grads = problem.backward(forward)
        plain = problem.dy
        problem.dy = plain.transpose(0, 1).contiguous().transpose(0, 1)
        for name, value in problem.backward(forward).items():
            assert value is None or torch.equal(value, grads[name]), name
        problem.dy = plain


@every_mode
def test_weights_of_any_strides(mode):
    for T, B, H in ((3, 4, 37), (1, 1, 100)):
        problem = Problem(mode, T, B, H)
        w, b = problem.w, problem.b
        problem.w, problem.b = w.t().contiguous().t(), torch.stack([b, b], 1)[:, 0]
        check(problem)
        problem.w = torch.stack([w, w], 2)[..., 0]
        check(problem)
        problem.w = torch.cat([w, w], 1)[:, :H]
        check(problem)


@every_mode
def test_gates_may_be_the_beginning_of_saved(mode):
    problem = Problem(mode, 3, 4, 21)
    if not SAVED[mode]:
        pytest.skip("nothing saved")
    apart = problem.forward()
    shape = _C.rnn_saved_shape(mode, problem.rows, 4, 21, 21)
    saved, gates = torch.empty(shape), problem.x.numel()
    x = saved.view(-1)[:gates].view(problem.x.shape).copy_(problem.x)
    y, h_n, c_n = torch.empty(3, 4, 21), torch.empty(4, 21), torch.empty(4, 21) if mode == "lstm" else None
    _C.rnn(y, h_n, c_n, saved, x, problem.h0, problem.c0, problem.w, problem.b, None, mode=mode)
    assert torch.equal(y, apart["y"]) and torch.equal(saved, apart["saved"])
    later = saved.view(-1)[1 : 1 + gates].view(problem.x.shape)
    with pytest.raises(RuntimeError, match=r"saved.*overlap.*x_gates"):
        _C.rnn(y, h_n, c_n, saved, later, problem.h0, problem.c0, problem.w, problem.b, None, mode=mode)


@every_mode
def test_missing_arguments_mean_zeros(mode):
    problem = Problem(mode, 3, 4, 9, states=False, bias=False)
    problem.dy, problem.dh_n, problem.dc_n = problem.dy * 0, problem.dh_n, None
    forward = problem.forward()
    expected = problem.backward(forward)
    problem.dy = None
    for name, value in problem.backward(forward).items():
        assert value is None or torch.equal(value, expected[name]), name


@pytest.mark.parametrize("mode", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_errors_of_long_sequences_stay_near_torch(mode, dtype):
    """Rms error against float64 over each tenth of T = 1000 steps: at most twice torch's in the same dtype."""
    T, B, H = 1000, 2, 40
    problem = Problem(mode, T, B, H, dtype=dtype, scale=0.5, seed=4)
    expected = problem.reference()["y"]
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[mode](GATES[mode] * H, H, bias=True).to(dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(GATES[mode] * H))
        layer.weight_hh_l0.copy_(problem.w)
        layer.bias_hh_l0.copy_(problem.b)
        layer.bias_ih_l0.zero_()
        state = (problem.h0[None], problem.c0[None]) if mode == "lstm" else problem.h0[None]
        stock = layer(problem.x, state)[0]
    theirs = (stock.double() - expected).square().mean((1, 2)).view(10, -1).mean(1).sqrt()
    tiles = [row["name"] for row, of in CASES if of == mode and row["isa"] == "amx" and row["available"]]
    same = [name for name in tiles if DTYPES[DTYPE[name]] is dtype and PRECISION[name] not in LESS_EXACT]
    for kernel in ("", *same):
        y = problem.forward(kernel=kernel)["y"]
        own = (y.double() - expected).square().mean((1, 2)).view(10, -1).mean(1).sqrt()
        assert bool((own <= 2 * theirs).all()), (kernel, (own / theirs).tolist())


# --- plans ------------------------------------------------------------------------------------------------------------
def up(n, unit):
    return -(-n // unit) * unit


def padded(n):
    return (-(-n // 16) | 1) * 16


def page(floats):
    return up(4 * floats, 4096)


def row_floats(row, K):
    """Of h in the form that products read."""
    parts = up(K, row["k_step"]) // row["k_unit"] * row["planes"]
    return padded(parts + (up(K, 16) if row["k_unit"] == 2 and row["dtype"] != "bfloat16" else 0))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_workspace_is_what_the_formula_says(backward):
    rows, gemm = ({row["name"]: row for row in _C.kernels(op)} for op in ("rnn", "gemm"))
    depth = {"gemm_f32_14x32_avx512": 192, "gemm_f16_14x32_avx512": 256}  # the K blocks of what repairs
    levels = [isa for isa in ("scalar", "avx2", "avx512", "amx") if isa in _C.build_info()["isa_compiled"]]
    for mode, P, (T, B, H), isa, threads, dtype in itertools.product(
        MODES, (0, 77), ((100, 32, 256), (1, 1, 512), (9, 3, 70), (50, 40, 100)), levels, (1, 4), DTYPES
    ):
        if P and mode != "lstm":
            continue
        plan = _C.rnn_plan(T, B, H, P, mode=mode, backward=backward, isa=isa, threads=threads, dtype=dtype)
        row, out = rows[plan["kernel"]], P or H
        assert row["dtype"] == dtype and plan["threads"] in (1, threads)
        steps = lambda n, row=row: up(n, row["k_step"]) // row["k_unit"] * row["planes"]  # noqa: E731
        nr = gemm[plan["product"]]["nr"]
        G = GATES[mode]
        cells = page(B * padded(H)) if mode == "lstm" else 0
        packed = plan["direct"] is None
        blocks, block = -(-H // row["units"]), row["units"] * G
        lines = up(B, 16) if row["isa"] == "amx" else B
        peaks = 0
        if backward:
            expected = packed * page(up(out, nr) * steps(G * H) + 16) + bool(P) * page(up(H, nr) * steps(out) + 16)
            expected += page(2 * lines * row_floats(row, G * H)) + page(B * padded(out)) + cells
            expected += bool(P) * page(lines * row_floats(row, out) + B * padded(H))
            sums = page(B * nr) if plan["repair"] else 0
            columns = up(out, nr) + bool(P) * up(H, nr)
        else:
            expected = packed * page(blocks * block * steps(out)) + page(2 * lines * row_floats(row, out)) + cells
            expected += bool(P) * (
                page(up(out, nr) * steps(H) + 16) + page(lines * row_floats(row, H)) + page(B * padded(out))
            )
            expected += page(blocks * block)
            tiles = 2 if row["isa"] == "amx" else 4
            sums = page(max(min(B, tiles * row["mr"]) * block, B * nr if plan["repair"] and P else 0))
            columns = blocks * block + bool(P) * up(out, nr)
        if plan["repair"]:
            sums += page(16 * row["mr"] + 16 * depth[plan["repair"]] + 16 + B)
            if dtype == "float32":
                peaks = page(columns + (3 if P else 2) * plan["threads"] * B)
        assert plan["workspace_bytes"] == expected + peaks + plan["threads"] * sums, plan


def test_levels_and_sizes_decide():
    assert _C.rnn_plan(100, 32, 256, threads=2)["threads"] == 2
    assert _C.rnn_plan(100, 1, 16, threads=2)["threads"] == 1
    assert _C.rnn_plan(100, 32, 256)["direct"] is None
    if _C.cpu_info()["isa"] != "scalar":
        assert _C.rnn_plan(1, 1, 256)["direct"]
    for row in ROWS:
        mode = MODES_OF[row["kind"]][0]
        plan = _C.rnn_plan(3, 3, 9, mode=mode, kernel=row["name"], dtype=row["dtype"])
        assert (plan["kernel"], plan["units"], plan["mr"], plan["nr"]) == tuple(
            row[k] for k in ("name", "units", "mr", "nr")
        )
        assert all(row["name"] not in line.split(":")[0].split() for line in plan["candidates"])
    with pytest.raises(RuntimeError, match=r"lstm_f32.*expected lstm in f32, got lstm in bf16"):
        _C.rnn_plan(3, 3, 9, kernel=next(r["name"] for r in ROWS if r["name"].startswith("lstm_f32")), dtype="bfloat16")


def test_sizes_near_the_end_of_64_bits():
    for T, B, H in ((2**40, 1, 256), (2, 2**30, 8), (3, 3, 2**16)):
        for backward in (False, True):
            assert 0 < _C.rnn_plan(T, B, H, backward=backward)["workspace_bytes"] < 2**62


def test_calls_are_counted_and_logged(run_python):
    problem = Problem("gru", 3, 2, 9)
    name = _C.rnn_plan(3, 2, 9, mode="gru")["kernel"]
    _C.reset_counters()
    problem.backward(problem.forward())
    assert _C.counters()[name] == 2
    code = (
        "import os, torch\nfrom fastdl import _C\nos.dup2(1, 2)\n"
        "for T in (3, 3, 4):\n"
        "    _C.rnn(torch.empty(T, 2, 9), None, None, None, torch.ones(T, 2, 27), None, None, torch.ones(27, 9), None,"
        " None, mode='gru')\n"
    )
    log = run_python("-c", code, env={"FASTDL_LOG": "1"})
    assert len([line for line in log.splitlines() if name in line and not line.startswith(" ")]) == 2, log


# --- what must not hurt -----------------------------------------------------------------------------------------------
def call(**changes):
    """A valid forward call with some arguments replaced."""
    T, B, H = 3, 2, 5
    arguments = {
        "y": torch.empty(T, B, H),
        "h_n": torch.empty(B, H),
        "c_n": torch.empty(B, H),
        "saved": torch.empty(T * B, 5 * H),
        "x_gates": torch.zeros(T, B, 4 * H),
        "h0": torch.zeros(B, H),
        "c0": torch.zeros(B, H),
        "w_hh": torch.zeros(4 * H, H),
        "b_hh": torch.zeros(4 * H),
        "w_hr": None,
    } | changes
    options = {k: arguments.pop(k) for k in list(arguments) if k in ("mode", "batch_sizes", "kernel", "threads")}
    _C.rnn(*arguments.values(), **({"mode": "lstm"} | options))


SIZES = torch.tensor
BAD = {
    "x_gates of rank 2": ({"x_gates": torch.zeros(6, 20)}, r"x_gates.*\[T, B, gates\*H\].*got \[6, 20\]"),
    "x_gates no multiple of the gates": ({"x_gates": torch.zeros(3, 2, 18)}, r"x_gates.*gates\*H"),
    "x_gates without columns": ({"x_gates": torch.zeros(3, 2, 0)}, r"x_gates.*gates\*H"),
    "x_gates transposed": ({"x_gates": torch.zeros(2, 3, 20).transpose(0, 1)}, r"x_gates.*contiguous"),
    "x_gates expanded": ({"x_gates": torch.zeros(20).expand(3, 2, 20)}, r"x_gates.*contiguous"),
    "y of another shape": ({"y": torch.empty(3, 2, 4)}, r"'y': expected \[3, 2, 5\], got \[3, 2, 4\]"),
    "y expanded": ({"y": torch.empty(3, 1, 5).expand(3, 2, 5)}, r"share memory"),
    "y with strided columns": ({"y": torch.empty(3, 2, 10)[..., ::2]}, r"'y'.*unit stride"),
    "w_hh of another width": ({"w_hh": torch.zeros(20, 4)}, r"w_hh.*expected \[20, 5\] without w_hr"),
    "w_hh of another height": ({"w_hh": torch.zeros(15, 5)}, r"w_hh.*\[20, "),
    "b_hh too short": ({"b_hh": torch.zeros(5)}, r"b_hh.*\[20\]"),
    "h0 of another batch": ({"h0": torch.zeros(3, 5)}, r"h0.*\[2, 5\].*\[3, 5\]"),
    "c0 of another width": ({"c0": torch.zeros(2, 6)}, r"c0.*\[2, 5\]"),
    "h_n of rank 3": ({"h_n": torch.zeros(1, 2, 5)}, r"h_n.*\[2, 5\]"),
    "saved too small": ({"saved": torch.empty(6, 24)}, r"saved.*\[6, 25\]"),
    "w_hr of another shape": ({"w_hr": torch.zeros(5, 4)}, r"w_hr.*\[5, 5\]"),
    "another dtype": ({"h0": torch.zeros(2, 5, dtype=torch.bfloat16)}, r"h0.*float32.*bfloat16"),
    "float64": ({"x_gates": torch.zeros(3, 2, 20, dtype=torch.float64)}, r"x_gates.*float32"),
    "meta": ({"w_hh": torch.zeros(20, 5, device="meta")}, r"w_hh.*memory on cpu"),
    "unknown mode": ({"mode": "elman"}, r"mode.*lstm, gru.*elman"),
    "unknown kernel": ({"kernel": "fast"}, r"kernel.*expected one of.*fast"),
    "negative threads": ({"threads": -1}, r"threads.*at least 0"),
    "sizes that rise": ({"batch_sizes": SIZES([1, 2]), "x_gates": torch.zeros(3, 20)}, r"batch_sizes.*do not rise"),
    "a size of zero": ({"batch_sizes": SIZES([2, 0]), "x_gates": torch.zeros(2, 20)}, r"batch_sizes.*positive"),
    "a negative size": ({"batch_sizes": SIZES([2, -1]), "x_gates": torch.zeros(1, 20)}, r"batch_sizes.*positive"),
    "sizes of more rows": ({"batch_sizes": SIZES([2, 2]), "x_gates": torch.zeros(3, 20)}, r"batch_sizes.*3 rows"),
    "sizes of fewer rows": ({"batch_sizes": SIZES([2]), "x_gates": torch.zeros(3, 20)}, r"batch_sizes.*3 rows"),
    "sizes that overflow": (
        {"batch_sizes": SIZES([2**62, 2**62, 2**62]), "x_gates": torch.zeros(3, 20)},
        r"batch_sizes.*3 rows",
    ),
    "sizes of int32": (
        {"batch_sizes": SIZES([2, 1], dtype=torch.int32), "x_gates": torch.zeros(3, 20)},
        r"batch_sizes.*int64",
    ),
    "sizes of rank 2": ({"batch_sizes": SIZES([[2, 1]]), "x_gates": torch.zeros(3, 20)}, r"batch_sizes.*1-D int64"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes, message):
    call()
    with pytest.raises(RuntimeError, match=message) as error:
        call(**changes)
    assert str(error.value).startswith("fastdl.rnn: ")


def test_non_tensors_and_missing_ones():
    for changes in ({"y": None}, {"x_gates": None}, {"w_hh": None}, {"h0": [1.0]}, {"batch_sizes": [2, 1]}):
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
            call(**({"x_gates": torch.zeros(3, 20)} if "batch_sizes" in changes else {}) | changes)


def test_states_that_a_cell_lacks():
    x, w, b = torch.zeros(3, 2, 15), torch.zeros(15, 5), torch.zeros(15)
    gru = {"mode": "gru", "x_gates": x, "w_hh": w, "b_hh": b, "saved": None}
    call(**gru, c0=None, c_n=None)
    for name in ("c0", "c_n"):
        with pytest.raises(RuntimeError, match=rf"{name}.*None"):
            call(**({"c0": None, "c_n": None} | gru | {name: torch.zeros(2, 5)}))
    with pytest.raises(RuntimeError, match=r"w_hr.*lstm"):
        call(**gru, c0=None, c_n=None, w_hr=torch.zeros(5, 5))


def test_outputs_lie_apart():
    h = torch.zeros(2, 5)
    for changes in ({"h_n": h, "h0": h}, {"h_n": h, "c_n": h}):
        with pytest.raises(RuntimeError, match="overlap"):
            call(**changes)


def test_backward_checks_its_arguments():
    for mode, name in (("gru", "d_recurrent"), ("lstm", "d_hidden"), ("lstm", "hidden")):
        problem = Problem(mode, 2, 3, 5, 4 if mode == "lstm" else 0)
        forward = problem.forward()
        for bad, kind in ((None, TypeError), (torch.empty(2, 3, 6), RuntimeError)):
            extra = {"d_recurrent": torch.empty(2, 3, 5)} if mode == "gru" else {}
            extra |= {"d_hidden": torch.empty(2, 3, 4), "hidden": torch.empty(2, 3, 5)} if mode == "lstm" else {}
            extra[name] = bad
            with pytest.raises(kind, match=name):
                _C.rnn_backward(
                    problem.empty(*problem.x.shape), None, None, problem.dy, None, None, forward["saved"],
                    forward["y"], None, None, problem.w, None, problem.r, mode=mode, **extra,
                )  # fmt: skip
    problem = Problem("lstm", 2, 3, 5)
    forward = problem.forward()
    for name, value in (("saved", None), ("saved", torch.empty(6, 24)), ("y", torch.empty(2, 3, 4)), ("y", None)):
        with pytest.raises((RuntimeError, TypeError), match=name):
            problem.backward(forward | {name: value})
