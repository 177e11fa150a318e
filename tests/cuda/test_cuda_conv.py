"""CUDA convolution: index arithmetic and plans anywhere; kernel rows, layouts and tails on the twin or a GPU."""

import itertools
import math
import random

import pytest
import torch

import fastdl
from conv_reference import CONV, LAYOUTS, Conv, lay
from fastdl.functional import conv2d, conv_transpose2d
from fastdl.ops import cuda
from fastdl.testing import GemmReference, epilogue_bound, gemm_bound

MODULE = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
pytestmark = pytest.mark.skipif(MODULE is None, reason="neither the CUDA kernels nor their host twin are built")
ROWS = MODULE.kernels("conv") if MODULE else []
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "dgrad", "wgrad")


def rows(*kinds, every=False):
    """Of these kinds. Rows that cut float32 short are the code of the others: their own sums are in test_bounds."""
    short = () if every else ("tf32", "bf16")
    return [pytest.param(r, id=r["name"]) for r in ROWS if r["kind"] in kinds and r["precision"] not in short]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are small: a team of threads costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan(c, pass_, *, module=MODULE, last=True, kernel="", precision="ieee", gpu="sm80"):
    dtype = str(c.dtype).removeprefix("torch.")
    sizes = (tuple(c.x.shape), tuple(c.w.shape), tuple(c.dy.shape))
    options = {"dtype": dtype, "channels_last": last, "precision": precision, "gpu": gpu, "kernel": kernel}
    return module.conv_plan(pass_, *sizes, **c.options, **options)


def run(gpu, c, pass_, layout="channels_last", *, out_layout=None, kernel="", precision="ieee", bias=True, **epilogue):
    """forward or dgrad into NaN."""
    read, b, shape = c.operands(pass_)
    to = out_layout or layout
    p = plan(c, pass_, module=gpu.module, last=to == "channels_last", kernel=kernel, precision=precision, gpu="")
    out = lay(torch.full(shape, math.nan, dtype=c.dtype), to).to(gpu.device)
    function = gpu.module.conv if pass_ == "forward" else gpu.module.conv_dgrad
    operands = [lay(t, layout).to(gpu.device) for t in (read, c.w)]
    workspace = torch.full((p["workspace_bytes"],), 255, dtype=torch.uint8, device=gpu.device)
    options = {"precision": precision, "workspace": workspace, "kernel": kernel, **epilogue}
    function(out, *operands, b.to(gpu.device) if bias else None, **c.options, **options)
    return out.cpu()


def run_wgrad(gpu, c, layout="channels_last", *, kernel="", precision="ieee"):
    """(dw, dbias), into NaN."""
    p = plan(c, "wgrad", module=gpu.module, kernel=kernel, precision=precision, gpu="")
    dw = lay(torch.full(c.w.shape, math.nan, dtype=c.dtype), layout).to(gpu.device)
    db = torch.full((c.K,), math.nan, dtype=c.dtype, device=gpu.device)
    workspace = torch.full((p["workspace_bytes"],), 255, dtype=torch.uint8, device=gpu.device)
    options = {"precision": precision, "workspace": workspace, "kernel": kernel}
    dy, x = (lay(t, layout).to(gpu.device) for t in (c.dy, c.x))
    gpu.module.conv_wgrad(dw, dy, x, **c.options, dbias=db, **options)
    return dw.cpu(), db.cpu()


def wgrad_reference(c, absolute=False):
    x, dy = (t.double().abs() if absolute else t.double() for t in (c.x, c.dy))
    w = torch.zeros(c.w.shape, dtype=torch.float64, requires_grad=True)
    y = CONV[len(c.size)](x, w, None, c.stride, c.padding, c.dilation, c.groups)
    return torch.autograd.grad(y, w, dy)[0], dy.sum([0, *range(2, dy.ndim)])


def check_exact(gpu, c, layout, kernel="", passes=PASSES):
    """Integers, whose sums are exact in float32 in any order, and round once."""
    for pass_ in passes:
        if pass_ == "wgrad":
            dw, db = run_wgrad(gpu, c, layout, kernel=kernel)
            expected, sums = wgrad_reference(c)
            assert torch.equal(dw, expected.to(c.dtype)), f"wgrad {layout} {kernel}"
            assert torch.equal(db, sums.to(c.dtype)), f"dbias {layout} {kernel}"
        else:
            out = run(gpu, c, pass_, layout, kernel=kernel)
            assert torch.equal(out, c.reference(pass_).to(c.dtype)), f"{pass_} {layout} {kernel}"


# --- index arithmetic, on any machine --------------------------------------------------------------------------------
def test_division_by_multiplication():
    numbers = [0, 1, 2, 3, 5, 7, 31, 32, 33, 2**16 - 1, 2**16, 2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1]
    divisors = {1, 2, 3, 5, 6, 7, 9, 11, 641, 2**16 + 1, 6700417, 2**30 + 1, 2**31 - 1}
    divisors |= {2**k + d for k in range(2, 31) for d in (-1, 0, 1)}
    r = random.Random(1)
    divisors |= {r.randrange(1, 2**31) for _ in range(200)} | {r.randrange(1, 4096) for _ in range(200)}
    for d in divisors:
        # A quotient that is too large shows just below a multiple, one too small on it; most of all at the end.
        last = (2**31 - 1) // d * d
        near = [q * d + e for q in (1, 2, 3, r.randrange(1, 2**31) // d) for e in (-1, 0, 1)] + [last - 1, last]
        for n in numbers + near + [r.randrange(2**31) for _ in range(20)]:
            if 0 <= n < 2**31:
                assert MODULE.divide_fast(n, d) == n // d, (n, d)


def by_hand(c, pass_):
    """{written position: {(tap, channel, position read)}}: what the definition of a pass sums over."""
    kernel, taps = c.w.shape[2:], list(itertools.product(*map(range, c.w.shape[2:])))
    read, written = (c.x, c.dy) if pass_ != "dgrad" else (c.dy, c.x)
    found = {}

    def number(at, sizes):
        return sum(a * math.prod(sizes[i + 1 :]) for i, a in enumerate(at))

    for n in range(c.N):
        for o in itertools.product(*map(range, c.dy.shape[2:])):
            for t in taps:
                at = tuple(o[i] * c.stride[i] - c.padding[i] + t[i] * c.dilation[i] for i in range(len(o)))
                if all(0 <= a < s for a, s in zip(at, c.x.shape[2:], strict=True)):
                    to, source = (at, o) if pass_ == "dgrad" else (o, at)
                    pair = number(t, kernel), number((n, *source), (c.N, *read.shape[2:]))
                    found.setdefault(number((n, *to), (c.N, *written.shape[2:])), set()).add(pair)
    return found


@pytest.mark.parametrize("pass_", PASSES)
def test_every_pixel_meets_its_taps_once(pass_):
    r = random.Random(7)
    for _ in range(40):
        n = r.choice((1, 2, 2, 3))
        kernel = tuple(r.randint(1, 4) for _ in range(n))
        dilation = tuple(r.randint(1, 3) for _ in range(n))
        padding = tuple(r.randint(0, 3) for _ in range(n))
        least = (d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True))
        size = tuple(max(1, x) + r.randint(0, 5) for x in least)
        stride = tuple(r.randint(1, 4 if n < 3 else 2) for _ in range(n))
        C, K = r.randint(1, 2), r.randint(1, 2)
        c = Conv(r.randint(1, 2), C, K, size, kernel, stride, padding, dilation)
        sizes = (tuple(c.x.shape), tuple(c.w.shape), tuple(c.dy.shape))
        channels, expected = K if pass_ == "dgrad" else C, by_hand(c, pass_)
        positions = c.N * math.prod(c.dy.shape[2:] if pass_ == "dgrad" else c.x.shape[2:])
        seen = set()
        for written, reads in MODULE.conv_coordinates(pass_, *sizes, **c.options):
            assert written not in seen
            seen.add(written)
            assert len({(tap, channel) for tap, channel, _ in reads}) == len(reads)
            for channel in range(channels):
                pairs = {(tap, at - channel * positions) for tap, k, at in reads if at >= 0 and k == channel}
                assert pairs == expected.get(written, set())
        assert len(seen) == c.N * math.prod(c.x.shape[2:] if pass_ == "dgrad" else c.dy.shape[2:])


@pytest.mark.parametrize("row", rows("tile"))
def test_each_tile_once(row):
    tile_m, tile_n, _ = row["tile"]
    c = Conv(3, 10, 2 * tile_n + 1, (23, 29), (3, 3), (2, 3), (1, 1), dtype=DTYPES[row["dtype"]])
    for pass_, columns, phases in (("forward", c.K, [(12, 10)]), ("dgrad", c.C, [(12, 10), (12, 10), (12, 9)] * 2)):
        sizes = (tuple(c.x.shape), tuple(c.w.shape), tuple(c.dy.shape))
        tiles = MODULE.conv_tiles(pass_, *sizes, **c.options, dtype=row["dtype"], kernel=row["name"])
        if pass_ == "dgrad":
            phases = [(h, w) for h in (12, 11) for w in (10, 10, 9)]
        expected = [
            (i, m, n)
            for i, (h, w) in enumerate(phases)
            for m in range(-(-c.N * h * w // tile_m))
            for n in range(-(-columns // tile_n))
        ]
        assert sorted(tiles) == sorted(expected)


# --- plans, of any GPU -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
def test_plans(gpu):
    def kernel(c, pass_="forward", **more):
        return plan(c, pass_, gpu=gpu, **more)["kernel"]

    dense = Conv(8, 64, 128, (56, 56), (3, 3), padding=(1, 1), dtype=torch.bfloat16, high=1)
    assert kernel(dense) == "conv_bf16_128x128_sm80"
    assert kernel(dense, "wgrad").startswith("conv_wgrad_bf16_")
    small = Conv(1, 64, 64, (7, 7), (3, 3), padding=(1, 1), dtype=torch.bfloat16)
    p = plan(small, "forward", gpu=gpu)
    assert p["kernel"] == "conv_bf16_64x64_sm80" and p["chunks"] > 1
    assert p["pack_bytes"] == 64 * 64 * 9 * 2 and p["partial_bytes"] >= p["chunks"] * 49 * 64 * 4
    assert p["workspace_bytes"] == p["pack_bytes"] + p["partial_bytes"]
    depthwise = Conv(2, 32, 32, (9, 9), (3, 3), groups=32, dtype=torch.float16)
    assert {kernel(depthwise, pass_) for pass_ in PASSES} == {"conv_depthwise_f16_sm80"}
    grouped = Conv(2, 32, 32, (9, 9), (3, 3), groups=8)
    assert kernel(grouped) == "conv_direct_f32_sm80"
    assert kernel(dense, precision="tf32") == "conv_bf16_128x128_sm80"
    f32 = Conv(1, 16, 16, (5, 5), (1, 1))
    assert kernel(Conv(8, 16, 64, (56, 56), (3, 3), padding=(1, 1))) == "conv_f32_128x64_sm80"
    names = {p: kernel(f32, precision=p) for p in ("fma", "ieee", "tf32", "bf16")}
    assert names["fma"] == "conv_direct_f32_sm80" and names["ieee"] == "conv_f32_64x64_sm80"
    assert names["tf32"] == "conv_f32_128x64_tf32_sm80" and names["bf16"] == "conv_f32_128x64_bf16_sm80"
    with pytest.raises(RuntimeError, match="cannot run this: less exact than asked"):
        kernel(f32, kernel="conv_f32_128x64_tf32_sm80")
    with pytest.raises(RuntimeError, match="cannot run this: another pass"):
        kernel(f32, "wgrad", kernel="conv_f32_128x64_sm80")


def test_plans_of_huge_positions_are_direct():
    options = {"padding": [2**40], "stride": [1], "dilation": [2**41]}
    p = MODULE.conv_plan("forward", (1, 2, 1), (3, 2, 2), (1, 3, 1), **options, gpu="sm80")
    assert p["kernel"] == "conv_direct_f32_sm80" and "2^29" in p["why"]
    # Nothing moves along a dimension of one output: its stride has no say.
    options = {"padding": [0], "stride": [2**40], "dilation": [1]}
    p = MODULE.conv_plan("forward", (1, 2, 3), (3, 2, 3), (1, 3, 1), **options, gpu="sm80")
    assert p["kernel"] == "conv_f32_64x64_sm80"
    options = {"padding": [0, 0], "stride": [5, 5], "dilation": [1, 1]}
    p = MODULE.conv_plan("dgrad", (1, 2, 9, 9), (3, 2, 1, 1), (1, 3, 2, 2), **options, gpu="sm80")
    assert p["kernel"] == "conv_direct_f32_sm80" and "16 phases" in p["why"]


# --- every row, exactly ----------------------------------------------------------------------------------------------
SHAPES = [  # N, C, K, size, kernel, stride, padding, dilation, groups
    (2, 8, 24, (5, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 5, 7, (19,), (3,), (2,), (2,), (3,), 1),
    (2, 16, 10, (4, 5, 6), (2, 3, 2), (2, 1, 3), (1, 1, 1), (1, 2, 1), 1),
    (1, 16, 8, (7, 9), (3, 2), (2, 3), (1, 0), (1, 1), 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", rows("tile", "wgrad", "direct"))
def test_exact(gpu, row, layout):
    passes = {"tile": ("forward", "dgrad"), "wgrad": ("wgrad",), "direct": PASSES}[row["kind"]]
    for N, C, K, size, kernel, stride, padding, dilation, groups in SHAPES:
        c = Conv(N, C, K, size, kernel, stride, padding, dilation, groups, DTYPES[row["dtype"]])
        check_exact(gpu, c, layout, row["name"], passes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", rows("depthwise"))
def test_exact_depthwise(gpu, row, layout):
    dtype = DTYPES[row["dtype"]]
    for C in (3, 16, 72):
        for size, kernel, stride, padding, dilation in (
            ((6, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
            ((5, 11), (2, 5), (2, 3), (1, 2), (2, 1)),
            ((17,), (4,), (2,), (3,), (1,)),
        ):
            c = Conv(2, C, C, size, kernel, stride, padding, dilation, C, dtype)
            check_exact(gpu, c, layout, row["name"])


@pytest.mark.parametrize("row", rows("tile"))
def test_tails_of_tiles(gpu, row):
    """Pixels, channels and depth around the sizes of tiles and steps."""
    tile_m, tile_n, tile_k = row["tile"]
    dtype = DTYPES[row["dtype"]]
    for pixels, K, C in (
        (tile_m - 1, tile_n, tile_k),
        (tile_m, tile_n + 1, tile_k - 1),
        (tile_m + 1, tile_n - 1, tile_k + 1),
        (5, 1, 5 * tile_k + 8),
    ):
        c = Conv(1, C, K, (pixels,), (1,), dtype=dtype, high=2)
        check_exact(gpu, c, "channels_last", row["name"], ("forward",))
    c = Conv(1, 3, tile_n + 1, (pixels,), (1,), dtype=dtype)
    check_exact(gpu, c, "contiguous", row["name"], ("forward",))


@pytest.mark.parametrize("row", rows("wgrad"))
def test_tails_of_wgrad_tiles(gpu, row):
    tile_m, tile_n, tile_k = row["tile"]
    for pixels, K, C in ((tile_k - 1, tile_m + 1, tile_n - 1), (2 * tile_k + 1, tile_m - 1, tile_n + 1)):
        c = Conv(1, C, K, (pixels,), (1,), dtype=DTYPES[row["dtype"]])
        check_exact(gpu, c, "contiguous", row["name"], ("wgrad",))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sums_in_chunks(gpu, dtype):
    """A few tiles with a long sum: their partial sums are added in order."""
    c = Conv(1, 96, 9, (5, 5), (3, 3), padding=(1, 1), dtype=dtype, high=1)
    p = plan(c, "forward", module=gpu.module, gpu="sm80")
    assert p["chunks"] > 1
    check_exact(gpu, c, "channels_last")
    check_exact(gpu, c, "contiguous", passes=("forward",))
    c = Conv(2, 8, 8, (40, 40), (1, 1), dtype=dtype, high=1)
    assert plan(c, "wgrad", module=gpu.module, gpu="sm80")["chunks"] > 1
    check_exact(gpu, c, "channels_last", passes=("wgrad",))


# --- accuracy --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", rows("tile", "wgrad", "direct", every=True))
def test_bounds(gpu, row):
    c = Conv(1, 40, 20, (6, 7), (3, 3), padding=(1, 1), dtype=DTYPES[row["dtype"]], high=0)
    precision = row["precision"]
    depth = {"forward": 40 * 9 + 1, "dgrad": 20 * 9 + 1, "wgrad": 42}
    passes = {"tile": ("forward", "dgrad"), "wgrad": ("wgrad",), "direct": PASSES}[row["kind"]]
    for pass_ in passes:
        asked = "ieee" if precision == "fma" else precision
        if pass_ == "wgrad":
            actual = run_wgrad(gpu, c, kernel=row["name"], precision=asked)[0]
            expected, scale = wgrad_reference(c)[0], wgrad_reference(c, absolute=True)[0]
        else:
            actual = run(gpu, c, pass_, kernel=row["name"], precision=asked)
            expected, scale = c.reference(pass_), c.reference(pass_, absolute=True)
        # Tensor cores cut off what they add, instead of rounding: twice the unit.
        h = depth[pass_] * (1 if row["kind"] == "direct" else 2)
        bound = gemm_bound(h, scale, expected, c.dtype, precision=precision)
        excess = (actual.double() - expected).abs() - bound
        assert excess.max() <= 0, (pass_, excess.max())


def test_float32_is_better_than_its_parts(gpu):
    """The rows of one, two and three parts differ as much as they say: none of them runs another's products."""
    c = Conv(1, 64, 64, (5, 5), (3, 3), padding=(1, 1), high=0)
    expected, scale = c.reference("forward"), c.reference("forward", absolute=True)
    errors = {
        p: ((run(gpu, c, "forward", precision=p).double() - expected) / scale).abs().max().item()
        for p in ("ieee", "tf32", "bf16")
    }
    assert errors["ieee"] < 2.0**-23 < 2.0**-20 < errors["tf32"] < 2.0**-15 and 2.0**-13 < errors["bf16"] < 2.0**-7


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("row", ["conv_f32_128x64_sm80", "conv_bf16_64x64_sm80", "conv_direct_f32_sm80", "depthwise"])
def test_epilogue(gpu, activation, row):
    dtype = torch.bfloat16 if "bf16" in row else torch.float32
    groups, name = (16, "") if row == "depthwise" else (1, row)
    c = Conv(2, 16, 16, (4, 5), (3, 3), padding=(1, 1), groups=groups, dtype=dtype, high=0)
    for pass_, layout in (("forward", "channels_last"), ("dgrad", "contiguous")):
        shape = c.operands(pass_)[2]
        residual = lay(torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype), layout)
        pre = lay(torch.full(shape, math.nan, dtype=dtype), layout).to(gpu.device)
        extra = {"activation": activation, "residual": residual.to(gpu.device), "pre": pre}
        out = run(gpu, c, pass_, layout, kernel=name, **extra)
        z = c.reference(pass_)
        function = {"gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}.get(
            activation, getattr(torch.nn.functional, activation, None)
        )
        expected = function(z) + residual.double()
        reference = GemmReference(z, c.reference(pass_, absolute=True), 2 * 16 * 9 + 1)
        bound = epilogue_bound(reference, expected, residual.double(), dtype, precision="ieee")
        assert ((out.double() - expected).abs() - bound).max() <= 0
        zs = gemm_bound(reference.depth, reference.scale, z, dtype, precision="ieee")
        assert ((pre.cpu().double() - z).abs() - zs).max() <= 0


def test_special_values(gpu):
    """NaN and Inf come out where the reference has them: of split sums too, whose parts of Inf are NaN."""
    for precision, kernel in (("ieee", ""), ("tf32", ""), ("ieee", "conv_direct_f32_sm80")):
        c = Conv(1, 8, 16, (6, 6), (3, 3), padding=(1, 1), high=0)
        c.x[0, 2, 1, 1], c.x[0, 3, 4, 4], c.x[0, 1, 3, 3] = math.inf, -math.inf, math.nan
        c.x[0, 5, 0, 5] = 3.4e38  # its first part rounds to Inf
        c.w[3] = c.w[3].abs()
        c.dy[0, 2, 2, 3], c.dy[0, 4, 5, 5] = math.inf, math.nan
        out = run(gpu, c, "forward", kernel=kernel, precision=precision)
        expected = c.reference("forward").to(c.dtype)
        assert_special(out, expected)
        expected = wgrad_reference(c)
        c.dy[0, 2, 2, 3] = 1e38
        if not kernel:
            assert_special(run_wgrad(gpu, c, precision=precision)[0], wgrad_reference(c)[0].to(c.dtype))


def assert_special(actual, expected):
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(actual), test(expected))
    assert torch.isinf(expected).any() and torch.isnan(expected).any()


def test_tiny_values(gpu):
    """Operands so small that parts of them are no bfloat16: computed again, to float32's own bound."""
    c = Conv(1, 40, 20, (5, 5), (3, 3), padding=(1, 1), high=0)
    c.x[:, :, 2:] *= 2.0**-120
    c.w[4:9] *= 2.0**-105
    c.dy[:, 3] *= 2.0**-118
    for chunks, run_pass in ((1, "forward"), (1, "dgrad")):
        actual = run(gpu, c, run_pass, kernel="conv_f32_64x64_sm80", bias=False)
        b = c.bias if run_pass == "forward" else c.bias_in
        b.zero_()
        expected, scale = c.reference(run_pass), c.reference(run_pass, absolute=True)
        assert ((actual.double() - expected).abs() <= (2 * 361 * 2.0**-24) * scale + 361 * 2.0**-149).all(), chunks
    dw, _ = run_wgrad(gpu, c)
    expected, scale = wgrad_reference(c)[0], wgrad_reference(c, absolute=True)[0]
    assert ((dw.double() - expected).abs() <= (2 * 26 * 2.0**-24) * scale + 26 * 2.0**-149).all()


# --- memory ----------------------------------------------------------------------------------------------------------
def test_any_strides(gpu):
    """Operands with gaps, at odd addresses, transposed, expanded; results in either layout."""
    for dtype, out_layout in itertools.product((torch.bfloat16, torch.float32), LAYOUTS):
        c = Conv(2, 16, 8, (6, 5), (3, 3), padding=(1, 1), dtype=dtype)
        wide = torch.zeros(2, 6, 7, 40, dtype=dtype)
        for x in (
            wide[:, :, 1:6, 8:24].permute(0, 3, 1, 2),  # aligned chunks, gaps between
            wide[:, :, 1:6, 7:23].permute(0, 3, 1, 2),  # channels side by side at odd addresses
            torch.zeros(5, 6, 16, 2, dtype=dtype).permute(3, 2, 1, 0),
        ):
            x.copy_(c.x)
            p = plan(c, "forward", module=gpu.module, last=out_layout == "channels_last", gpu="")
            out = lay(torch.full(c.dy.shape, math.nan, dtype=dtype), out_layout).to(gpu.device)
            x = x.to(gpu.device) if gpu.is_twin else x.to(gpu.device)[:]
            workspace = torch.empty(p["workspace_bytes"], dtype=torch.uint8, device=gpu.device)
            w = c.w.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2).to(gpu.device)
            gpu.module.conv(out, x, w, c.bias.to(gpu.device), **c.options, workspace=workspace)
            assert torch.equal(out.cpu(), c.reference("forward").to(dtype))
    c.x = c.x[:, :1].expand(-1, 16, -1, -1)
    workspace = torch.empty(plan(c, "wgrad", module=gpu.module, gpu="")["workspace_bytes"], dtype=torch.uint8)
    dw = torch.full(c.w.shape, math.nan, device=gpu.device)
    x = c.x[:, :1].to(gpu.device).expand(-1, 16, -1, -1)
    gpu.module.conv_wgrad(dw, c.dy.to(gpu.device), x, **c.options, workspace=workspace.to(gpu.device))
    assert torch.equal(dw.cpu(), wgrad_reference(c)[0].to(dtype))


def test_neighbours_stay_untouched(gpu):
    """Results among others: what lies between them is not written."""
    c = Conv(1, 8, 6, (5, 5), (3, 3), padding=(1, 1), dtype=torch.bfloat16)
    for inner in (True, False):
        big = torch.full((3, 5, 5, 11) if inner else (3, 6, 5, 9), 7.0, dtype=c.dtype, device=gpu.device)
        out = big[1:2, :, :, 2:8].permute(0, 3, 1, 2) if inner else big[1:2, :, :, 3:8]
        p = plan(c, "forward", module=gpu.module, last=inner, gpu="")
        workspace = torch.empty(p["workspace_bytes"], dtype=torch.uint8, device=gpu.device)
        x, w, b = (t.to(gpu.device) for t in (c.x, c.w, c.bias))
        gpu.module.conv(out, x, w, b, **c.options, workspace=workspace)
        assert torch.equal(out.cpu(), c.reference("forward").to(c.dtype))
        assert (big == 7.0).sum() >= big.numel() - out.numel()
        out.fill_(7.0)
        assert (big == 7.0).all()


@pytest.mark.parametrize("case", ["tile", "one step", "wgrad", "element", "depthwise", "direct"])
def test_the_order_of_threads_has_no_say(gpu, case):
    groups = {"depthwise": 16, "direct": 8}.get(case, 1)
    dtype = torch.float32 if case == "element" else torch.bfloat16
    k = 1 if case == "one step" else 3
    c = Conv(1, 16, 16, (9, 9), (k, k), padding=(k // 2, k // 2), groups=groups, dtype=dtype, high=0)
    layout = "contiguous" if case == "element" else "channels_last"
    results = []
    for _ in gpu.orders():
        if case == "wgrad":
            results.append(torch.cat([t.flatten() for t in run_wgrad(gpu, c, layout)]))
        else:
            results.append(run(gpu, c, "forward", layout))
    assert all(torch.equal(results[0], r) for r in results[1:])


# --- sizes that are not there, and what is refused -------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 0, 0)], ids=str)
def test_empty(gpu, sizes):
    N, C, K = sizes
    c = Conv(N, C, K, (5, 4), (3, 3), padding=(1, 1))
    assert torch.equal(run(gpu, c, "forward"), c.reference("forward").float())
    assert torch.equal(run(gpu, c, "dgrad"), c.reference("dgrad").float())
    dw, db = run_wgrad(gpu, c)
    assert torch.equal(dw, torch.zeros_like(c.w)) or N
    assert torch.equal(db, c.dy.sum([0, 2, 3]))


def test_hostile_positions(gpu):
    """Dilation and padding beyond 32 bits: nothing wraps around."""
    x, w = torch.tensor([[[2.0, 3.0, 5.0]]]), torch.tensor([[[7.0, 11.0]]])
    out = torch.full((1, 1, 3), math.nan, device=gpu.device)
    options = {"stride": [1], "padding": [0], "dilation": [2**40]}
    gpu.module.conv(out, x.to(gpu.device), w.to(gpu.device), **options)
    assert out.flatten().tolist() == [14, 21, 35]
    options = {"stride": [1], "padding": [2**40], "dilation": [2**40]}
    gpu.module.conv(out, x.to(gpu.device), w.to(gpu.device), **options)
    assert out.flatten().tolist() == [22, 33, 55]
    options = {"stride": [1], "padding": [0], "dilation": [2**62]}
    with pytest.raises(RuntimeError, match="argument 'dilation': expected a kernel of less than 2\\^60 positions"):
        gpu.module.conv(out, x.to(gpu.device), w.to(gpu.device), **options)


def test_refusals(gpu):
    c = Conv(1, 4, 4, (5, 5), (3, 3))
    x, w, y = (t.to(gpu.device) for t in (c.x, c.w, c.dy))
    with pytest.raises(RuntimeError, match=r"argument 'workspace': expected \d+ bytes, got None"):
        gpu.module.conv(y, x, w, **c.options)
    with pytest.raises(RuntimeError, match=r"argument 'workspace': expected \d+ bytes.*got 3"):
        gpu.module.conv(y, x, w, **c.options, workspace=torch.empty(3, dtype=torch.uint8, device=gpu.device))
    with pytest.raises(RuntimeError, match="argument 'kernel': expected one of conv_bf16_128x128_sm80"):
        gpu.module.conv(y, x, w, **c.options, kernel="nonsense")
    with pytest.raises(RuntimeError, match="'precision': expected fma, ieee, tf32 or bf16, got 'half'"):
        gpu.module.conv(y, x, w, **c.options, precision="half")
    with pytest.raises(RuntimeError, match=r"argument 'weight': expected .*float32"):
        gpu.module.conv(y, x, w.half(), **c.options)
    with pytest.raises(RuntimeError, match="overlap with 'input'"):
        gpu.module.conv(x[:, :, :3, :3], x, w, **c.options)
    with pytest.raises(TypeError, match="argument 'input'"):
        gpu.module.conv(y, 3, w, **c.options)


# --- from Python -----------------------------------------------------------------------------------------------------
def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


@pytest.fixture
def exact_float32():
    """torch gives cuDNN leave to use tf32 unless it is told otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_functions_and_their_gradients(gpu, layout, transposed, generator, exact_float32):
    x = lay(torch.randn(2, 6, 7, 8, generator=generator), layout).to(gpu.device)
    w = torch.randn(6, 3, 3, 3, generator=generator) if transposed else torch.randn(4, 3, 3, 3, generator=generator)
    b = torch.randn(6 if transposed else 4, generator=generator)
    options = {"stride": 2, "padding": 1, "groups": 2}
    fast, slow = (conv_transpose2d, torch.conv_transpose2d) if transposed else (conv2d, torch.conv2d)
    tensors = [x, w.to(gpu.device), b.to(gpu.device)]
    ours = gradients(lambda *t: fast(*t, **options), tensors)
    theirs = gradients(lambda *t: slow(*t, **options), [t.double().cpu() for t in tensors])
    for a, e in zip(ours, theirs, strict=True):
        assert torch.allclose(a.cpu().double(), e, rtol=1e-5, atol=1e-5)


def test_activation_and_residual_differentiate(gpu, generator, exact_float32):
    shapes = ((1, 8, 5, 6), (8, 8, 3, 3), (8,), (1, 8, 5, 6))
    tensors = [torch.randn(*shape, generator=generator).to(gpu.device) for shape in shapes]

    def theirs(x, w, b, r):
        return torch.nn.functional.gelu(torch.conv2d(x, w, b, padding=1)) + r

    ours = gradients(lambda x, w, b, r: conv2d(x, w, b, padding=1, activation="gelu", residual=r), tensors)
    for a, e in zip(ours, gradients(theirs, [t.double().cpu() for t in tensors]), strict=True):
        assert torch.allclose(a.cpu().double(), e, rtol=1e-5, atol=1e-5)


def test_precision_follows_torch(gpu, exact_float32):
    x, w = torch.randn(1, 4, 5, 5, device=gpu.device), torch.randn(3, 4, 3, 3, device=gpu.device)
    exact = conv2d(x, w)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    short = conv2d(x, w)
    expected = torch.nn.functional.conv2d(x.double(), w.double())
    errors = [(y.double() - expected).abs().max().item() for y in (exact, short)]
    assert errors[0] < errors[1] / 8 < 1e-4


def test_modules(gpu, generator, exact_float32):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding="same"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=8, stride=2),
        torch.nn.ConvTranspose2d(8, 2, 2, stride=2),
    ).to(gpu.device)
    x = torch.randn(1, 3, 9, 9, generator=generator).to(gpu.device)
    expected = model(x).detach()
    fastdl.optimize(model)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
