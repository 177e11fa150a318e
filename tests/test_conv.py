"""functional.conv*: values and gradients against float64, layouts as torch gives them, errors as torch raises them."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from conftest import every_dtype
from fastdl import _C, functional
from fastdl.ops import calls, conv_shapes
from fastdl.testing import assert_within_bound, integer_matrix, sum_reference

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

# id -> (function, input, weight, options)
CASES = {
    "1d": ("conv1d", (2, 5, 19), (6, 5, 3), {}),
    "1d_wave": ("conv1d", (1, 1, 103), (8, 1, 10), {"stride": 5}),
    "1d_dilated": ("conv1d", (2, 4, 40), (6, 4, 2), {"dilation": 16}),
    "1d_depthwise": ("conv1d", (2, 20, 50), (20, 1, 31), {"padding": 15, "groups": 20}),
    "2d": ("conv2d", (2, 5, 9, 10), (7, 5, 3, 3), {"padding": 1}),
    "2d_1x1": ("conv2d", (2, 17, 6, 5), (9, 17, 1, 1), {}),
    "2d_1x1_strided": ("conv2d", (2, 17, 7, 6), (9, 17, 1, 1), {"stride": 2}),
    "2d_strided": ("conv2d", (2, 6, 11, 12), (8, 6, 3, 3), {"stride": 2, "padding": 1}),
    "2d_stem": ("conv2d", (1, 3, 23, 22), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "2d_dilated": ("conv2d", (1, 4, 13, 12), (5, 4, 3, 3), {"dilation": 3, "padding": 3}),
    "2d_uneven": ("conv2d", (1, 3, 9, 14), (4, 3, 2, 5), {"stride": (2, 3), "padding": (1, 0), "dilation": (3, 1)}),
    "2d_grouped": ("conv2d", (2, 12, 8, 8), (18, 4, 3, 3), {"groups": 3, "padding": 1}),
    "2d_depthwise": ("conv2d", (2, 19, 9, 8), (19, 1, 3, 3), {"groups": 19, "padding": 1}),
    "2d_depthwise_strided": ("conv2d", (1, 19, 9, 10), (38, 1, 5, 5), {"groups": 19, "padding": 2, "stride": 2}),
    "2d_same": ("conv2d", (2, 4, 7, 8), (5, 4, 4, 3), {"padding": "same"}),
    "2d_same_dilated": ("conv2d", (1, 4, 9, 9), (5, 4, 2, 2), {"padding": "same", "dilation": (1, 3)}),
    "2d_valid": ("conv2d", (1, 4, 7, 8), (5, 4, 4, 3), {"padding": "valid", "stride": 2}),
    "2d_rest": ("conv2d", (1, 3, 10, 9), (4, 3, 2, 2), {"stride": 4}),
    "2d_pad_beyond": ("conv2d", (1, 2, 3, 3), (4, 2, 2, 2), {"padding": 4, "stride": 3}),
    "3d": ("conv3d", (2, 3, 5, 6, 7), (4, 3, 3, 3, 3), {"padding": 1}),
    "3d_strided": ("conv3d", (1, 3, 7, 8, 6), (4, 3, 3, 2, 1), {"stride": 2, "padding": (1, 0, 0)}),
    "3d_depthwise": ("conv3d", (1, 6, 4, 5, 6), (6, 1, 3, 3, 3), {"groups": 6, "padding": 1}),
    "t1d": ("conv_transpose1d", (2, 4, 9), (4, 5, 3), {"stride": 2}),
    "t2d": ("conv_transpose2d", (2, 6, 7, 6), (6, 4, 3, 3), {}),
    "t2d_strided": ("conv_transpose2d", (1, 6, 5, 6), (6, 4, 4, 4), {"stride": 2, "padding": 1}),
    "t2d_output_padding": (
        "conv_transpose2d",
        (1, 6, 5, 4),
        (6, 4, 3, 3),
        {"stride": (2, 3), "padding": 1, "output_padding": (1, 2)},
    ),
    "t2d_grouped": ("conv_transpose2d", (1, 6, 5, 4), (6, 2, 3, 2), {"stride": 2, "groups": 3, "dilation": (2, 1)}),
    "t2d_gaps": ("conv_transpose2d", (1, 3, 4, 5), (3, 4, 2, 2), {"stride": 3}),
    "t3d": ("conv_transpose3d", (1, 4, 3, 4, 3), (4, 3, 2, 3, 2), {"stride": (1, 2, 2), "padding": (0, 1, 0)}),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()


def channels(weight, name, options):
    return weight[1] * options.get("groups", 1) if "transpose" in name else weight[0]


def depths(name, x, w, y):
    """Most terms in an element of y, dx, dw and dbias."""
    taps = w.shape[2:].numel()
    ins, outs = (w[:, 0].numel(), w[0].numel()) if "transpose" in name else (w[0].numel(), w[:, 0].numel())
    places = max(y.shape[2:].numel(), x.shape[2:].numel()) * x.shape[0]
    return ins, max(outs, taps), places, y.shape[2:].numel() * y.shape[0]


def run(module, name, options, operands, dy, grads=True):
    """[output, and gradients of the operands]."""
    leaves = [x.detach().requires_grad_(grads) for x in operands]
    out = getattr(module, name)(*leaves, **options)
    return [out.detach(), *(torch.autograd.grad(out, leaves, dy) if grads else ())]


def operands_of(case, data, dtype):
    name, x, w, options = CASES[case]
    b = (channels(w, name, options),)
    with torch.no_grad():
        shape = getattr(F, name)(torch.ones(x), torch.ones(w), None, **options).shape
    return [data(s).to(dtype) for s in (x, w, b)], data(tuple(shape)).to(dtype)


# --- values -------------------------------------------------------------------------------------------------------
@every_dtype
@every_case
def test_exact_integers(case, dtype, generator):
    """Every sum fits float32: results and gradients are float64's, rounded once."""
    name, _, _, options = CASES[case]
    (x, w, b), dy = operands_of(case, lambda s: integer_matrix(s, 4000, generator), dtype)
    _C.reset_counters()
    actual = run(functional, name, options, (x, w, b), dy)
    assert sum(n for k, n in _C.counters().items() if k.startswith("conv_")) == 3 and not calls.handbacks
    expected = run(F, name, options, [t.double() for t in (x, w, b)], dy.double())
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


@every_case
def test_bound(case, generator):
    name, _, _, options = CASES[case]
    operands, dy = operands_of(case, lambda s: torch.randn(s, generator=generator), torch.float32)
    actual = run(functional, name, options, operands, dy)
    doubles, wide = [t.double() for t in operands], dy.double()
    for index, depth in enumerate(depths(name, operands[0], operands[1], actual[0])):
        reference = sum_reference(
            lambda x, w, b, g, index=index: run(F, name, options, (x, w, b), g)[index], [*doubles, wide], depth + 1
        )
        assert_within_bound(actual[index], reference)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "conv1d"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_epilogue(name, activation, residual, last, generator):
    spatial = (6, 5) if "2" in name else (11,)
    x, w, b = (torch.randn(s, generator=generator) for s in ((2, 4, *spatial), (4, 4, *(3, 3)[: len(spatial)]), (4,)))
    x = conv_shapes.as_format(x, last)
    shape = getattr(F, name)(x, w, padding=1).shape
    r, dy = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    kinds = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    kinds["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")

    def theirs(x, w, b, r=None):
        out = kinds[activation](getattr(F, name)(x, w, b, padding=1))
        return out if r is None else out + r

    def ours(x, w, b, r=None):
        return getattr(functional, name)(x, w, b, padding=1, activation=activation, residual=r)

    operands = [x, w, b] + [r] * residual
    with torch.no_grad():
        torch.testing.assert_close(ours(*operands), theirs(*operands))
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    for got, want in zip(*(torch.autograd.grad(f(*leaves), leaves, dy) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert not calls.handbacks


@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)
def test_unbatched(name, generator):
    n = int(name[-2])
    x, w = torch.randn(3, *(6, 7, 8)[:n], generator=generator), torch.randn(3, 3, *(2, 3, 2)[:n], generator=generator)
    ours, theirs = getattr(functional, name)(x, w), getattr(F, name)(x, w)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    residual = torch.ones_like(theirs)
    torch.testing.assert_close(getattr(functional, name)(x, w, residual=residual), theirs + 1)


def test_gradients_that_are_not_asked_for():
    x, w, b = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3), torch.randn(3)
    for asked in itertools.product((False, True), repeat=3):
        if not any(asked):
            continue
        grads = []
        for module in (functional, F):
            leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w, b), asked, strict=True)]
            module.conv2d(*leaves).square().sum().backward()
            grads.append([t.grad for t in leaves])
        for got, want in zip(*grads, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_only_what_is_needed_is_kept():
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.conv2d(x, w)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shapes", [((0, 4, 8, 8), (6, 4, 3, 3)), ((0, 4, 8), (6, 4, 3))])
def test_empty_batch(shapes):
    for kind in ("", "_transpose"):
        name = f"conv{kind}{len(shapes[0]) - 2}d"
        weight = shapes[1] if not kind else (shapes[1][1], shapes[1][0], *shapes[1][2:])
        operands = [torch.randn(shapes[0]), torch.randn(weight), torch.randn(6)]
        leaves = [[t.clone().requires_grad_() for t in operands] for _ in range(2)]
        ours, theirs = (getattr(m, name)(*given) for m, given in zip((functional, F), leaves, strict=True))
        assert ours.shape == theirs.shape
        for out, given in ((ours, leaves[0]), (theirs, leaves[1])):
            out.sum().backward()
            assert all(t.grad.shape == t.shape and not t.grad.any() for t in given)


def test_no_input_channels_gives_the_bias():
    """torch gives a result without channels there."""
    x, w, b = torch.randn(2, 0, 5, 5), torch.randn(3, 0, 3, 3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(functional.conv2d(x, w, b), b.view(1, 3, 1, 1).expand(2, 3, 3, 3))
    assert not functional.conv2d(x, w).any()


def test_float64_is_the_reference():
    x, w = torch.randn(1, 2, 5, 5).double(), torch.randn(3, 2, 3, 3).double()
    _C.reset_counters()
    assert torch.equal(functional.conv2d(x, w), F.conv2d(x, w))
    assert not any(_C.counters().values()) and not calls.handbacks


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_other_dtypes_are_handed_back(dtype):
    x, w = torch.ones(1, 2, 5, 5).to(dtype), torch.ones(3, 2, 3, 3).to(dtype)
    assert torch.equal(functional.conv2d(x, w), F.conv2d(x, w))
    assert set(calls.handbacks) == {("conv2d", f"dtype {str(dtype)[6:]}")}


def test_output_padding_of_at_least_the_stride_is_handed_back():
    x, w = torch.randn(1, 2, 4), torch.randn(2, 3, 2)
    options = {"output_padding": 1, "dilation": 2}
    torch.testing.assert_close(functional.conv_transpose1d(x, w, **options), F.conv_transpose1d(x, w, **options))
    assert set(calls.handbacks) == {("conv_transpose1d", "output_padding of at least the stride")}


def test_arguments_as_lists_and_numpy_integers():
    import numpy

    x, w = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
    for stride in ([2, 2], [2], numpy.int64(2), (2,)):
        torch.testing.assert_close(functional.conv2d(x, w, stride=stride), F.conv2d(x, w, stride=2))


@pytest.mark.parametrize("strides", ["negated", "expanded", "sliced", "permuted"])
def test_unusual_operands(strides):
    x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    change = {
        "negated": lambda t: torch.complex(t, t).conj().imag,
        "expanded": lambda t: t[:1, :1].expand_as(t),
        "sliced": lambda t: torch.cat([t, t], -1)[..., ::2],
        "permuted": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }[strides]
    a, b = change(x), change(w)
    torch.testing.assert_close(functional.conv2d(a, b), F.conv2d(a, b))
    # what the gradients of such leaves look like is autograd's affair; their values are not
    grads = [torch.autograd.grad(m.conv2d(a.requires_grad_(), b).square().sum(), a)[0] for m in (functional, F)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["2d", "2d_depthwise", "1d_dilated", "t2d_strided", "3d"])
def test_same_bits_at_any_thread_count(case, generator):
    name, _, _, options = CASES[case]
    operands, dy = operands_of(case, lambda s: torch.randn(s, generator=generator), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(functional, name, options, operands, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- layouts ------------------------------------------------------------------------------------------------------
def layouts(t):
    yield t.contiguous()
    yield conv_shapes.as_format(t, True)
    yield t.transpose(0, 1).contiguous().transpose(0, 1)


def random_problem(seed):
    rng = random.Random(seed)
    n, transposed = rng.choice((1, 2, 3)), rng.random() < 0.35
    groups, c, k = rng.choice((1, 1, 2, 4)), rng.choice((1, 1, 3)), rng.choice((1, 2, 3))
    kernel = [rng.choice((1, 1, 2, 3)) for _ in range(n)]
    size = [max(rng.choice((1, 4, 5, 6)), x) for x in kernel]
    options = {"stride": rng.choice((1, 2)), "padding": rng.choice((0, 1)), "groups": groups}
    weight = (groups * c, k) if transposed else (groups * k, c)
    name = f"conv{'_transpose' * transposed}{n}d"
    torch.manual_seed(seed)
    return name, torch.randn(rng.choice((1, 2)), groups * c, *size), torch.randn(*weight, *kernel), options


@pytest.mark.parametrize("seed", range(60))
def test_layouts_are_torchs(seed):
    """Of output and input gradient, sizes of 1 included; the weight's gradient has the weight's layout."""
    name, x, w, options = random_problem(seed)
    for a, b in itertools.product(layouts(x), layouts(w)):
        try:
            theirs = getattr(F, name)(a, b, **options)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                getattr(functional, name)(a, b, **options)
            continue
        for dy in layouts(torch.randn(theirs.shape)):
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            out = getattr(functional, name)(a, b, **options)
            dx, dw = torch.autograd.grad(out, (a, b), dy)
            want = getattr(F, name)(a, b, **options)
            want_dx, want_dw = torch.autograd.grad(want, (a, b), dy)
            for got, expected in ((out, want), (dx, want_dx), (dw, want_dw)):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            # torch's slow 3-D paths are contiguous whatever comes in
            assert out.stride() == want.stride() or (x.ndim == 5 and want.is_contiguous())
            assert dx.stride() == want_dx.stride() or (x.ndim == 5 and want_dx.is_contiguous())
            assert dw.is_contiguous() or dw.stride() == b.stride()


def test_layout_rule_is_torchs():
    """The strides that count as channels_last, of every kind: against what a convolution by torch makes of them."""
    rng = random.Random(5)
    w = torch.randn(2, 2, 1, 1)
    for _ in range(200):
        size = [rng.choice((1, 2, 3)), 2, rng.choice((1, 2, 3)), rng.choice((1, 2, 3))]
        order = rng.sample(range(4), 4)
        x = torch.randn([size[i] for i in order]).permute([order.index(i) for i in range(4)])
        assert functional.conv2d(x, w).stride() == F.conv2d(x, w).stride(), (x.shape, x.stride())


# --- errors -------------------------------------------------------------------------------------------------------
X, W, T = (2, 4, 8, 8), (6, 4, 3, 3), (4, 6, 3, 3)
# id -> (function, input, weight, bias or None, options, what the message says)
ERRORS = {
    "channels": ("conv2d", (2, 3, 8, 8), W, None, {}, "'input': expected 4 channels"),
    "kernel_too_large": ("conv2d", (2, 4, 2, 8), W, None, {}, "'input': expected at least the size"),
    "stride_0": ("conv2d", X, W, None, {"stride": 0}, "'stride': expected at least 1"),
    "stride_-1": ("conv2d", X, W, None, {"stride": -1}, "'stride': expected at least 1"),
    "stride_of_three": ("conv2d", X, W, None, {"stride": (1, 1, 1)}, "'stride': expected an int or 2 ints"),
    "stride_of_none": ("conv2d", X, W, None, {"stride": ()}, "'stride': expected an int or 2 ints"),
    "stride_float": ("conv2d", X, W, None, {"stride": 1.5}, "'stride': expected an int"),
    "stride_text": ("conv2d", X, W, None, {"stride": "a"}, "'stride': expected an int"),
    "stride_bool": ("conv2d", X, W, None, {"stride": True}, "'stride': expected an int"),
    "stride_missing": ("conv2d", X, W, None, {"stride": None}, "'stride': expected an int"),
    "padding_-1": ("conv2d", X, W, None, {"padding": -1}, "'padding': expected at least 0"),
    "padding_of_three": ("conv2d", X, W, None, {"padding": (1, 1, 1)}, "'padding': expected an int or 2"),
    "padding_text": ("conv2d", X, W, None, {"padding": "full"}, "'padding': expected 'same'"),
    "same_with_stride": ("conv2d", X, W, None, {"padding": "same", "stride": 2}, "'same' needs a stride of 1"),
    "dilation_0": ("conv2d", X, W, None, {"dilation": 0}, "'dilation': expected at least 1"),
    "dilation_-1": ("conv2d", X, W, None, {"dilation": -1}, "'dilation': expected at least 1"),
    "dilation_huge": ("conv2d", X, W, None, {"dilation": 2**62}, "'dilation': expected at most"),
    "dilation_large": ("conv2d", X, W, None, {"dilation": 2**30}, "expected at least the size"),
    "padding_huge": ("conv2d", X, W, None, {"padding": 2**31}, "'padding': expected at most"),
    "padding_large": ("conv2d", X, W, None, {"padding": 2**30}, "more than memory can hold"),
    "groups_0": ("conv2d", X, W, None, {"groups": 0}, "'groups': expected at least 1"),
    "groups_-1": ("conv2d", X, W, None, {"groups": -1}, "'groups': expected at least 1"),
    "groups_float": ("conv2d", X, W, None, {"groups": 2.0}, "'groups': expected an int"),
    "groups_not_dividing": ("conv2d", X, (7, 2, 3, 3), None, {"groups": 2}, "a multiple of 2"),
    "groups_of_channels": ("conv2d", X, W, None, {"groups": 2}, "'input': expected 8 channels"),
    "groups_too_many": ("conv2d", X, W, None, {"groups": 7}, "at least 7"),
    "bias_2d": ("conv2d", X, W, (6, 1), {}, r"'bias': expected shape \[6\]"),
    "bias_0d": ("conv2d", X, W, (), {}, r"'bias': expected shape \[6\]"),
    "bias_length": ("conv2d", X, W, (5,), {}, r"'bias': expected shape \[6\]"),
    "rank_2": ("conv2d", (8, 8), W, None, {}, r"'input': expected 3 \(unbatched\) or 4"),
    "rank_5": ("conv2d", (1, *X), W, None, {}, r"'input': expected 3 \(unbatched\) or 4"),
    "weight_rank_3": ("conv2d", X, (6, 4, 3), None, {}, "'weight': expected 4 dimensions"),
    "weight_rank_5": ("conv2d", X, (1, *W), None, {}, "'weight': expected 4 dimensions"),
    "empty_kernel": ("conv2d", X, (6, 4, 0, 3), None, {}, "'weight': expected a kernel without empty"),
    "no_output_channels": ("conv2d", X, (0, 4, 3, 3), None, {}, "'weight': expected at least 1"),
    "empty_image": ("conv2d", (2, 4, 0, 8), W, None, {"padding": 3}, "spatial dimensions that are not empty"),
    "1d_rank": ("conv1d", (2, 4, 8, 8), (6, 4, 3), None, {}, r"expected 2 \(unbatched\) or 3"),
    "3d_rank": ("conv3d", (8, 8, 8), (6, 4, 3, 3, 3), None, {}, r"expected 4 \(unbatched\) or 5"),
    "t_output_padding": ("conv_transpose2d", X, T, None, {"stride": 2, "output_padding": 2}, "less than stride"),
    "t_output_padding_-1": ("conv_transpose2d", X, T, None, {"output_padding": -1}, "expected at least 0"),
    "t_same": ("conv_transpose2d", X, T, None, {"padding": "same"}, "'padding': expected an int"),
    "t_channels": ("conv_transpose2d", (2, 3, 8, 8), T, None, {}, "'input': expected 4 channels"),
    "t_groups": ("conv_transpose2d", X, T, None, {"groups": 3}, "a multiple of 3"),
    "t_bias": ("conv_transpose2d", X, T, (4,), {}, r"'bias': expected shape \[6\]"),
    "t_padded_away": ("conv_transpose2d", (2, 4, 1, 8), T, None, {"padding": 2}, "a size that gives a result"),
    "t_no_channels": ("conv_transpose2d", (2, 0, 8, 8), (0, 6, 3, 3), None, {}, "at least 1"),
    "t_dilation_huge": ("conv_transpose2d", X, T, None, {"dilation": 2**62}, "'dilation': expected at most"),
    "t_stride_huge": ("conv_transpose2d", X, T, None, {"stride": 2**58}, "more than memory can hold"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_errors(error, requires_grad):
    """torch's type of exception, from the short way and the general one."""
    name, x, w, b, options, message = ERRORS[error]
    x, w = torch.ones(x), torch.ones(w, requires_grad=requires_grad)
    b = None if b is None else torch.ones(b)
    # padding of 2^30 would be a result of 2^64 bytes, which torch computes as it overflows
    kind = RuntimeError
    if error not in ("padding_large",):
        with pytest.raises(Exception) as theirs:
            getattr(F, name)(x, w, b, **options)
        kind = theirs.type
    with pytest.raises(kind, match=message) as ours:
        getattr(functional, name)(x, w, b, **options)
    assert ours.type is kind and str(ours.value).startswith(f"fastdl.{name}: ")
    with (
        pytest.raises(kind, match=message),
        torch.autocast("cpu", enabled=False),
        torch.overrides.BaseTorchFunctionMode(),
    ):
        getattr(functional, name)(x, w, b, **options)


@pytest.mark.parametrize("given", ["input", "weight", "bias", "residual"])
def test_no_tensors(given):
    arguments = {"input": torch.ones(X), "weight": torch.ones(W)} | {given: [1.0]}
    with pytest.raises(TypeError, match=f"fastdl.conv2d: argument '{given}': expected a torch.Tensor, got list"):
        functional.conv2d(**arguments)
    with pytest.raises(TypeError):
        functional.conv2d(torch.ones(X), None)


def test_mixed_dtypes_and_devices():
    x, w = torch.ones(X), torch.ones(W)
    for operands in ((x.double(), w), (x, w.bfloat16()), (x, w, torch.ones(6).double())):
        with pytest.raises(RuntimeError, match="expected tensors of one dtype"):
            functional.conv2d(*operands)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        functional.conv2d(x, w.to("meta"))


def test_activation_and_residual():
    x, w = torch.ones(X), torch.ones(W)
    with pytest.raises(RuntimeError, match="'activation': expected None, 'relu'"):
        functional.conv2d(x, w, activation="tanh")
    with pytest.raises(RuntimeError, match="'residual': expected the result's shape"):
        functional.conv2d(x, w, residual=torch.ones(2, 6, 1, 1))


def test_meta_tensors_tell_the_shape():
    out = functional.conv2d(torch.ones(X, device="meta"), torch.ones(W, device="meta"), padding="same")
    assert out.shape == (2, 6, 8, 8) and out.is_meta
