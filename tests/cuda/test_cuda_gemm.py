"""GEMM of the CUDA kernels, on a GPU or on its host twin: every row of the table against float64."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fastdl import testing
from fastdl.testing import LAYOUTS, GuardedOutput, integer_matrix

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
NAN, INF = math.nan, math.inf


def module_or_none(name):
    try:
        return importlib.import_module(f"fastdl.{name}")
    except ImportError:
        return None


MODULES = {"twin": module_or_none("_twin"), "cuda": module_or_none("_cuda")}
ANY = next((m for m in MODULES.values() if m), None)
if ANY is None:
    pytest.skip("built without CUDA kernels and without FASTDL_TWIN", allow_module_level=True)
ROWS = ANY.kernels("gemm")


def rows_where(condition):
    return pytest.mark.parametrize("row", [r for r in ROWS if condition(r)], ids=lambda row: row["name"])


every_row = rows_where(lambda row: True)
tile_rows = rows_where(lambda row: row["kind"] == "tile")
dot_rows = rows_where(lambda row: row["kind"] == "dot")
quick_rows = rows_where(lambda row: row["tile"] != (128, 128))
split_rows = rows_where(lambda row: row["dtype"] == "float32" and row["precision"] != "fma")


@pytest.fixture(params=MODULES)
def gpu(request):
    """module, and its device as torch's default one."""
    module = MODULES[request.param]
    if module is None:
        pytest.skip(f"no module for {request.param} in this build")
    if request.param == "cuda" and not (module.gpu_count() and torch.cuda.is_available()):
        pytest.skip("no GPU here")
    device = torch.device("cpu" if request.param == "twin" else "cuda")
    with device:
        yield SimpleNamespace(module=module, device=device, twin=request.param == "twin")
    if request.param == "twin":
        module.set_seed(0)


@pytest.fixture
def generator(gpu):
    return torch.Generator(gpu.device).manual_seed(20240)


def dtype_of(row):
    return getattr(torch, row["dtype"])


def gemm(gpu, a, b, out, *, row=None, splits=0, precision="ieee", **options):
    """out = a @ b with a workspace full of NaN; the operands of a dot kernel in an order that it takes."""
    if row and row["kind"] == "dot":
        a, b = along_k(a), along_k(b.mT).mT
    kernel = row["name"] if row else ""
    precision = row["precision"] if row else precision
    size = gpu.module.gemm_workspace(a, b, out, precision, kernel, splits)
    workspace = torch.full((size,), 255, dtype=torch.uint8) if size else None
    gpu.module.gemm(a, b, out, workspace=workspace, kernel=kernel, precision=precision, splits=splits, **options)
    return out


def along_k(x):
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def check_exact(gpu, row, a, b, splits=1, out=None, **options):
    out = out or GuardedOutput(
        (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), dtype=a.dtype
    )
    gemm(gpu, a, b, out.view, row=row, splits=splits, **options)
    assert torch.equal(out.view, (a.double() @ b.double()).to(a.dtype)), (a.shape, b.shape, splits)
    out.assert_guards_intact()
    return out.view


# --- the product ------------------------------------------------------------------------------------------------------
@every_row
def test_tails_of_tiles(gpu, row, generator):
    """Sizes around the tile in M and N, and around the depth of a slot and of all slots in K."""
    (m, n), depth, dtype = row["tile"], row["depth"], dtype_of(row)
    for M, N, K in (
        (1, 1, 1),
        (m, n, depth),
        (m - 1, n - 1, depth - 1),
        (m + 1, 7, depth + 1),
        (3, n + 9, 5 * depth + 3),
        (m, n, 0),
    ):
        a, b = (integer_matrix(s, max(K, 1), generator, dtype) for s in ((M, K), (K, N)))
        check_exact(gpu, row, a, b)


@tile_rows
@pytest.mark.parametrize("a_transposed", [False, True], ids=["", "a_transposed"])
@pytest.mark.parametrize("b_transposed", [False, True], ids=["", "b_transposed"])
def test_aligned_operands_without_conflicts(gpu, row, a_transposed, b_transposed, generator):
    """All four storage orders by 16-byte copies, tails included, with no bank conflict."""
    (m, n), depth, dtype = row["tile"], row["depth"], dtype_of(row)
    M, N, K = m - 8, n - 16, 2 * depth + 8
    a, b = (integer_matrix(s, K, generator, dtype) for s in ((M, K), (K, N)))
    a, b = a.mT.contiguous().mT if a_transposed else a, b.mT.contiguous().mT if b_transposed else b
    if gpu.twin:
        gpu.module.take_counts()
    out = check_exact(gpu, row, a, b, out=GuardedOutput((M, N), row_gap=8, band=64, dtype=dtype))
    if gpu.twin:
        assert gpu.module.take_counts()[0] == 0
        for seed in (1, 2, 1000, 1001):
            gpu.module.set_seed(seed)
            assert torch.equal(out, check_exact(gpu, row, a, b)), seed
            check_exact(gpu, row, a[:, :depth], b[:depth])  # one slot: where the sums go when it is used up


@every_row
def test_aligned_rows_that_end_within_a_chunk(gpu, row, generator):
    """Rows of a stride that 16-byte copies take, of a length that they do not: what lies behind is NaN."""
    dtype, depth = dtype_of(row), row["depth"]
    M, N, K = 13, 21, depth + 5

    def wide(x):
        buffer = torch.full((x.shape[0], x.shape[1] // 8 * 8 + 16), NAN, dtype=dtype)
        buffer[:, : x.shape[1]] = x
        return buffer[:, : x.shape[1]]

    for a_transposed, b_transposed in ((False, False), (True, True)):
        a, b = (integer_matrix(s, K, generator, dtype) for s in ((M, K), (K, N)))
        check_exact(gpu, row, wide(a.mT).mT if a_transposed else wide(a), wide(b.mT).mT if b_transposed else wide(b))


@quick_rows
@pytest.mark.parametrize("b_layout", LAYOUTS)
def test_layouts(gpu, row, b_layout, generator):
    """Each layout of B against a layout of A; operands that overlap or repeat included."""
    names = list(LAYOUTS)
    a_layout = names[(names.index(b_layout) * 5 + 3) % len(names)]
    M, N, K = 13, 37, row["depth"] + 11
    a, b = (integer_matrix(s, K, generator, dtype_of(row)) for s in ((M, K), (K, N)))
    check_exact(gpu, row, LAYOUTS[a_layout](a), LAYOUTS[b_layout](b))


# --- few rows, or few columns -----------------------------------------------------------------------------------------
@dot_rows
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_few_rows_by_many_lines(gpu, row, turned, generator):
    """Each number of the few around the tile, lines and K around theirs; rows that 16-byte loads take, and rows that
    are one element off or of an odd stride: the same bits."""
    (m, n), depth, dtype = row["tile"], row["depth"], dtype_of(row)
    chunk = depth // row["threads"]
    for few in sorted({1, 2, m - 1, m, m + 1}):
        lines, K = n * 3 + few % n, (depth + chunk * few, depth - few, 5)[few % 3]
        x, w = (integer_matrix(s, K, generator, dtype) for s in ((few, K), (lines, K)))
        results = []
        for gap in (8, 3):
            wide = [torch.full((t.shape[0], K // 8 * 8 + 8 + gap), NAN, dtype=dtype) for t in (x, w)]
            for buffer, t in zip(wide, (x, w), strict=True):
                buffer[:, :K] = t
            a, b = (buffer[:, :K] for buffer in wide)
            results.append(check_exact(gpu, row, b, a.mT).mT if turned else check_exact(gpu, row, a, b.mT))
        assert torch.equal(*results)
        noise = torch.randn(2, lines, K + 1, generator=generator).to(dtype)
        a, b = noise[0, :few, :K].contiguous(), noise[1, :, :K].contiguous()
        off = [torch.full((t.numel() + 1,), NAN, dtype=dtype)[1:].view(t.shape).copy_(t) for t in (a, b)]
        for splits in (1, 2):
            aligned, shifted = (
                gemm(gpu, *((w, x.mT) if turned else (x, w.mT)),
                     torch.full((lines, few) if turned else (few, lines), NAN, dtype=dtype), row=row, splits=splits)
                for x, w in ((a, b), off)
            )  # fmt: skip
            assert torch.equal(aligned, shifted)
            testing.assert_gemm_close(aligned.mT if turned else aligned, a, b.mT, precision="fma")


@pytest.mark.sanitized
@dot_rows
def test_few_rows_in_every_order(gpu, row, generator):
    dtype, K = dtype_of(row), row["depth"] + 24
    a, b = (torch.randn(s, generator=generator).to(dtype) for s in ((3, K), (6, K)))
    results = []
    for seed in (0, 1, 2, 1000, 1001):
        if gpu.twin:
            gpu.module.set_seed(seed)
        results.append(gemm(gpu, a, b.mT, torch.full((3, 6), NAN, dtype=dtype), row=row, splits=2, activation="silu"))
    assert all(torch.equal(results[0], other) for other in results)


@dot_rows
@pytest.mark.parametrize("splits", [1, 2])
def test_epilogue_of_few_columns(gpu, row, splits, generator):
    """The problem is turned, what is added to it is not: exact on integers, in a C with gaps."""
    dtype, K = dtype_of(row), row["depth"] + 9
    a, b, bias, residual, initial = (
        integer_matrix(s, K, generator, dtype) for s in ((11, K), (5, K), (5,), (11, 5), (11, 5))
    )
    out, pre, beside = (GuardedOutput((11, 5), dtype=dtype) for _ in range(3))
    beside.view.copy_(residual)
    out.view.copy_(initial)
    gemm(gpu, a, b.mT, out.view, row=row, splits=splits, bias=bias, residual=beside.view, pre=pre.view,
         activation="relu", accumulate=True)  # fmt: skip
    z = initial.double() + a.double() @ b.double().mT + bias.double()
    assert torch.equal(pre.view, z.to(dtype))
    assert torch.equal(out.view, (z.relu() + residual.double()).to(dtype))
    for guarded in (out, pre, beside):
        guarded.assert_guards_intact()


@dot_rows
def test_few_rows_refuse_another_order(gpu, row):
    a, b = torch.ones(2, 8, dtype=dtype_of(row)), torch.ones(8, 5, dtype=dtype_of(row))
    with pytest.raises(RuntimeError, match=r"expected operands contiguous along K, got strides 1 of A and 5 of B"):
        gpu.module.gemm(a, b, torch.empty(2, 5, dtype=a.dtype), kernel=row["name"], precision=row["precision"])


@every_row
def test_batch(gpu, row, generator):
    """Batch dimensions that broadcast, in any order in memory; a vector as an operand, B of one column."""
    dtype = dtype_of(row)
    a, b = integer_matrix((2, 1, 5, 24), 24, generator, dtype), integer_matrix((3, 24, 16), 24, generator, dtype)
    check_exact(gpu, row, a, b)
    out = torch.full((3, 2, 5, 16), NAN, dtype=dtype).transpose(0, 1)
    gemm(gpu, a, b, out, row=row)
    assert torch.equal(out, (a.double() @ b.double()).to(dtype))
    x = integer_matrix((2, 3, 24), 24, generator, dtype)
    check_exact(gpu, row, x, b[0])  # rows of a batch become rows of one matrix
    column = torch.full((6, 1), NAN, dtype=dtype)
    gemm(gpu, x.view(6, 24), b[0, :, :1], column, row=row)
    assert torch.equal(column, (x.view(6, 24).double() @ b[0, :, :1].double()).to(dtype))


def test_nothing_to_do(gpu):
    for M, N, batch in ((0, 3, ()), (3, 0, ()), (2, 2, (0,))):
        gpu.module.gemm(torch.ones(*batch, M, 4), torch.ones(*batch, 4, N), torch.ones(*batch, M, N))


@every_row
@pytest.mark.parametrize("splits", [2, 3])
def test_split_k(gpu, row, splits, generator):
    """Partial sums in a poisoned workspace, added in a fixed order; a short last run; batches, guards."""
    dtype, depth = dtype_of(row), row["depth"]
    K = splits * depth - 5
    a, b = (integer_matrix(s, K, generator, dtype) for s in ((2, 9, K), (2, K, 21)))
    check_exact(gpu, row, a, b, splits=splits)
    c = torch.empty(2, 9, 21, dtype=dtype)
    plan = gpu.module.gemm_plan(a, b.mT.contiguous().mT, c, row["precision"], row["name"], "sm80", splits)
    assert plan["splits"] == splits and plan["workspace_bytes"] >= splits * 2 * 9 * 21 * 4
    noise = torch.randn(K, 21, generator=generator).to(dtype)
    results = []
    for seed in (0, 4, 1000):
        if gpu.twin:
            gpu.module.set_seed(seed)
        results.append(gemm(gpu, a[0], noise, torch.empty(9, 21, dtype=dtype), row=row, splits=splits))
    assert all(torch.equal(results[0], other) for other in results)


def test_the_workspace_is_checked(gpu):
    a, b, out = torch.ones(4, 200), torch.ones(200, 4), torch.empty(4, 4)
    with pytest.raises(RuntimeError, match=r"argument .workspace.: expected .* bytes, got None"):
        gpu.module.gemm(a, b, out, splits=2)
    with pytest.raises(RuntimeError, match=r"argument .workspace.: expected .* bytes, 16-byte aligned, got 8"):
        gpu.module.gemm(a, b, out, splits=2, workspace=torch.empty(8, dtype=torch.uint8))


@pytest.mark.sanitized
@rows_where(lambda row: row["tile"] != (128, 128) or row["precision"] == "tf32")
def test_a_small_call(gpu, row, generator):
    """Operands that end where their allocations do, in two runs of K, with all that may follow on a product."""
    dtype, K = dtype_of(row), row["depth"] + 11
    a, b, bias, residual, initial = (
        integer_matrix(s, K, generator, dtype) for s in ((3, K), (K, 7), (7,), (3, 7), (3, 7))
    )
    out, pre = initial.clone(), torch.full((3, 7), NAN, dtype=dtype)
    gemm(gpu, a, b, out, row=row, splits=2, bias=bias, residual=residual, pre=pre, activation="relu", accumulate=True)
    z = initial.double() + a.double() @ b.double() + bias.double()
    assert torch.equal(pre, z.to(dtype)) and torch.equal(out, (z.relu() + residual.double()).to(dtype))


# --- accuracy ---------------------------------------------------------------------------------------------------------
@every_row
def test_random_operands(gpu, row, generator):
    dtype = dtype_of(row)
    K = 1000 if row["tile"] != (128, 128) else 300
    a, b = (torch.randn(s, generator=generator).to(dtype) for s in ((20, K), (K, 30)))
    for splits in (1, 3):
        out = gemm(gpu, a, b, torch.full((20, 30), NAN, dtype=dtype), row=row, splits=splits)
        testing.assert_gemm_close(out, a, b, precision=row["precision"])


@rows_where(lambda row: row["name"].startswith("gemm_f32_split_64"))
def test_long_sums_are_promoted(gpu, row, generator):
    """Positive terms: sums that tensor cores cut off would drift."""
    a, b = (torch.rand(s, generator=generator) for s in ((16, 3000), (3000, 24)))
    out = gemm(gpu, a, b, torch.empty(16, 24), row=row, splits=1)
    reference = testing.gemm_reference(a, b)
    measures = testing.assert_within_bound(out, reference, precision="ieee")
    assert measures.rms < 30 * 2.0**-24


@split_rows
@pytest.mark.parametrize("splits", [1, 2])
def test_special_values(gpu, row, splits, generator):
    """NaN, Inf, the largest and the tiniest numbers come out as float32 has them."""
    K = 70
    a, b = (torch.randn(s, generator=generator) for s in ((12, K), (K, 20)))
    a[1, 3], a[2, 4], a[3, 5] = NAN, INF, -INF
    a[4, 69], b[69, 0] = INF, 0.0  # Inf * 0
    b[5, 2], b[6, 3] = INF, NAN
    a[5] = 3e38
    b[:, 4] = 1e-30
    a[6, :2] = torch.tensor([3.4e38, -3.4e38])
    out = gemm(gpu, a, b, torch.full((12, 20), 5.0), row=row, splits=splits)
    expected = a @ b
    testing.assert_special_values(out, torch.where(expected.isfinite(), a.double() @ b.double(), expected.double()))


@split_rows
@pytest.mark.parametrize("splits", [1, 2])
def test_tiny_values(gpu, row, splits, generator):
    """Rows and columns whose parts or products tensor cores would lose; zeros beside them."""
    K = 70
    a, b = (torch.randn(s, generator=generator) for s in ((10, K), (K, 20)))
    a[1] *= 2.0**-110
    a[2] *= 2.0**-120
    b[:, 3] *= 2.0**-115
    b[:, 4] *= 2.0**60
    a[3] *= 2.0**-60
    b[:, 5] *= 2.0**-50
    a[4], b[:, 6] = 0, 0
    a[5] *= 2.0**-118
    a[5, 32:], b[40:, 7] = 0, 0  # tiny in the first run of a split K, zeros in the others
    b[:, 7] *= 2.0**-118
    a[6, :64], b[:64, 8] = 0, 0  # the other way round
    a[6] *= 2.0**-118
    b[:, 8] *= 2.0**-118
    out = gemm(gpu, a, b, torch.full((10, 20), NAN), row=row, splits=splits)
    reference = testing.gemm_reference(a, b)
    testing.assert_within_bound(out, reference, precision=row["precision"])
    lines = [(1,), (2,), (5,), (6,), *((slice(None), j) for j in (3, 7, 8))]  # computed again, by multiply-adds
    tiny, right, scale = ([x[line] for line in lines] for x in (out, reference.expected, reference.scale))
    for x, y, s in zip(tiny, right, scale, strict=True):
        assert bool(((x.double() - y).abs() <= K * 2.0**-24 * s + K * 2.0**-149).all())


def test_16_bit_special_values(gpu, generator):
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(s, generator=generator).to(dtype) for s in ((6, 40), (40, 9)))
        a[1, 3], a[2, 4], b[5, 2] = NAN, INF, -INF
        out = gemm(gpu, a, b, torch.full((6, 9), 5.0, dtype=dtype))
        testing.assert_special_values(out, a.double() @ b.double())


# --- the epilogue -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("splits", [1, 2])
@rows_where(lambda row: row["tile"] not in ((128, 128), (8, 4)))  # an epilogue is of a dtype and a kind
def test_epilogue(gpu, row, activation, splits, generator):
    """activation(C + a b + bias) + residual, and the argument of the activation; in whole vectors and with gaps."""
    dtype = dtype_of(row)
    M, N, K = 18, 44, row["depth"] + 6
    a = (torch.randn(M, K, generator=generator) * torch.linspace(0.1, 6, M).unsqueeze(1)).to(dtype)
    b = (torch.randn(K, N, generator=generator) / math.sqrt(K)).to(dtype)
    bias, residual, initial = (torch.randn(s, generator=generator).to(dtype) for s in ((N,), (M, N), (M, N)))
    for aligned in (True, False):
        out, pre, beside = (
            GuardedOutput((M, N), dtype=dtype, row_gap=4 if aligned else 5, band=64 if aligned else 67)
            for _ in range(3)
        )
        beside.view.copy_(residual)
        out.view.copy_(initial)
        gemm(gpu, a, b, out.view, row=row, splits=splits, bias=bias, residual=beside.view, pre=pre.view,
             activation=activation, accumulate=True)  # fmt: skip
        reference = testing.gemm_reference(a, b, bias, initial)
        expected = ACTIVATIONS[activation](reference.expected) + residual.double()
        bound = testing.epilogue_bound(reference, expected, residual.double(), dtype, precision=row["precision"])
        error = (out.view.double() - expected).abs()
        assert bool((error <= bound).all()), f"{(error / bound).max().item():.3f} times the bound"
        testing.assert_within_bound(pre.view, reference, precision=row["precision"])
        for guarded in (out, pre, beside):
            guarded.assert_guards_intact()


def test_bias_of_one_column(gpu):
    """N = 1 is turned into M = 1: the bias stays one number."""
    a, b = torch.ones(5, 9), torch.ones(9, 1)
    out = gemm(gpu, a, b, torch.empty(5, 1), bias=torch.tensor([3.0]))
    assert torch.equal(out, torch.full((5, 1), 12.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activation_grad(gpu, activation, dtype, generator):
    for count, offset in ((1024, 0), (1027, 0), (5, 1)):
        z = (torch.randn(count + 1, generator=generator) * 4).to(dtype)[offset : offset + count]
        dy = torch.randn(count + 1, generator=generator).to(dtype)[offset : offset + count]
        dz = torch.full((count + 1,), NAN, dtype=dtype)[offset : offset + count]
        gpu.module.activation_grad(dy, z, dz, activation)
        x = z.double().requires_grad_()
        (expected,) = torch.autograd.grad(ACTIVATIONS[activation](x), x, dy.double())
        unit = testing.UNIT_ROUNDOFF[dtype]
        error = (dz.double() - expected).abs()
        bound = 3e-6 * dy.double().abs() + unit * expected.abs() + (2.0**-24 if dtype == torch.float16 else 0)
        assert bool((error <= bound).all()), f"{(error / bound).max().item():.3f} times the bound"
    special = torch.tensor([NAN, INF, 0.0], dtype=dtype)
    dz = torch.empty(3, dtype=dtype)
    gpu.module.activation_grad(torch.ones(3, dtype=dtype), special, dz, "relu")
    assert torch.equal(dz, torch.tensor([1.0, 1.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sum_rows(gpu, layout, dtype, generator):
    for shape in ((1, 1), (33, 17), (2, 5, 40), (1200, 3)):
        x = LAYOUTS[layout](integer_matrix(shape, 2000, generator, dtype))
        out = GuardedOutput((1, shape[-1]), dtype=dtype)
        gpu.module.sum_rows(x, out.view[0])
        assert torch.equal(out.view[0], x.double().flatten(0, -2).sum(0).to(dtype)), shape
        out.assert_guards_intact()
    empty = torch.full((3,), NAN, dtype=dtype)
    gpu.module.sum_rows(torch.empty(0, 3, dtype=dtype), empty)
    assert torch.equal(empty, torch.zeros(3, dtype=dtype))
