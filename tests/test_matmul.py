"""fastdl.functional.matmul: torch.matmul's shapes and broadcasting, gradients, hand-backs and errors."""

import pytest
import torch

from fastdl.functional import matmul
from fastdl.ops import calls, gemm, route
from fastdl.testing import LAYOUTS, assert_gemm_close, broadcast_batches, integer_matrix

SHAPES = [((4,), (4,)), ((4,), (4, 3)), ((2, 4), (4,)), ((5, 2, 4), (4,)), ((4,), (5, 4, 3)), ((2, 4), (4, 3))] + [
    ((*a, 2, 4), (*b, 4, 3)) for a, b in broadcast_batches()
]
DEPTH = 64  # the longest sum


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()


def through_op(input, other):
    return torch.ops.fastdl.matmul(input, other)


def through_general(input, other):
    return route.call(gemm._MATMUL, input, other)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def integers(shape, generator, dtype=torch.float32):
    """Small integers: every sum below is exact, so results must match bit for bit."""
    return integer_matrix(shape, DEPTH, generator, dtype)


def assert_same(actual, expected, dtype=torch.float32):
    """Bit for bit what the float64 expectation, being exact, rounds to."""
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.detach(), expected.detach().to(dtype), rtol=0, atol=0)


def assert_gradients(c, a, b, dc):
    """c = matmul(a, b) and its gradients against torch in float64."""
    a64, b64 = (t.detach().double().requires_grad_() for t in (a, b))
    c64 = torch.matmul(a64, b64)
    assert_same(c, c64, a.dtype)
    ours = torch.autograd.grad(c, (a, b), dc)
    for grad, expected in zip(ours, torch.autograd.grad(c64, (a64, b64), dc.double()), strict=True):
        assert_same(grad, expected, a.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [matmul, through_op, through_general], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_values(way, a_shape, b_shape, dtype, generator):
    a, b = integers(a_shape, generator, dtype), integers(b_shape, generator, dtype)
    assert_same(way(a, b), torch.matmul(a.double(), b.double()), dtype)
    assert not calls.handbacks


def test_rounding_is_no_worse_than_torchs(generator):
    a, b = torch.randn(2, 64, 300, generator=generator), torch.randn(2, 300, 96, generator=generator)
    assert_gemm_close(matmul(a, b), a, b)


@pytest.mark.parametrize("way", [matmul, through_general], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_gradients(way, a_shape, b_shape, generator):
    a, b = (integers(shape, generator).requires_grad_() for shape in (a_shape, b_shape))
    c = way(a, b)
    assert_gradients(c, a, b, integers(c.shape, generator))
    assert not calls.handbacks


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("a_shape", "b_shape"), [((2, 4), (4, 3)), ((5, 2, 4), (4, 3)), ((5, 2, 4), (5, 4, 3))])
def test_gradients_of_half_dtypes(a_shape, b_shape, dtype, generator):
    """Shapes whose gradients are one product each; where a batch was broadcast, torch's own sum rounds once more."""
    a, b = (integers(shape, generator, dtype).requires_grad_() for shape in (a_shape, b_shape))
    assert_gradients(matmul(a, b), a, b, integers((*a_shape[:-1], 3), generator, dtype))
    assert not calls.handbacks


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["input", "other"])
@pytest.mark.parametrize(("a_shape", "b_shape"), [((4,), (4,)), ((2, 4), (4, 3)), ((5, 2, 4), (4, 3))])
def test_only_the_needed_gradient_and_saved_tensor(needed, a_shape, b_shape):
    leaves = [torch.randn(s).requires_grad_(need) for s, need in zip((a_shape, b_shape), needed, strict=True)]
    c = matmul(*leaves)
    assert [t is None for t in c.grad_fn.saved_tensors] == list(needed)
    c.sum().backward()
    assert tuple(t.grad is not None for t in leaves) == needed


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_layouts(a_layout, b_layout, generator):
    a = LAYOUTS[a_layout](integers((2, 5, 7), generator)).requires_grad_()
    b = LAYOUTS[b_layout](integers((2, 7, 4), generator)).requires_grad_()
    assert_gradients(matmul(a, b), a, b, integers((2, 5, 4), generator))


def test_a_weight_shared_by_the_batch_sums_over_it(generator):
    a = integers((3, 1, 5, 6), generator).expand(3, 2, 5, 6).requires_grad_()
    b = integers((6, 4), generator).requires_grad_()
    assert_gradients(matmul(a, b), a, b, integers((3, 2, 5, 4), generator))


HANDED_BACK = {
    "int": ((torch.ones(2, 3).long(), torch.ones(3, 2).long()), "dtype int64"),
    "sparse": ((torch.eye(3).to_sparse(), torch.ones(3, 2)), "input is sparse_coo"),
    "meta": ((torch.ones(2, 3, device="meta"), torch.ones(3, 2, device="meta")), "input is on meta"),
    "many_dims": ((torch.ones(*[1] * 9, 2, 3), torch.ones(3, 2)), "more than 8 batch dimensions"),
}


@pytest.mark.parametrize("kind", HANDED_BACK)
def test_handed_back_with_a_reason(kind):
    args, reason = HANDED_BACK[kind]
    c, expected = matmul(*args), torch.matmul(*args)
    assert (c.dtype, c.device, c.shape) == (expected.dtype, expected.device, expected.shape)
    assert c.is_meta or torch.equal(c, expected)
    assert dict(calls.handbacks) == {("matmul", reason): 1}


a24, b43 = torch.ones(2, 4), torch.ones(4, 3)
ERRORS = {
    "list": (([1.0], b43), "argument 'input': expected a torch.Tensor, got list"),
    "float": ((a24, 1.0), "argument 'other': expected a torch.Tensor, got float"),
    "scalar_input": ((torch.tensor(1.0), b43), "argument 'input': expected at least 1 dimension"),
    "scalar_other": ((a24, torch.tensor(1.0)), "argument 'other': expected at least 1 dimension"),
    "k_mismatch": ((a24, torch.ones(5, 3)), r"'input': expected \[..., 5\] .* got shape \[2, 4\]"),
    "vector_mismatch": ((torch.ones(4), torch.ones(5)), r"'input': expected \[..., 5\] .* got shape \[4\]"),
    "batch": ((torch.ones(2, 2, 4), torch.ones(3, 4, 3)), "argument 'other': expected a batch that broadcasts"),
    "dtype": ((a24, b43.double()), "one dtype, got input float32, other float64"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_have_torchs_type_and_name_the_argument(case):
    args, message = ERRORS[case]
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        torch.matmul(*args)
    with pytest.raises(theirs.type, match=f"^fastdl.matmul: .*{message}"):
        matmul(*args)


def test_meta_mixed_with_cpu_is_an_error():
    with pytest.raises(RuntimeError, match="expected all tensors on one device, got input on meta, other on cpu"):
        matmul(a24.to("meta"), b43)
