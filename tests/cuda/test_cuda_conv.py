"""CUDA convolution: every row of the table, layouts and tails, on the twin or a GPU, against float64."""

import itertools
import math

import pytest
import torch

from conv_on_gpu import DTYPES, PASSES, check_exact, needs_module, plan, rows, run, run_wgrad, wgrad_reference
from conv_reference import LAYOUTS, Conv, lay
from fastdl.testing import GemmReference, epilogue_bound, gemm_bound

pytestmark = needs_module


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The references are small: a team of threads costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- every row, exactly ----------------------------------------------------------------------------------------------
SHAPES = [  # N, C, K, size, kernel, stride, padding, dilation, groups
    (2, 8, 24, (5, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 5, 7, (19,), (3,), (2,), (2,), (3,), 1),
    (2, 16, 10, (4, 5, 6), (2, 3, 2), (2, 1, 3), (1, 1, 1), (1, 2, 1), 1),
    (1, 16, 8, (7, 9), (3, 2), (2, 3), (1, 0), (1, 1), 2),
    (1, 12, 24, (3, 5), (3, 3), (1, 2), (1, 1), (1, 1), 6),  # groups that are multiplied together, 2 to 4 channels
    (1, 5, 15, (9,), (3,), (1,), (1,), (1,), 5),  # 1 to 3
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", rows("tile", "wgrad", "direct"))
def test_exact(gpu, row, layout):
    passes = {"tile": ("forward", "dgrad"), "wgrad": ("wgrad",), "direct": PASSES}[row["kind"]]
    for N, C, K, size, kernel, stride, padding, dilation, groups in SHAPES:
        c = Conv(N, C, K, size, kernel, stride, padding, dilation, groups, DTYPES[row["dtype"]])
        check_exact(gpu, c, layout, row["name"], passes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_merged_groups_in_several_tiles(gpu, dtype):
    """More groups than are one, and more columns of a group, or taps and channels, than a tile has."""
    for N, C, K, size, kernel, groups, merged in (
        (1, 32, 160, (4, 5), (3, 3), 16, (4, 16, 4)),
        (2, 36, 72, (4,), (3,), 18, (9, 18, 9)),
    ):
        c = Conv(N, C, K, size, kernel, padding=(1,) * len(size), groups=groups, dtype=dtype, high=2)
        assert tuple(plan(c, pass_, module=gpu.module)["merged"] for pass_ in PASSES) == merged
        for layout in LAYOUTS:
            check_exact(gpu, c, layout)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_special_values_stay_in_their_group(gpu, dtype):
    """Groups that are multiplied together: zeros times another's Inf and NaN must not show."""
    c = Conv(1, 64, 64, (5, 5), (3, 3), padding=(1, 1), groups=16, dtype=dtype, high=0)
    assert {plan(c, pass_, module=gpu.module)["merged"] for pass_ in PASSES} == {16}
    c.x[0, 2, 1, 1], c.x[0, 22, 3, 3], c.x[0, 41, 2, 4] = math.inf, -math.inf, math.nan
    c.dy[0, 2, 1, 1], c.dy[0, 22, 3, 3], c.dy[0, 41, 2, 4] = math.inf, -math.inf, math.nan
    c.w[9:11] = c.w[9:11].abs()
    for pass_ in ("forward", "dgrad"):
        out = run(gpu, c, pass_)
        assert_special(out, c.reference(pass_).to(dtype))
        finite = torch.isfinite(out)
        assert finite.reshape(16, -1).all(1).sum() == 13  # whole groups without any
    assert_special(run_wgrad(gpu, c)[0], wgrad_reference(c)[0].to(dtype))


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


ORDERS = {  # dtype, layout, channels, groups, kernel
    "tile": (torch.bfloat16, "channels_last", 16, 1, 3),
    "one step": (torch.bfloat16, "channels_last", 16, 1, 1),
    "wgrad": (torch.bfloat16, "channels_last", 16, 1, 3),
    "element": (torch.float32, "contiguous", 16, 1, 3),
    "element wgrad": (torch.float32, "contiguous", 16, 1, 3),
    "held": (torch.bfloat16, "contiguous", 16, 1, 3),
    "held wgrad": (torch.bfloat16, "channels_last", 11, 1, 3),
    "groups": (torch.bfloat16, "channels_last", 16, 8, 3),
    "depthwise": (torch.bfloat16, "channels_last", 16, 16, 3),
    "depthwise wgrad": (torch.bfloat16, "channels_last", 16, 16, 3),
    "direct": (torch.float32, "channels_last", 16, 8, 3),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("case", ORDERS)
def test_each_way_once(gpu, case):
    """What the sanitizers run: every pass by every way of loading, tails in each dimension."""
    dtype, layout, C, groups, k = ORDERS[case]
    c = Conv(1, C, 16 if groups > 1 else 9, (4, 3), (k, k), padding=(k // 2, k // 2), groups=groups, dtype=dtype)
    check_exact(gpu, c, layout, passes=("wgrad",) if "wgrad" in case else ("forward", "dgrad"))


@pytest.mark.parametrize("case", ORDERS)
def test_the_order_of_threads_has_no_say(gpu, case):
    dtype, layout, C, groups, k = ORDERS[case]
    c = Conv(
        1, C, 16 if groups > 1 else 24, (9, 9), (k, k), padding=(k // 2, k // 2), groups=groups, dtype=dtype, high=0
    )
    results = []
    for _ in gpu.orders():
        if "wgrad" in case:
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
