"""`rnn` and `rnn_backward` of the CUDA kernels against float64, on every row of their table."""

import math

import pytest
import torch

from conftest import DTYPES
from cuda_rnn_problem import MODES_OF, ROWS, GpuProblem, every_case, every_row, module, some_cases
from rnn_reference import MODES

# Of a few steps with values of order one: rounding of the dtype, grown by the recurrence and by sums of gradients.
# Measured: what can be derived, for one step, is in test_cuda_rnn_bounds.py.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TF32 = 2e-4
EACH_FAMILY = ("lstm_f32_8x32", "lstm_bf16", "gru_f16", "gru_tf32", "rnn_f32_fma")  # both schedules of each

pytestmark = pytest.mark.skipif(not ROWS, reason="neither the host twin nor the CUDA kernels are built")


def assert_close(problem, got, expected, names=None):
    for name, reference in expected.items():
        if got.get(name) is None or (names and name not in names):
            continue
        actual = got[name].double()
        assert actual.shape == reference.shape, name
        if not reference.numel():
            continue
        scale = max(1.0, reference.abs().max().item())
        error = (actual - reference).abs().max().item()
        assert error <= (TF32 if "tf32" in problem.kernel else TOLERANCE[problem.dtype]) * scale, (
            name,
            error / scale,
        )  # NaN: never written


def run(problem):
    forward = problem.forward()
    return forward, problem.backward(forward)


def check(problem):
    """Forward, inference and backward of one problem against float64."""
    expected = problem.reference()
    # In 16 bits a rounded zero flips relu's derivative: no bound on what that does to gradients.
    names = ("y", "h_n") if problem.mode == "rnn_relu" and problem.dtype != torch.float32 else None
    forward, grads = run(problem)
    assert_close(problem, forward | grads | problem.weight_gradients(forward, grads), expected, names)
    inference = problem.forward(training=False)
    for name in ("y", "h_n", "c_n"):
        if inference[name] is not None:
            assert torch.equal(inference[name], forward[name]), name


# --- every row --------------------------------------------------------------------------------------------------------
@every_case
def test_tails_of_tiles(row, mode, gpu):
    units, options = row["units"], {"dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    for H, B in ((1, 1), (units - 1, 8), (units + 1, 9)):
        check(GpuProblem(mode, 2, B, H, **options))
    check(GpuProblem(mode, 3, 2, 2 * units + 5, bias=False, states=False, **options))


@some_cases
def test_more_than_one_tile_of_sequences(row, mode, gpu):
    check(GpuProblem(mode, 2, 41, 5, dtype=DTYPES[row["dtype"]], gpu=gpu, kernel=row["name"]))


@some_cases
def test_blocks_with_several_groups_and_tiles(row, mode, gpu):
    """On few multiprocessors a block has more than one group of units, and more than one tile of sequences."""
    H, B, options = 2 * row["units"] + 3, 34, {"gpu": gpu, "kernel": row["name"], "multiprocessors": 2}
    for seed in (0, 1000, 1001, 1002) if gpu.is_twin else (0,):  # warps run far ahead of each other
        if gpu.is_twin:
            gpu.module.set_seed(seed)
        check(GpuProblem(mode, 2, B, H, dtype=DTYPES[row["dtype"]], seed=seed, **options))


@some_cases
def test_k_over_all_warps(row, mode, gpu):
    """More blocks of K than warps, 11: sums of several blocks, a warp with one of them, and warps with none."""
    options = {"dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    if row["kind"] == "lstm":  # a projection widens K alone
        check(GpuProblem(mode, 1, 2, 3, 10 * 32 + 3, **options))
    else:
        check(GpuProblem(mode, 1, 2, 10 * 32 + 3, **options))


@some_cases
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_packed(row, mode, reverse, gpu):
    options = {"reverse": reverse, "dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    check(GpuProblem(mode, 6, 11, row["units"] + 3, batch_sizes=[11, 11, 9, 3, 3, 1], **options))
    check(GpuProblem(mode, 4, 3, 5, **options))


@pytest.mark.sanitized
@pytest.mark.parametrize("row", [r for r in ROWS if r["name"].startswith(EACH_FAMILY)], ids=lambda row: row["name"])
def test_small_sequences(row, gpu):
    """Every family of kernels once."""
    mode, options = MODES_OF[row["kind"]][0], {"dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    check(GpuProblem(mode, 2, 9, row["units"] + 1, batch_sizes=[9, 2], **options))
    if mode == "lstm":
        check(GpuProblem(mode, 2, 2, 9, 3, **options))


@every_row
def test_projections(row, gpu):
    if row["kind"] != "lstm":
        pytest.skip("projections belong to lstm")
    options = {"dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    check(GpuProblem("lstm", 3, 3, 21, 19, **options))
    check(GpuProblem("lstm", 3, 7, 37, 5, batch_sizes=[7, 4, 4], reverse=True, **options))
    check(GpuProblem("lstm", 4, 7, 9, 8, batch_sizes=[7, 4, 4, 1], **options))


@some_cases
def test_no_steps_and_no_sequences(row, mode, gpu):
    options = {"dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    for T, B in ((0, 3), (2, 0), (0, 0)):
        problem = GpuProblem(mode, T, B, 5, **options)
        forward, grads = run(problem)
        if T == 0:
            assert torch.equal(forward["h_n"], problem.h0) and torch.equal(grads["dh0"], problem.dh_n)
            if mode == "lstm":
                assert torch.equal(forward["c_n"], problem.c0) and torch.equal(grads["dc0"], problem.dc_n)


@some_cases
def test_same_bits_in_any_order_of_threads(row, mode, gpu):
    options = {"dtype": DTYPES[row["dtype"]], "gpu": gpu, "kernel": row["name"]}
    for problem in (
        GpuProblem(mode, 3, 10, row["units"] + 1, batch_sizes=[10, 9, 4], **options),
        *([GpuProblem(mode, 3, 3, 11, 9, reverse=True, **options)] if mode == "lstm" else []),
    ):
        first = None
        for seed in (0, 1, 2, 3):
            if gpu.is_twin:
                gpu.module.set_seed(seed)
            forward, grads = run(problem)
            results = forward | grads
            first = first or results
            for name, value in results.items():
                assert value is None or torch.equal(value, first[name]), (name, seed)
    if gpu.is_twin:
        gpu.module.set_seed(0)


@every_case
def test_integers_are_exact(row, mode, gpu):
    if mode != "rnn_relu":
        pytest.skip("tanh rounds")
    for B, H in ((1, 1), (9, row["units"] + 1), (3, 65)):
        problem = GpuProblem(mode, 3, B, H, dtype=DTYPES[row["dtype"]], gpu=gpu, kernel=row["name"])
        g = torch.Generator().manual_seed(3)
        problem.x = torch.randint(-1, 2, problem.x.shape, generator=g).to(problem.dtype)
        problem.b = torch.randint(-1, 2, (H,), generator=g).to(problem.dtype)
        problem.h0 = torch.randint(0, 2, (B, H), generator=g).to(problem.dtype)
        w = torch.zeros(H, H)
        for k in range(3):  # three entries a row, spread over all columns
            w[torch.arange(H), (torch.arange(H) * 7 + 11 * k + k) % H] += (-1) ** k
        problem.w = w.to(problem.dtype)
        problem.dy = torch.randint(-1, 2, problem.dy.shape, generator=g).to(problem.dtype)
        problem.dh_n = torch.randint(-1, 2, problem.dh_n.shape, generator=g).to(problem.dtype)
        expected = problem.reference()
        forward, grads = run(problem)
        assert torch.equal(forward["y"].double(), expected["y"])
        assert torch.equal(grads["d_gates"].double(), expected["d_gates"])
        assert torch.equal(grads["dh0"].double(), expected["dh0"])


@some_cases
def test_special_values_stay_in_their_row(row, mode, gpu):
    """NaN and Inf of one sequence reach no other one of the batch."""
    problem = GpuProblem(mode, 3, 4, 11, dtype=DTYPES[row["dtype"]], gpu=gpu, kernel=row["name"])
    clean = problem.forward()["y"]
    problem.x[1, 2, 5], problem.x[0, 3, 0] = math.nan, math.inf
    y = problem.forward()["y"]
    assert torch.equal(y[:, :2], clean[:, :2]) and torch.equal(y[0, 2], clean[0, 2])
    assert bool(y[1:, 2].isnan().any())


# --- float32 by parts -------------------------------------------------------------------------------------------------
F32 = [row for row in ROWS if row["dtype"] == "float32" and row["kind"] == "rnn"]
UNIT = {"fma": 1e-6, "ieee": 1e-6, "tf32": 1e-4}


@pytest.mark.parametrize("row", F32, ids=lambda row: row["name"])
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 3e36])
def test_tiny_and_huge_states(row, scale, gpu):
    """Parts of float32 hold what bfloat16 does not: sums are as accurate as those of ordinary numbers."""
    problem = GpuProblem("rnn_relu", 2, 3, 37, gpu=gpu, kernel=row["name"], bias=False)
    problem.x, problem.h0 = problem.x * 0, problem.h0 * scale
    problem.dy, problem.dh_n = problem.dy * 0, problem.dh_n * scale
    expected, (forward, grads) = problem.reference(), run(problem)
    for name, got in (forward | grads).items():
        if name in expected and got is not None:
            error = (got.double() - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-300)
            assert error.item() < UNIT[row["precision"]], (name, error.item())


@pytest.mark.parametrize("row", F32, ids=lambda row: row["name"])
def test_infinities_are_those_of_fma(row, gpu):
    """Inf in h or W gives Inf, not the NaN that its parts would."""
    problem = GpuProblem("rnn_relu", 2, 2, 9, gpu=gpu, kernel=row["name"])
    problem.w = problem.w.abs() + 0.1
    problem.h0[0, 3] = math.inf
    y, expected = problem.forward()["y"], problem.reference()["y"]
    assert torch.equal(y.isinf(), expected.isinf()) and not bool(y.isnan().any())
    assert bool(y[:, 0].isinf().all())


# --- strides, places --------------------------------------------------------------------------------------------------
@every_row
def test_strides(row, gpu):
    """batch_first views of y, halves of a bidirectional output, transposed W, a bias with a stride."""
    mode, dtype = MODES_OF[row["kind"]][0], DTYPES[row["dtype"]]
    plain = GpuProblem(mode, 3, 4, 7, dtype=dtype, gpu=gpu, kernel=row["name"])
    expected, expected_grads = run(plain)
    problem = GpuProblem(mode, 3, 4, 7, dtype=dtype, gpu=gpu, kernel=row["name"])
    problem.w = problem.w.t().contiguous().t()
    problem.b = torch.stack([problem.b, problem.b], 1)[:, 0]
    problem.h0 = torch.cat([problem.h0, problem.h0], 1)[:, 7:]
    y = torch.full((4, 3, 14), 9.0, dtype=dtype).transpose(0, 1)
    forward = problem.forward(y=y[..., 7:])
    grads = problem.backward(forward)
    for name, value in (expected | expected_grads).items():
        assert value is None or torch.equal((forward | grads)[name], value), name
    assert bool((y[..., :7] == 9).all())


@some_cases
def test_saved_may_begin_with_the_gates(row, mode, gpu):
    if mode.startswith("rnn"):
        pytest.skip("saves nothing")
    problem = GpuProblem(mode, 3, 2, 5, dtype=DTYPES[row["dtype"]], gpu=gpu, kernel=row["name"])
    apart, x = problem.forward(), problem.x
    saved = torch.full(apart["saved"].shape, math.nan, dtype=problem.dtype, device=gpu.device)
    gates = saved.view(-1)[: x.numel()].view(x.shape).copy_(x)
    y = torch.empty(3, 2, 5, dtype=problem.dtype, device=gpu.device)
    on = [None if t is None else t.to(gpu.device) for t in (problem.h0, problem.c0, problem.w, problem.b)]
    bytes = gpu.module.rnn_plan(3, 2, 5, mode=mode, dtype=row["dtype"], kernel=row["name"])["workspace_bytes"]
    workspace = torch.empty(bytes, dtype=torch.uint8, device=gpu.device)
    gpu.module.rnn(y, None, None, saved, gates, *on, None, workspace, mode=mode, kernel=row["name"])
    assert torch.equal(saved.cpu(), apart["saved"]) and torch.equal(y.cpu(), apart["y"])


def test_many_sizes_take_several_launches(gpu):
    """More runs of equal batch sizes than a launch's parameters hold; two blocks, which must meet in each launch."""
    problem = GpuProblem("rnn_tanh", 66, 66, 18, batch_sizes=list(range(66, 0, -1)), reverse=True, gpu=gpu)
    problem.multiprocessors = 2
    if gpu.is_twin:
        gpu.module.set_seed(1000)
    check(problem)


def test_a_graph_replays_sequences(gpu):
    """Both schedules are captured: a launch whose blocks meet, its counter set to zero on every replay."""
    if gpu.is_twin:
        pytest.skip("graphs are a GPU's")
    module, where = gpu.module, {"device": gpu.device}
    x, w, y = torch.randn(5, 3, 160, **where), torch.randn(160, 40, **where) / 8, torch.empty(5, 3, 40, **where)
    for kernel in ("lstm_f32_8x32_resident_sm80", "lstm_f32_8x32_steps_sm80"):
        bytes = module.rnn_plan(5, 3, 40, mode="lstm", kernel=kernel)["workspace_bytes"]
        workspace, graph = torch.empty(bytes, dtype=torch.uint8, **where), torch.cuda.CUDAGraph()
        given = (y, None, None, None, x, None, None, w, None, None, workspace)
        module.rnn(*given, mode="lstm", kernel=kernel)
        expected = y.clone()
        with torch.cuda.graph(graph):
            module.rnn(*given, mode="lstm", kernel=kernel)
        for _ in range(3):
            y.fill_(math.nan), workspace.fill_(0xFF)
            graph.replay()
            assert torch.equal(y, expected)


def test_arguments_are_checked(gpu):
    problem = GpuProblem("lstm", 2, 2, 4, gpu=gpu)
    empty = torch.empty(3, dtype=torch.uint8, device=gpu.device)
    y = torch.empty(2, 2, 4, device=gpu.device)
    x, w = problem.x.to(gpu.device), problem.w.to(gpu.device)
    for workspace, got in ((empty, "3 at"), (None, "None")):
        with pytest.raises(RuntimeError, match=rf"'workspace': expected \d+ bytes.*, got {got}"):
            gpu.module.rnn(y, None, None, None, x, None, None, w, None, None, workspace, mode="lstm")
    with pytest.raises(RuntimeError, match="expected gru in bf16, got lstm in f32"):
        gpu.module.rnn_plan(2, 2, 4, kernel="gru_bf16_16x32_steps_sm80")
    with pytest.raises(RuntimeError, match="expected one of"):
        gpu.module.rnn_plan(2, 2, 4, kernel="none")
    with pytest.raises(RuntimeError, match="'mode'"):
        gpu.module.rnn_plan(2, 2, 4, mode="none")


# --- plans ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, dtype, mode, B, H, backward, resident",
    [
        ("sm90", "bfloat16", "lstm", 16, 1024, False, True),
        ("sm90", "bfloat16", "lstm", 16, 1024, True, True),
        ("sm90", "float32", "lstm", 16, 1024, False, True),
        ("sm90", "float32", "lstm", 16, 1024, True, False),  # 16 rows of W_hh^T in three parts: 384 KB
        ("sm80", "float32", "lstm", 16, 1024, False, False),
        ("sm80", "bfloat16", "lstm", 64, 1024, False, True),
        ("sm80", "float32", "gru", 64, 512, True, True),
        ("sm90", "float16", "lstm", 8, 4096, False, False),
        ("sm80", "bfloat16", "rnn_tanh", 8, 256, True, True),
    ],
)
def test_plans(name, dtype, mode, B, H, backward, resident):
    gpu = module.gpu_named(name)
    plan = module.rnn_plan(100, B, H, mode=mode, dtype=dtype, gpu=name, backward=backward)
    assert plan["resident"] == resident and plan["shared_bytes"] <= gpu["shared_bytes"], plan["text"]
    if resident:
        assert plan["unit_blocks"] * plan["batch_blocks"] <= gpu["multiprocessors"]
    lost = " ".join(plan["candidates"])
    assert ("does not fit" in lost) == (not resident)


def test_plans_by_precision():
    for mode, name in (("lstm", "lstm_{}_8x32_steps_sm80"), ("gru", "gru_{}_16x32_steps_sm80")):
        for precision, kind in (("fma", "f32_fma"), ("ieee", "f32"), ("tf32", "tf32"), ("bf16", "tf32")):
            plan = module.rnn_plan(9, 8, 3000, mode=mode, precision=precision, gpu="sm80")
            assert plan["kernel"] == name.format(kind), plan["text"]
    assert (
        module.rnn_plan(9, 8, 8, dtype="float16", precision="fma", gpu="sm80")["kernel"]
        == "lstm_f16_8x32_resident_sm80"
    )


def test_plan_fills_the_gpu_with_small_tiles():
    small = module.rnn_plan(10, 32, 64, mode="lstm", dtype="bfloat16", gpu="sm90")
    large = module.rnn_plan(10, 4096, 64, mode="lstm", dtype="bfloat16", gpu="sm90")
    assert small["tile_rows"] == 8 and small["batch_blocks"] == 4
    assert large["tile_rows"] == 32 and large["unit_blocks"] * large["batch_blocks"] > 64


@pytest.mark.parametrize("mode", MODES)
def test_saved_shape(mode):
    width = {"lstm": 5, "gru": 4}.get(mode, 0)
    assert module.rnn_saved_shape(mode, 6, 2, 7, 7) == (6, width * 7)
