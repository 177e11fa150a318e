"""The direct kernels of depthwise and grouped convolutions, each row of the table, every pass."""

import itertools
import random

import pytest
import torch

import fastdl
from conftest import DTYPES, VECTOR_WIDTH
from fastdl import _C
from fastdl.testing import UNIT_ROUNDOFF, GemmReference, assert_within_bound

ROWS = [row for row in _C.kernels("conv") if row["kind"] in ("depthwise", "grouped")]
CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def rows_of(*kinds):
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(r, id=r["name"], marks=pytest.mark.skipif(not r["available"], reason=r["reason"] or "-"))
            for r in ROWS
            if r["kind"] in kinds
        ],
    )


every_row = rows_of("depthwise", "grouped")


@pytest.fixture(autouse=True)
def one_thread():
    """References of many small calls are no work for a team; teams have tests of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def channels_last(x):
    """x with its channels side by side."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def gaps(x):
    """x in every second place of each dimension, NaN between."""
    big = torch.full([2 * n for n in x.shape], float("nan"), dtype=x.dtype)
    return big[(slice(None, None, 2),) * x.dim()].copy_(x)


LAYOUTS = (torch.Tensor.contiguous, channels_last, gaps)


class Problem:
    """One convolution: x [N, groups*inputs, *size], w [groups*outputs, inputs, *kernel]; operands of `values`."""

    def __init__(
        self, N, groups, inputs, outputs, size, kernel, stride=1, padding=0, dilation=1, *, dtype, values=None
    ):
        self.dims, self.groups, self.dtype = len(size), groups, dtype
        every = lambda v: v if isinstance(v, tuple) else (v,) * self.dims  # noqa: E731
        self.stride, self.padding, self.dilation, kernel = every(stride), every(padding), every(dilation), every(kernel)
        generator = torch.Generator().manual_seed(7)
        values = values or (lambda *shape: torch.randint(-3, 4, shape, generator=generator))
        self.x = values(N, groups * inputs, *size).to(dtype)
        self.w = values(groups * outputs, inputs, *kernel).to(dtype)
        self.bias = values(groups * outputs).to(dtype)
        self.dy = values(*self.reference(self.x, self.w).shape).to(dtype)

    def reference(self, x, w, bias=None):
        return CONVOLUTIONS[self.dims](
            *(None if t is None else t.double() for t in (x, w, bias)),
            *(self.stride, self.padding, self.dilation, self.groups),
        )

    def gradients(self, x, w, dy):
        """In float64: of x, of w and of the bias."""
        leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
        grads = torch.autograd.grad(self.reference(*leaves), leaves, dy.double())
        return (*grads, dy.double().sum([0, *range(2, dy.dim())]))

    @property
    def options(self):
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    def plan(self, pass_, last, **options):
        return _C.conv_plan(
            pass_,
            *(list(t.shape) for t in (self.x, self.w, self.dy)),
            dtype=str(self.dtype).split(".")[-1],
            channels_last=last,
            **self.options,
            **options,
        )

    def run(self, last=True, x=None, w=None, dy=None, bias=True, kernel="", threads=0, **epilogue):
        """y, dx, dw, dbias; what is written holds NaN before. What is read lies as it does unless given."""
        layout = channels_last if last else torch.Tensor.contiguous
        x, dy = (given if given is not None else layout(own) for given, own in ((x, self.x), (dy, self.dy)))
        w = self.w if w is None else w
        y, dx = (layout(torch.full_like(t, float("nan"))) for t in (self.dy, self.x))
        dw, dbias = torch.full_like(w, float("nan")), torch.full_like(self.bias, float("nan"))
        options = {**self.options, "threads": threads, "kernel": kernel}
        if forced(self, "forward", last, kernel):
            _C.conv(y, x, w, self.bias if bias else None, **options, **epilogue)
        if forced(self, "dgrad", last, kernel):
            _C.conv_dgrad(dx, dy, w, **options)
        if forced(self, "wgrad", last, kernel):
            _C.conv_wgrad(dw, dy, x, dbias=dbias, **options)
        return y, dx, dw, dbias


def forced(problem, pass_, last, kernel):
    """Whether the row takes it."""
    if not kernel:
        return True
    try:
        return bool(problem.plan(pass_, last, kernel=kernel))
    except RuntimeError as e:
        assert "expected several groups" in str(e)
        return False


def check_exact(problem, row, **options):
    """Small integers: every pass in both layouts bit for bit. Returns the passes that ran."""
    y = problem.reference(problem.x, problem.w, problem.bias)
    expected = [t.to(problem.dtype) for t in (y, *problem.gradients(problem.x, problem.w, problem.dy))]
    ran = set()
    for last in (True, False):
        got = problem.run(last, kernel=row["name"], **options)
        for name, a, b in zip(("y", "dx", "dw", "dbias"), got, expected, strict=True):
            if forced(problem, {"y": "forward", "dx": "dgrad"}.get(name, "wgrad"), last, row["name"]):
                assert torch.equal(a, b), (name, last, problem.options, problem.x.shape, problem.w.shape)
                ran.add(name)
    return ran


def groups_of(row, groups, *few):
    """Groups, inputs and outputs that the row takes: one channel a group, or as given."""
    return (groups, 1, 1) if row["kind"] == "depthwise" else (groups, *few)


@every_row
def test_tails_of_vectors_and_strips(row):
    dtype, W = DTYPES[row["dtype"]], VECTOR_WIDTH[row["isa"]]
    ran = set()
    for groups, width in zip(
        (2, W - 1, W, W + 1, 2 * W, 4 * W + 3, 6 * W), (1, 5, 6, 7, 13, W + 1, 3 * W), strict=True
    ):
        ran |= check_exact(Problem(2, *groups_of(row, groups, 2, 4), (3, width), 3, 1, 1, dtype=dtype), row)
        ran |= check_exact(Problem(1, *groups_of(row, groups, 2, 4), (3, width), 3, 1, 2, 2, dtype=dtype), row)
        ran |= check_exact(Problem(1, *groups_of(row, groups, 2, 1), (width + 1,), 2, dtype=dtype), row)
    assert {"y", "dx"} <= ran


@rows_of("depthwise")
@pytest.mark.parametrize("width, stride", [(1, 1), (2, 1), (3, 1), (5, 1), (7, 1), (3, 2), (5, 2), (4, 1), (7, 2)])
def test_windows_that_slide(row, width, stride):
    """Around the strips of 7 (and 3) columns, with and without edges, and widths that do not slide."""
    dtype, W = DTYPES[row["dtype"]], VECTOR_WIDTH[row["isa"]]
    ran = set()
    for columns, padding in ((1, width // 2), (6, 0), (7, width - 1), (8, width // 2), (15, width // 2), (22, width)):
        size = max(1, (columns - 1) * stride + width - 2 * padding)
        for channels in (2 * W + 3, 4 * W):
            problem = Problem(2, channels, 1, 1, (3, size), (2, width), stride, (1, padding), dtype=dtype)
            ran |= check_exact(problem, row)
    assert {"y", "dx"} <= ran


@rows_of("depthwise")
@pytest.mark.parametrize("channels", [2, 3, 15, 16, 17, 31, 33, 54, 63, 65, 127, 130])
def test_tails_of_channels(row, channels):
    """Windows that slide and taps one by one, around vectors, pairs of them and blocks of channels."""
    for width, dilation in ((3, 1), (2, 2)):
        p = Problem(1, channels, 1, 1, (3, 9), (2, width), 1, 1, dilation, dtype=DTYPES[row["dtype"]])
        assert {"y", "dx"} <= check_exact(p, row)


@rows_of("depthwise")
@pytest.mark.parametrize("stride", [1, 2])
def test_images_of_many_bytes(row, stride):
    """Whose rows to come are fetched ahead: over the image's last, and where windows sit between them."""
    dtype = DTYPES[row["dtype"]]
    size = (1 + (8 << 20) // (64 * 128 * dtype.itemsize), 128)
    assert {"y", "dx"} <= check_exact(Problem(1, 64, 1, 1, size, (3, 3), stride, (2, 1), dtype=dtype), row)


@every_row
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strides_dilation_and_padding(row, stride):
    dtype = DTYPES[row["dtype"]]
    for kernel, padding, dilation in (
        (1, 0, 1),
        (1, 2, 2),
        (2, 0, 2),
        (2, 4, 1),
        (3, 2, 2),
        (3, 0, 1),
        (5, 4, 1),
        (5, 2, 2),
    ):
        size = max(1, (kernel - 1) * dilation + 1 - 2 * padding) + kernel
        shape = (size, size + 3)
        check_exact(Problem(2, *groups_of(row, 5, 2, 2), shape, kernel, stride, padding, dilation, dtype=dtype), row)
    mixed = Problem(1, *groups_of(row, 3, 4, 2), (9, 11), (3, 2), (stride, 1), (2, 0), (1, stride), dtype=dtype)
    check_exact(mixed, row)


@every_row
def test_three_dimensions_and_long_filters(row):
    dtype = DTYPES[row["dtype"]]
    check_exact(Problem(2, *groups_of(row, 18, 2, 2), (5, 6, 7), 3, 1, 1, dtype=dtype), row)
    check_exact(
        Problem(1, *groups_of(row, 3, 2, 4), (5, 6, 7), (2, 3, 1), (2, 1, 3), (1, 2, 0), (1, 2, 1), dtype=dtype), row
    )
    check_exact(Problem(2, *groups_of(row, 33, 2, 2), (97,), 31, 1, 15, dtype=dtype), row)
    check_exact(Problem(1, *groups_of(row, 3, 2, 2), (40,), 31, 2, 30, 2, dtype=dtype), row)
    check_exact(Problem(1, *groups_of(row, 2, 2, 2), (900,), 5, 1, 400, 200, dtype=dtype), row)  # taps far apart


@pytest.mark.parametrize("few", [(1, 2), (2, 1), (3, 3), (4, 4), (8, 8), (16, 16), (32, 32), (5, 7), (1, 9), (66, 2)])
@rows_of("grouped")
def test_sizes_of_groups(row, few):
    generator = torch.Generator().manual_seed(3)
    ones = lambda *shape: torch.randint(-1, 2, shape, generator=generator)  # noqa: E731  sums stay exact in 16 bits
    for groups, stride in ((3, 1), (17, 2)):
        check_exact(Problem(2, groups, *few, (4, 6), 3, stride, 1, dtype=DTYPES[row["dtype"]], values=ones), row)


@every_row
def test_blocks(row):
    """Images of more than one block, in every dimension."""
    dtype = DTYPES[row["dtype"]]
    for size, kernel in (((130, 40), 3), ((5000,), 3), ((4, 66, 30), (3, 3, 1))):
        problem = Problem(1, *groups_of(row, 18, 4, 2), size, kernel, 1, 1, dtype=dtype)
        assert check_exact(problem, row)


@every_row
def test_layouts_of_what_is_read(row):
    problem = Problem(
        2, *groups_of(row, 2 * VECTOR_WIDTH[row["isa"]], 2, 2), (5, 7), 3, 2, 1, dtype=DTYPES[row["dtype"]]
    )
    first = problem.run(kernel=row["name"])
    for layout in LAYOUTS:
        got = problem.run(kernel=row["name"], x=layout(problem.x), w=layout(problem.w), dy=layout(problem.dy))
        for a, b in zip(got, first, strict=True):
            assert torch.equal(a.nan_to_num(99), b.nan_to_num(99))


@every_row
def test_same_bits_on_any_team(row):
    for groups, size, kernel in ((40, (9, 20), 3), (3, (60, 33), 3), (70, (300,), 31)):
        problem = Problem(
            3, *groups_of(row, groups, 4, 4), size, kernel, 1, 1, dtype=DTYPES[row["dtype"]], values=torch.randn
        )
        for last in (True, False):
            first = [t.nan_to_num(99) for t in problem.run(last, kernel=row["name"], threads=1)]
            for threads in (2, 3, 5, 1):
                for a, b in zip(problem.run(last, kernel=row["name"], threads=threads), first, strict=True):
                    assert torch.equal(a.nan_to_num(99), b)


@every_row
def test_within_the_bound(row):
    """|err| <= g*S + rounding: S the same of absolute values, the depth what is summed."""
    dtype = DTYPES[row["dtype"]]
    for groups, few, size, kernel in ((64, (4, 4), (12, 15), 3), (33, (8, 2), (200,), 31)):
        p = Problem(2, *groups_of(row, groups, *few), size, kernel, 1, 1, dtype=dtype, values=torch.randn)
        inputs, outputs, taps = p.w.shape[1], p.w.shape[0] // groups, p.w[0, 0].numel()
        depths = (inputs * taps + 1, outputs * taps, p.dy.numel() // p.dy.shape[1])
        absolute = [t.abs() for t in (p.x, p.w, p.dy)]
        expected = (p.reference(p.x, p.w, p.bias), *p.gradients(p.x, p.w, p.dy))
        scales = (p.reference(*absolute[:2], p.bias.abs()), *p.gradients(*absolute))
        for last in (True, False):
            got = p.run(last, kernel=row["name"])
            for name, a, e, s, depth in zip(("forward", "dgrad", "wgrad"), got, expected, scales, depths, strict=False):
                if forced(p, name, last, row["name"]):
                    measures = assert_within_bound(a, GemmReference(e, s, depth))
                    assert measures.rms <= 4 * UNIT_ROUNDOFF[dtype]


@every_row
def test_epilogues(row):
    dtype = DTYPES[row["dtype"]]
    for groups, stride in ((32, 1), (7, 2)):
        p = Problem(2, *groups_of(row, groups, 2, 2), (6, 9), 3, stride, 1, dtype=dtype)
        for last in (True, False):
            layout = channels_last if last else torch.Tensor.contiguous
            if not forced(p, "forward", last, row["name"]):
                continue
            z, residual = p.reference(p.x, p.w, p.bias), layout(torch.ones_like(p.dy) * 2)
            pre = layout(torch.full_like(p.dy, float("nan")))
            y = p.run(last, kernel=row["name"], activation="relu", residual=residual, pre=pre)[0]
            assert torch.equal(y, (z.relu() + 2).to(dtype))
            assert torch.equal(pre, z.to(dtype))
            dx, bias = layout(torch.full_like(p.x, float("nan"))), torch.arange(p.x.shape[1]).to(dtype)
            shift = bias.double().view(-1, 1, 1)
            _C.conv_dgrad(dx, p.dy, p.w, bias, **p.options, kernel=row["name"], activation="relu")
            assert torch.equal(dx, (p.gradients(p.x, p.w, p.dy)[0] + shift).relu().to(dtype))


@every_row
def test_infinities_stay_where_they_belong(row):
    """Neighbours in scratch, padding and lanes past the end must not turn one infinity into NaN elsewhere."""
    p = Problem(1, *groups_of(row, 20, 2, 2), (6, 21), 3, 1, 1, dtype=DTYPES[row["dtype"]])
    x, dy = torch.ones_like(p.x), torch.ones_like(p.dy)
    x[0, 3, 2, 0] = dy[0, 4, 3, 20] = float("inf")
    w = torch.ones_like(p.w)
    expected = (p.reference(x, w), *p.gradients(x, w, dy)[:2])
    for last in (True, False):
        got = p.run(last, x=x, w=w, dy=dy, bias=False, kernel=row["name"])
        for name, a, e in zip(("forward", "dgrad", "wgrad"), got, expected, strict=False):
            if forced(p, name, last, row["name"]):
                # Padding is zeros here, and a zero times infinity NaN; float64 may leave such products out.
                same = (a.double() == e) | (a.isnan() & (e.isnan() | e.isinf()))
                assert bool(same.all()), (name, last)


@every_row
def test_workspace(row):
    dtype = DTYPES[row["dtype"]]
    shapes = (((224, 224), 3), ((14, 14), 5), ((160000,), 31), ((32, 32, 32), 3), ((2000,), 1500))
    meta = torch.device("meta")
    for size, kernel in shapes:
        with meta:
            p = Problem(8, *groups_of(row, 512, 4, 4), size, kernel, 1, kernel // 2, dtype=dtype, values=torch.empty)
        for pass_, threads in itertools.product(("forward", "dgrad", "wgrad"), (1, 16)):
            if not forced(p, pass_, True, row["name"]):
                continue
            plan = p.plan(pass_, True, kernel=row["name"], threads=threads)
            assert plan["thread_bytes"] <= 2 << 20
            shared = plan["workspace_bytes"] - plan["threads"] * plan["thread_bytes"]
            assert shared <= (32 * 4 * p.w.numel() if pass_ == "wgrad" else 0)


def test_choice():
    """Which schedule takes what."""
    for groups, few, size, stride, last, pass_, schedule in (
        (64, (1, 1), 14, 1, True, "forward", "depthwise"),
        (64, (1, 1), 14, 1, False, "forward", "depthwise"),
        (64, (1, 1), 56, 1, False, "forward", "grouped"),
        (64, (1, 1), 56, 2, False, "dgrad", "depthwise"),
        (12, (1, 1), 14, 1, False, "dgrad", "grouped"),
        (64, (1, 1), 14, 1, False, "wgrad", "depthwise"),
        (64, (1, 2), 14, 1, True, "dgrad", "grouped"),
        (32, (4, 4), 14, 1, True, "forward", "grouped"),
        (1, (64, 64), 14, 1, True, "forward", "dense"),
        (2, (8192, 64), 14, 1, True, "forward", "dense"),
    ):
        with torch.device("meta"):
            p = Problem(1, groups, *few, (size, size), 3, stride, 1, dtype=torch.float32, values=torch.empty)
        assert p.plan(pass_, last)["schedule"] == schedule, (groups, few, size, stride, last, pass_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_taps_beyond_any_image(dtype, layout):
    """Copies of the image that would not fit a number, not to speak of memory, are not attempted."""
    x = torch.ones(1, 64, 14, 14, dtype=dtype).to(memory_format=layout).requires_grad_()
    w = torch.ones(64, 1, 2, 2, dtype=dtype, requires_grad=True)
    for dilation in (2**31 - 1, 2**31 - 5):
        y = fastdl.functional.conv2d(x, w, padding=2**30, dilation=dilation, groups=64, activation="gelu")
        y.sum().backward()
        assert not any(t.any() for t in (y, x.grad, w.grad))
    for run, out in ((_C.conv, torch.ones_like(x)), (_C.conv_dgrad, torch.ones_like(x))):
        out = out.detach()
        run(out, x.detach(), w.new_ones(64, 1, 2, 3), stride=(1, 1), padding=(2**59, 1), dilation=(2**60, 1), groups=64)
        assert not out.any()


def test_rows_of_taps_beyond_any_image():
    x, dy, dw = torch.ones(16, 8, 1, 40), torch.ones(16, 8, 1, 40), torch.ones(8, 8, 2, 3)
    _C.conv_wgrad(dw, dy, x, stride=(1, 1), padding=(2**59, 1), dilation=(2**60, 1))
    assert not dw.any()


@every_row
def test_nothing_outside_is_touched(row, run_python):
    """In a process of its own: a read or write past an operand ends it."""
    run_python("conv_guard_pages.py", row["name"])


def test_random_problems():
    """Shapes that nobody chose, the plan's own rows, mixed layouts."""
    r = random.Random(5)
    for _ in range(60):
        dims, dtype = r.choice((1, 2, 2, 3)), r.choice(list(DTYPES.values()))
        few = (1, 1) if r.random() < 0.5 else (r.choice((1, 2, 3, 4, 8)), r.choice((1, 2, 4, 5)))
        each = lambda *of: tuple(r.choice(of) for _ in range(dims))  # noqa: E731, B023
        kernel, stride, padding, dilation = each(1, 2, 3), each(1, 1, 2, 3), each(0, 1, 2), each(1, 1, 2)
        size = tuple(r.randint(5, 40 if dims < 3 else 8) for _ in range(dims))
        p = Problem(
            r.choice((1, 2)), r.choice((2, 5, 16, 33)), *few, size, kernel, stride, padding, dilation, dtype=dtype
        )
        x, w, dy = (r.choice(LAYOUTS)(t) for t in (p.x, p.w, p.dy))
        got = p.run(r.random() < 0.5, x=x, w=w, dy=dy, threads=r.choice((1, 2, 3)))
        expected = (p.reference(p.x, p.w, p.bias), *p.gradients(p.x, p.w, p.dy))
        for a, e in zip(got, expected, strict=True):
            assert torch.equal(a, e.to(dtype)), (p.options, p.x.shape, p.w.shape, dtype)
