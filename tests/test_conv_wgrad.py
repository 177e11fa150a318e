"""The weight and bias gradients of dense convolutions against float64, for every row of the table that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdl import _C
from fastdl.testing import GemmReference, assert_within_bound, error_measures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEVELS = ["scalar", "avx2", "avx512", "avx512bf16", "amx"]
ROWS = [
    pytest.param(row, id=row["name"], marks=[] if row["available"] else pytest.mark.skip(reason=row["reason"]))
    for row in _C.kernels("conv")
    if row["kind"] == "wgrad"
]


class Case:
    """x [N, g*C, *in], dy [N, g*K, *out]; `extra` columns of x that no kernel reaches."""

    def __init__(self, N=1, C=1, K=1, out=(8,), kernel=None, stride=1, padding=0, dilation=1, groups=1, extra=0):
        n = len(out)
        kernel = kernel or (1,) * n
        self.N, self.C, self.K, self.groups, self.out, self.kernel = N, C, K, groups, out, kernel
        self.stride, self.padding, self.dilation = (
            list(a) if isinstance(a, tuple) else [a] * n for a in (stride, padding, dilation)
        )
        sizes = zip(out, kernel, self.stride, self.padding, self.dilation, strict=True)
        self.size = [(o - 1) * s + (k - 1) * d + 1 - 2 * p + min(extra, s - 1) for o, k, s, p, d in sizes]
        assert min(self.size) > 0

    @property
    def x_shape(self) -> list[int]:
        return [self.N, self.groups * self.C, *self.size]

    @property
    def w_shape(self) -> list[int]:
        return [self.groups * self.K, self.C, *self.kernel]

    @property
    def y_shape(self) -> list[int]:
        return [self.N, self.groups * self.K, *self.out]

    @property
    def depth(self) -> int:
        return self.N * math.prod(self.out)

    @property
    def geometry(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def torch(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, n = torch.zeros(self.w_shape, dtype=x.dtype), len(self.out)
        arguments = (self.stride, self.padding, self.dilation, False, [0] * n, self.groups, [False, True, True])
        return torch.ops.aten.convolution_backward(dy, x, weight, [self.w_shape[0]], *arguments)[1:]

    def integers(self, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        m = min(15, math.isqrt(2**23 // max(1, self.depth)))

        def draw(shape: list[int]) -> Tensor:  # without 0: a dropped or doubled term always shows
            v = torch.randint(1, 2 * m + 1, shape, generator=generator).float()
            return torch.where(v > m, m - v, v).to(dtype)

        return draw(self.y_shape), draw(self.x_shape)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def gaps(x: Tensor) -> Tensor:
    """Every second element of a buffer of NaN."""
    buffer = torch.full([2 * n for n in x.shape], math.nan, dtype=x.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


LAYOUTS = {"contiguous": contiguous, "channels_last": channels_last, "gaps": gaps}


def wgrad(case: Case, dy: Tensor, x: Tensor, *, kernel: str = "", threads: int = 0, layout=contiguous):
    dw = layout(torch.full(case.w_shape, math.nan, dtype=x.dtype))
    dbias = torch.full((case.w_shape[0],), math.nan, dtype=x.dtype)
    _C.conv_wgrad(dw, dy, x, dbias=dbias, kernel=kernel, threads=threads, **case.geometry)
    return dw, dbias


# Few and many channels of both sides around the tiles (14 x 32, 6 x 16, 4 x 8), rows narrower and wider than a block.
CASES = {
    "one of all": Case(),
    "pixels": Case(N=3, C=15, K=33, out=(5, 7)),
    "rows of 49": Case(N=5, C=14, K=32, out=(7, 7), kernel=(3, 3), padding=1),
    "odd": Case(N=2, C=13, K=31, out=(9, 11), kernel=(3, 2), padding=(2, 1)),
    "strided": Case(N=2, C=17, K=17, out=(9, 14), kernel=(3, 3), stride=2, padding=1, extra=1),
    "stride over": Case(N=2, C=29, K=15, out=(6, 33), kernel=(1, 1), stride=(2, 3), extra=2),
    "dilated": Case(N=1, C=16, K=16, out=(12, 31), kernel=(3, 3), padding=(2, 5), dilation=(2, 5)),
    "far apart": Case(N=1, C=3, K=9, out=(4, 4), kernel=(2, 2), dilation=(40, 100)),
    "more padding than image": Case(N=1, C=4, K=5, out=(9, 8), kernel=(3, 3), padding=4),
    "first layer": Case(N=2, C=3, K=40, out=(20, 57), kernel=(7, 7), stride=2, padding=3, extra=1),
    "one channel": Case(N=1, C=1, K=64, out=(700,), kernel=(10,), stride=5, extra=4),
    "few channels dilated": Case(N=1, C=2, K=8, out=(230,), kernel=(4,), dilation=3, padding=4),
    "long": Case(N=2, C=8, K=24, out=(451,), kernel=(2,), dilation=64),
    "many channels": Case(N=1, C=131, K=67, out=(6, 6), kernel=(3, 3), padding=1),
    "groups": Case(N=2, C=9, K=18, out=(7, 30), kernel=(3, 3), padding=1, groups=3),
    "cubes": Case(N=2, C=5, K=17, out=(3, 5, 6), kernel=(3, 3, 3), padding=1),
    "cubes strided": Case(N=1, C=3, K=8, out=(2, 6, 29), kernel=(2, 3, 5), stride=(1, 2, 2), padding=(0, 1, 2)),
    "many taps": Case(N=1, C=2, K=5, out=(3, 3), kernel=(23, 24)),
    "a long filter": Case(N=1, C=1, K=3, out=(7,), kernel=(6000,)),
    # Channels enough for tiles: blocks of whole images, of rows, of parts of a row.
    "flat": Case(N=11, C=33, K=40, out=(7, 7), kernel=(3, 3), padding=1),
    "flat rows": Case(N=2, C=64, K=49, out=(20, 57), kernel=(3, 2), padding=(1, 0)),
    "flat strided": Case(N=2, C=40, K=33, out=(19, 28), kernel=(3, 5), stride=2, padding=(1, 2), extra=1),
    "flat in one dimension": Case(N=2, C=32, K=24, out=(1301,), kernel=(3,), padding=2, dilation=2),
    "flat cubes": Case(N=2, C=34, K=17, out=(3, 9, 10), kernel=(3, 3, 3), stride=(2, 1, 1), padding=1),
    "flat groups": Case(N=2, C=32, K=35, out=(9, 10), kernel=(3, 3), padding=(0, 1), groups=2),
    "flat padded": Case(N=2, C=32, K=32, out=(24, 23), kernel=(3, 3), padding=5),
    "flat boxes": Case(N=1, C=70, K=64, out=(24, 24), kernel=(11, 7), padding=(5, 3)),
}
FLAT = [name for name in CASES if name.startswith("flat")]


@pytest.mark.parametrize("name", FLAT)
def test_which_blocks_are_flat(name):
    if "conv_wgrad_bf16_32x32_amx" not in [row.id for row in ROWS]:
        pytest.skip("this build has no level amx")
    case = CASES[name]
    shapes = case.x_shape, case.w_shape, case.y_shape
    plans = [
        _C.conv_plan("wgrad", *shapes, **case.geometry, dtype=dtype, isa=isa, kernel=kernel)
        for isa, dtype, kernel in (
            ("amx", "bfloat16", "conv_wgrad_bf16_32x32_amx"),
            ("amx", "float32", "conv_wgrad_f32_split_32x32_amx"),
            ("amx", "float16", ""),
            ("avx512bf16", "bfloat16", ""),
        )
    ]
    in_parts = name not in ("flat strided", "flat in one dimension", "flat cubes")
    assert [plan["flat"] for plan in plans] == [True, in_parts, False, False]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("row", ROWS)
def test_exact(row, name, generator):
    """Integers whose sums fit float32, bit for bit, in all layouts and at any thread count."""
    case, dtype = CASES[name], DTYPES[row["dtype"]]
    dy, x = case.integers(dtype, generator)
    expected, bias = (t.to(dtype) for t in case.torch(dy.double(), x.double()))
    layouts = list(LAYOUTS.values())
    for i, threads in enumerate((1, 2, 3)):
        lay, other = layouts[i], layouts[(i + (name in ("odd", "strided"))) % 3]
        dw, dbias = wgrad(case, other(dy), lay(x), kernel=row["name"], threads=threads, layout=layouts[i % 2])
        assert torch.equal(dw, expected)
        assert torch.equal(dbias, bias)


@pytest.mark.parametrize("K", [1, 7, 8, 9, 15, 16, 17, 33, 47, 65])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exact_around_tiles(dtype, K, generator):
    for C in (1, 4, 13, 14, 15, 16, 27, 29):
        case = Case(N=1, C=C, K=K, out=(3, 5), kernel=(1, 3), padding=(0, 1))
        dy, x = case.integers(dtype, generator)
        expected, bias = (t.to(dtype) for t in case.torch(dy.double(), x.double()))
        for lay in (contiguous, channels_last):
            dw, dbias = wgrad(case, lay(dy), lay(x), layout=lay)
            assert torch.equal(dw, expected), C
            assert torch.equal(dbias, bias), C


@pytest.mark.parametrize("width", [1, 2, 28, 29, 30, 112, 192, 193, 225, 256, 257, 385])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exact_around_blocks(dtype, width, generator):
    for kernel, stride in (((2, 3), 1), ((1, 1), 1), ((3, 3), 2)):
        case = Case(N=2, C=9, K=16, out=(3, width), kernel=kernel, stride=stride, padding=1 if kernel[1] > 1 else 0)
        dy, x = case.integers(dtype, generator)
        expected, bias = (t.to(dtype) for t in case.torch(dy.double(), x.double()))
        for lay in (contiguous, channels_last):
            dw, dbias = wgrad(case, lay(dy), lay(x), layout=lay)
            assert torch.equal(dw, expected), (kernel, lay)
            assert torch.equal(dbias, bias), (kernel, lay)


@pytest.mark.parametrize("row", ROWS)
def test_error(row, generator):
    """The proven bound, and no worse than torch where the sums are long."""
    dtype = DTYPES[row["dtype"]]
    for case in (
        Case(N=4, C=3, K=16, out=(100, 120), kernel=(3, 3), padding=1),
        Case(N=2, C=16, K=32, out=(14, 14), kernel=(3, 3), padding=1),
    ):
        dy, x = (torch.rand(s, generator=generator).to(dtype) for s in (case.y_shape, case.x_shape))
        expected, scale = case.torch(dy.double(), x.double()), case.torch(dy.double().abs(), x.double().abs())
        theirs = case.torch(dy, x)
        for ours, reference, size, other in zip(
            wgrad(case, dy, x, kernel=row["name"]), expected, scale, theirs, strict=True
        ):
            got = assert_within_bound(ours, GemmReference(reference, size, case.depth), precision=row["precision"])
            if row["precision"] in ("tf32", "bf16"):
                continue
            limit = 1.25 * error_measures(other, reference, size).rms
            assert got.rms <= limit + 3 * torch.finfo(dtype).eps / ours.numel()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "name", ["first layer", "rows of 49", "long", "many channels", "groups", "one channel", "cubes", *FLAT]
)
def test_bits_do_not_depend_on_threads(name, dtype, generator):
    case = CASES[name]
    dy, x = (torch.randn(s, generator=generator).to(dtype) for s in (case.y_shape, case.x_shape))
    first = wgrad(case, dy, x, threads=1)
    for threads in (2, 3, 5, 8, 64):
        for ours, one in zip(wgrad(case, dy, x, threads=threads), first, strict=True):
            assert torch.equal(ours, one), threads


@pytest.mark.parametrize("row", ROWS)
def test_nothing_beside_the_result_is_written(row, generator):
    dtype, case = DTYPES[row["dtype"]], CASES["odd"]
    dy, x = case.integers(dtype, generator)
    n, k = math.prod(case.w_shape), case.w_shape[0]
    buffer, bias = torch.full((n + 64,), 77.0, dtype=dtype), torch.full((k + 64,), 77.0, dtype=dtype)
    dw, dbias = buffer[32 : 32 + n].view(case.w_shape), bias[32 : 32 + k]
    _C.conv_wgrad(dw, dy, x, dbias=dbias, kernel=row["name"], **case.geometry)
    assert torch.equal(dw, case.torch(dy.double(), x.double())[0].to(dtype))
    for whole, size in ((buffer, n), (bias, k)):
        assert (whole[:32] == 77).all()
        assert (whole[32 + size :] == 77).all()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_special_values_stay_where_they_belong(row, value, generator):
    """An Inf or NaN of dy reaches its output channel, one of x its channel: packing adds zeros beside neither."""
    dtype = DTYPES[row["dtype"]]
    for case in (
        Case(N=1, C=5, K=9, out=(3, 7), kernel=(2, 3)),
        Case(N=1, C=18, K=17, out=(3, 31), kernel=(1, 1)),
        Case(N=2, C=36, K=20, out=(4, 9), kernel=(3, 3), padding=1),
    ):
        dy, x = case.integers(dtype, generator)
        dy, x = dy.abs(), x.abs()
        dy[0, 4, 1, 6], x[0, 3, 2, x.shape[3] - 1] = value, value
        expected, bias = case.torch(dy.double(), x.double())
        for lay in (contiguous, channels_last):
            dw, dbias = wgrad(case, lay(dy), lay(x), kernel=row["name"])
            assert torch.equal(dw.isfinite(), expected.isfinite())
            assert torch.equal(dbias.isfinite(), bias.isfinite())


@pytest.mark.parametrize("row", [row for row in ROWS if "f32" in row.id])
def test_tiny_values_that_some_taps_meet(row, generator):
    """Each sum is as good as its own values: large ones that its tap does not meet are no excuse."""
    case = CASES["flat"]
    for channels in ("x", "x but for a column", "x but for a row", "x inside", "dy", "both"):
        dy, x = (torch.randn(s, generator=generator) for s in (case.y_shape, case.x_shape))
        if channels == "both":
            x[:, 3], dy[:, 5] = x[:, 3] * 2.0**-60, dy[:, 5] * 2.0**-60
        elif channels == "dy":
            dy[:, 5] *= 2.0**-122
        else:
            inside = slice(1, -1) if channels == "x inside" else None
            rows = inside or slice(channels == "x but for a row", None)
            columns = inside or slice(channels == "x but for a column", None)
            x[:, 3, rows, columns] *= 2.0**-122
        expected, scale = case.torch(dy.double(), x.double()), case.torch(dy.double().abs(), x.double().abs())
        reference = GemmReference(expected[0], scale[0], case.depth)
        for lay in (contiguous, channels_last):
            dw, _ = wgrad(case, lay(dy), lay(x), kernel=row["name"], threads=2)
            for threads in (1, 3, 8):
                assert torch.equal(wgrad(case, lay(dy), lay(x), kernel=row["name"], threads=threads)[0], dw), threads
            assert_within_bound(dw, reference, precision=row["precision"])
            tiny = (scale[0] > 2.0**-126) & (scale[0] < 2.0**-100)
            assert tiny.any() or channels in ("both", "x inside")
            if row["precision"] in ("fma", "ieee"):
                assert ((dw - expected[0]).abs()[tiny] < 2e-6 * scale[0][tiny]).all(), channels


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nothing_to_sum_is_zero(dtype):
    for case in (Case(N=0, C=3, K=5, out=(4, 4), kernel=(3, 3)), Case(N=2, C=0, K=5, out=(4, 4), kernel=(3, 3))):
        dy, x = torch.ones(case.y_shape, dtype=dtype), torch.ones(case.x_shape, dtype=dtype)
        dw, dbias = wgrad(case, dy, x)
        assert (dw == 0).all()
        assert (dbias == case.depth).all()
    case = Case(N=2, C=3, K=0, out=(4,), kernel=(3,))
    wgrad(case, torch.ones(case.y_shape, dtype=dtype), torch.ones(case.x_shape, dtype=dtype))


SHAPES = [
    Case(N=8, C=3, K=64, out=(112, 112), kernel=(7, 7), stride=2, padding=3),
    Case(N=1, C=1, K=512, out=(31999,), kernel=(10,), stride=5),
    Case(N=8, C=512, K=512, out=(7, 7), kernel=(3, 3), padding=1),
    Case(N=8, C=2048, K=2048, out=(7, 7), kernel=(3, 3), padding=1),
    Case(N=1, C=512, K=512, out=(38, 57), kernel=(3, 3), padding=3, dilation=3),
    Case(N=1, C=64, K=64, out=(8, 28, 28), kernel=(7, 7, 7), padding=3),
    Case(N=1, C=16, K=16, out=(100,), kernel=(100000,)),
    Case(N=1, C=8, K=8, out=(50,), kernel=(3,), dilation=10**6),
    Case(N=1, C=8, K=8, out=(300, 1), kernel=(300, 1), stride=7),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c.C}-{c.K}-{'x'.join(map(str, c.kernel))}")
def test_workspace(case):
    """At most 2 MiB a thread beside the sums of chunks, whose number the shape alone decides."""
    for dtype in DTYPES:
        for isa in LEVELS:
            chunks = set()
            for threads in (1, 2, 16, 64):
                plan = _C.conv_plan(
                    *("wgrad", case.x_shape, case.w_shape, case.y_shape),
                    **(case.geometry | {"dtype": dtype, "isa": isa, "threads": threads}),
                )
                assert plan["thread_bytes"] <= 2 << 20
                assert plan["workspace_bytes"] == plan["threads"] * plan["thread_bytes"] + plan["chunk_bytes"]
                assert plan["chunk_bytes"] <= 24 << 20
                chunks.add(plan["chunks"])
            assert len(chunks) == 1
