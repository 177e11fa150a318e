"""fastdl.functional.linear: values, gradients, layouts, hand-backs and errors, on every way through the Python code."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import assert_sums_of_products
from fastdl import _C
from fastdl.functional import linear
from fastdl.ops import calls, gemm, plain, route
from fastdl.testing import assert_gemm_close, integer_matrix

SHAPES = [  # input, out_features
    ((5,), 3),
    ((1, 1), 1),
    ((4, 8), 5),
    ((17, 33), 31),
    ((40, 64), 70),
    ((2, 3, 8), 5),
    ((2, 1, 3, 7), 4),
    ((1,) * 9 + (6,), 2),
]
DEPTH = 64  # the longest sum
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()


def make(shape, N, generator, bias=True, dtype=torch.float32):
    """Input, weight and bias of small integers: every sum below is exact, so results must match bit for bit."""
    sizes = shape, (N, shape[-1]), (N,)
    x, w, b = (integer_matrix(size, DEPTH, generator).to(dtype) for size in sizes)
    return x, w, b if bias else None


def expected_gradients(function, tensors, dy):
    """Value and gradients of function by torch in float64."""
    doubles = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    y = function(*doubles)
    return y, torch.autograd.grad(y, [t for t in doubles if t is not None], dy.double())


def assert_same(actual, expected, dtype=torch.float32):
    """Bit for bit what the float64 expectation, being exact, rounds to."""
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.detach(), expected.detach().to(dtype), rtol=0, atol=0)


def through_op(input, weight, bias=None):
    return torch.ops.fastdl.linear(input, weight, bias)


def through_general(input, weight, bias=None):
    return route.call(gemm.LINEAR, input, weight, bias, constants=(None,))


# --- values -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", [linear, through_op, through_general], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("shape", "N"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(way, shape, N, bias, dtype, generator):
    x, w, b = make(shape, N, generator, bias, dtype)
    y = way(x, w, b)
    assert y.shape == (*shape[:-1], N)
    assert y.is_contiguous()
    assert_same(y, F.linear(x.double(), w.double(), b if b is None else b.double()), dtype)
    assert not calls.handbacks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_no_worse_than_torchs(dtype, generator):
    x, w, b = (torch.randn(size, generator=generator).to(dtype) for size in ((64, 300), (96, 300), (96,)))
    assert_gemm_close(linear(x, w, b), x, w.t(), b)


@pytest.mark.parametrize("way", [linear, through_general], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("shape", "N"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(way, shape, N, bias, dtype, generator):
    args = make(shape, N, generator, bias, dtype)
    dy = integer_matrix((*shape[:-1], N), DEPTH, generator, dtype)
    leaves = [t.requires_grad_() for t in args if t is not None]
    y = way(*args)
    grads = torch.autograd.grad(y, leaves, dy)
    value, expected = expected_gradients(F.linear, args, dy)
    assert_same(y, value, dtype)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_same(ours, theirs, dtype)
    assert not calls.handbacks


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_only_the_needed_gradients_and_saved_tensors(needed, generator):
    leaves = make((4, 8), 5, generator)
    for t, need in zip(leaves, needed, strict=True):
        t.requires_grad_(bool(need))
    y = linear(*leaves)
    input, weight = y.grad_fn.saved_tensors
    assert (input is not None) == bool(needed[1])
    assert (weight is not None) == bool(needed[0])
    y.sum().backward()
    assert [t.grad is not None for t in leaves] == [bool(need) for need in needed]


def test_parameters_and_keyword_arguments(generator):
    x, w, b = make((4, 8), 5, generator)
    w, b = nn.Parameter(w), nn.Parameter(b)
    y = linear(input=x, weight=w, bias=b)
    assert y.requires_grad
    assert_same(y, F.linear(x.double(), w.double(), b.double()))
    with torch.no_grad():
        assert not linear(x, w, b).requires_grad


@pytest.mark.parametrize(
    ("shape", "N"), [((0, 8), 5), ((4, 0), 5), ((4, 8), 0), ((2, 0, 8), 5), ((0,), 3), ((0, 0), 0)]
)
def test_empty(shape, N, generator):
    x, w, b = (t.requires_grad_() for t in make(shape, N, generator))
    y = linear(x, w, b)
    torch.testing.assert_close(y, F.linear(x, w, b), rtol=0, atol=0)
    y.sum().backward()
    rows = math.prod(shape[:-1])
    torch.testing.assert_close(b.grad, torch.full((N,), float(rows)), rtol=0, atol=0)
    torch.testing.assert_close(w.grad, torch.stack([x.detach().reshape(rows, shape[-1]).sum(0)] * N) if N else w)


def test_zero_times_nan_is_nan():
    x, w = torch.zeros(2, 3), torch.full((4, 3), math.nan)
    assert linear(x, w).isnan().all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_double_backward(bias, generator):
    def second_order(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad((function(*leaves) ** 3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    args = [t for t in make((3, 4), 2, generator, bias) if t is not None]
    # y: 5; its square, thrice: 12; a gradient, 2 or 3 of it times an operand: 16; that of its square: 2 * 16 + 16.
    assert_sums_of_products(second_order, linear, F.linear, args, roundings=48)


def test_write_between_forward_and_backward_is_an_error(generator):
    x, w, b = make((4, 8), 5, generator)
    y = linear(x, w.requires_grad_(), b)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- layouts ------------------------------------------------------------------------------------------------------
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed_batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed_inner": lambda x: x.mT.contiguous().mT,
    "all_reversed": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., 1 : 1 + x.shape[-1]],
    "every_other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_inner": lambda x: x[..., :1].expand_as(x),
    "expanded_all": lambda x: x[:1, :1, :1].expand_as(x),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_layouts(x_layout, dy_layout, generator):
    x, w, b = make((3, 4, 6), 5, generator)
    args = [LAYOUTS[x_layout](x).detach().requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    dy = LAYOUTS[dy_layout](integer_matrix((3, 4, 5), DEPTH, generator))
    y = linear(*args)
    value, expected = expected_gradients(F.linear, args, dy)
    assert_same(y, value)
    for ours, theirs in zip(torch.autograd.grad(y, args, dy), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("layout", ["transposed_inner", "sliced", "expanded_batch", "expanded_inner", "unaligned"])
def test_weight_layouts(layout, generator):
    x, w, b = make((7, 6), 5, generator)
    args = [x.requires_grad_(), LAYOUTS[layout](w).detach().requires_grad_(), b.requires_grad_()]
    dy = integer_matrix((7, 5), DEPTH, generator)
    y = linear(*args)
    value, expected = expected_gradients(F.linear, args, dy)
    assert_same(y, value)
    for ours, theirs in zip(torch.autograd.grad(y, args, dy), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_negative_bit(which, generator):
    args = dict(zip(("input", "weight", "bias"), make((4, 8), 5, generator), strict=True))
    negative = torch.complex(torch.zeros_like(args[which]), -args[which]).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(negative, args[which])
    expected = linear(**args)
    torch.testing.assert_close(linear(**{**args, which: negative}), expected, rtol=0, atol=0)


def test_negative_bit_in_the_gradient(generator):
    x, w, _ = make((4, 8), 5, generator)
    dy = torch.randn(4, 5, generator=generator)
    negative = torch.complex(torch.zeros_like(dy), -dy).conj().imag
    y = linear(x.requires_grad_(), w.requires_grad_())
    expected = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, (x, w), negative), expected, rtol=0, atol=0)


def test_zero_tensor(generator):
    x, w, b = make((4, 8), 5, generator)
    zero = torch._efficientzerotensor((4, 8))
    torch.testing.assert_close(linear(zero, w, b), b.expand(4, 5))
    y = linear(x.requires_grad_(), w)
    (dx,) = torch.autograd.grad(y, x, torch._efficientzerotensor((4, 5)))
    assert not dx.any()


# --- what goes where ----------------------------------------------------------------------------------------------
def test_plain_calls_skip_the_general_path(monkeypatch, generator):
    def refuse(*args, **options):
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(gemm, "call", refuse)
    x, w, b = make((4, 8), 5, generator)
    linear(x, w, b)
    linear(x, nn.Parameter(w), nn.Parameter(b)).sum().backward()
    with pytest.raises(AssertionError, match="general path"), torch.autocast("cpu"):
        linear(x, w, b)


class Subclass(torch.Tensor):
    pass


def nested(x):
    return torch.nested.as_nested_tensor([x, x])


HANDED_BACK = {
    "complex": (lambda x, w, b: (x + 0j, w + 0j, b + 0j), "dtype complex64"),
    "int": (lambda x, w, b: (x.long(), w.long(), None), "dtype int64"),
    "meta": (lambda x, w, b: (x.to("meta"), w.to("meta"), b.to("meta")), "input is on meta"),
    "sparse_weight": (lambda x, w, b: (x, w.relu().to_sparse(), None), "weight is sparse_coo"),
    "subclass_input": (lambda x, w, b: (x.as_subclass(Subclass), w, b), "input is a Subclass"),
    "subclass_weight": (lambda x, w, b: (x, w.as_subclass(Subclass), b), "weight is a Subclass"),
    "vector_weight": (lambda x, w, b: (x, w[0], None), "weight is 1-D"),
    "broadcast_bias": (lambda x, w, b: (x, w, b[:1]), "bias is broadcast"),
    "matrix_bias": (lambda x, w, b: (x, w, torch.ones(4, 5)), "bias is broadcast"),
    "many_dims": (lambda x, w, b: (x.view(*[1] * 9, 4, 8), w, b), "more than 8 batch dimensions"),
}


@pytest.mark.parametrize("kind", HANDED_BACK)
def test_handed_back_with_a_reason(kind, generator):
    make_args, reason = HANDED_BACK[kind]
    args = make_args(*make((4, 8), 5, generator))
    expected = F.linear(*args)
    y = linear(*args)
    assert type(y) is type(expected)
    assert (y.dtype, y.device, y.shape) == (expected.dtype, expected.device, expected.shape)
    if y.device.type != "meta":
        torch.testing.assert_close(y, expected)
    assert dict(calls.handbacks) == {("linear", reason): 1}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_is_handed_back(generator):
    x, w, b = make((4, 8), 5, generator)
    y = linear(nested(x), w, b)
    torch.testing.assert_close(y.unbind()[0], F.linear(x, w, b))
    assert dict(calls.handbacks) == {("linear", "input is nested"): 1}


def test_without_a_vector_level_everything_is_handed_back(monkeypatch, generator):
    monkeypatch.setattr(route, "HAS_VECTOR_LEVEL", False)
    x, w, b = make((4, 8), 5, generator)
    _C.plain_rules(types=(), **plain.RULES)
    try:
        y = linear(x, w, b)
    finally:
        _C.plain_rules(types=tuple(plain.PLAIN_TYPES), **plain.RULES)
    torch.testing.assert_close(y, F.linear(x, w, b), rtol=0, atol=0)
    assert dict(calls.handbacks) == {("linear", "this build has no vector level"): 1}


def test_float64_runs_the_reference(generator):
    args = make((4, 8), 5, generator, dtype=torch.float64)
    torch.testing.assert_close(linear(*args), F.linear(*args), rtol=0, atol=0)
    assert not calls.handbacks


def test_log_prints_each_reason_once(run_python):
    code = """
import contextlib, io, torch, fastdl
x = torch.ones(2, 2, dtype=torch.int64)
with contextlib.redirect_stderr(io.StringIO()) as err:
    for _ in range(3):
        fastdl.functional.linear(x, x)
print(err.getvalue())
"""
    out = run_python("-c", code, env={"FASTDL_LOG": "1"})
    assert out.splitlines()[0] == "fastdl: linear: handed to torch: dtype int64"
    assert out.count("handed to torch") == 1
    assert "handed" not in run_python("-c", code, env={"FASTDL_LOG": "0"})


# --- errors -------------------------------------------------------------------------------------------------------
x48, w58, b5 = torch.ones(4, 8), torch.ones(5, 8), torch.ones(5)
ERRORS = {
    "list_input": (([1.0], w58, b5), "argument 'input': expected a torch.Tensor, got list"),
    "list_weight": ((x48, [1.0], b5), "argument 'weight': expected a torch.Tensor, got list"),
    "float_bias": ((x48, w58, 1.0), "argument 'bias': expected a torch.Tensor, got float"),
    "none_weight": ((x48, None, b5), "argument 'weight': expected a torch.Tensor, got NoneType"),
    "k_mismatch": ((x48, torch.ones(5, 9), b5), r"'input': expected \[..., 9\] .* got shape \[4, 8\]"),
    "bias_length": ((x48, w58, torch.ones(6)), r"argument 'bias': expected shape \[5\], got shape \[6\]"),
    "bias_rank": ((x48, w58, torch.ones(2, 2, 5)), r"argument 'bias': expected shape \[5\], got shape \[2, 2, 5\]"),
    "scalar_input": ((torch.tensor(1.0), w58, b5), r"argument 'input': expected at least 1 dimension, got shape \[\]"),
    "scalar_weight": ((x48, torch.tensor(1.0)), "argument 'weight': expected 2 dimensions"),
    "weight_rank": ((x48, torch.ones(2, 5, 8)), r"argument 'weight': expected 2 dimensions.* got shape \[2, 5, 8\]"),
    "weight_dtype": ((x48, w58.double()), "one dtype, got input float32, weight float64"),
    "bias_dtype": ((x48, w58, b5.double()), "one dtype, got input float32, weight float32, bias float64"),
    "int_input": ((x48.long(), w58), "one dtype, got input int64, weight float32"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_have_torchs_type_and_name_the_argument(case, grad):
    args, message = ERRORS[case]
    with torch.set_grad_enabled(grad):
        with pytest.raises((TypeError, RuntimeError)) as theirs:
            F.linear(*args)
        with pytest.raises(theirs.type, match=f"^fastdl.linear: .*{message}"):
            linear(*args)


@pytest.mark.parametrize("on_meta", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_meta_mixed_with_cpu_is_an_error(on_meta):
    """torch returns a meta tensor for some of these mixtures, and reads a null pointer for others."""
    args = [t.to("meta") if meta else t for t, meta in zip((x48, w58, b5), on_meta, strict=True)]
    with pytest.raises(RuntimeError, match="expected all tensors on one device, got input on"):
        linear(*args)


def test_freed_storage_is_an_error():
    w = torch.ones(5, 8)
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"argument 'weight': expected a tensor with memory"):
        linear(x48, w)
