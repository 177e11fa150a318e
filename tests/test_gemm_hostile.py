"""Special values, empty and huge problems, flush-denormal state, and tensors that are more than plain data."""

import copy
import itertools
import math
import mmap
import pickle

import pytest
import torch

from conftest import DTYPES, assert_sums_of_products, b_for, exact_product, takes
from fastdl import _C, functional, testing
from fastdl.testing import LAYOUTS, integer_matrix

NAN, INF = math.nan, math.inf


# --- NaN, Inf, signed zeros -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("side", ["a", "b", "bias", "out"])
def test_special_value_surfaces_exactly_where_it_should(kernel, gemm, side, value, integers):
    mr, nr = kernel["mr"], kernel["nr"]
    M, N, K = 2 * mr + 1, nr + 3, 37
    for row, col in ((0, 0), (M - 1, N - 1), (mr, nr - 1)):
        a, b, bias, before = integers((M, K), K), integers((K, N), K), integers((N,), 1), integers((M, N), 1)
        {"a": a[row], "b": b[:, col], "bias": bias, "out": before[row]}[side][
            {"bias": col, "out": col}.get(side, K - 1)
        ] = value
        out = before.clone()
        gemm(out, a, b, bias, True)
        reference = testing.gemm_reference(a, b, bias, before)
        testing.assert_special_values(out, reference.expected)
        finite = reference.expected.isfinite()
        assert torch.equal(out[finite], reference.expected[finite].to(out.dtype))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_zero_times_special_is_nan(kernel, gemm, value, integers):
    """A zero operand, and the zero padding of a tile, must neither hide a NaN nor make one."""
    mr, nr = kernel["mr"], kernel["nr"]
    for M, N, K in ((1, 1, 1), (mr + 1, nr + 1, 5), (mr, nr, 8)):
        a, b = integers((M, K), K), integers((K, N), K)
        out = torch.empty(M, N, dtype=a.dtype)
        gemm(out, torch.full_like(a, value), torch.zeros_like(b))
        assert out.isnan().all(), (M, N, K)
        b.fill_(value)
        gemm(out, torch.zeros_like(a), b)
        assert out.isnan().all(), (M, N, K)
        gemm(out, torch.ones_like(a), b)
        assert torch.equal(out.nan_to_num(-7, -8, -9), b[:1].expand(M, N).nan_to_num(-7, -8, -9)), (M, N, K)


def test_opposite_infinities_are_nan(gemm, integers):
    a, b = integers((3, 10), 10).abs(), integers((10, 20), 10)
    b[2, 5], b[9, 5] = INF, -INF
    out = torch.empty(3, 20, dtype=a.dtype)
    gemm(out, a, b)
    assert out[:, 5].isnan().all() and int(out.isnan().sum()) == 3


def test_overflow_is_infinite_with_its_sign(kernel, gemm):
    dtype = DTYPES[kernel["dtype"]]
    large = torch.finfo(dtype).max / 2
    a = torch.full((3, 4), large, dtype=dtype)
    a[1] *= -1
    out = torch.empty(3, 20, dtype=dtype)
    gemm(out, a, torch.full((4, 20), large, dtype=dtype))
    assert torch.equal(out, torch.tensor([[INF], [-INF], [INF]], dtype=dtype).expand(3, 20))


def test_not_accumulating_ignores_what_out_held(gemm, integers):
    """beta = 0 means that out is not read: a NaN left in fresh memory must not survive."""
    a, b = integers((15, 1000), 1000), integers((1000, 40), 1000)
    for value in (NAN, INF):
        out = torch.full((15, 40), value, dtype=a.dtype)
        gemm(out, a, b)
        assert torch.equal(out, exact_product(a, b))


def test_signed_zeros(kernel, gemm):
    """A sum of nothing but -0 may come out as either zero; beside anything else a zero of either sign is nothing."""
    zeros, out, ones = (
        torch.full(shape, value, dtype=DTYPES[kernel["dtype"]])
        for shape, value in (((2, 3), -0.0), ((2, 20), NAN), ((3, 20), 1.0))
    )
    gemm(out, zeros, ones)
    assert bool((out == 0).all())
    gemm(out, zeros, ones, -ones[0])
    assert bool((out == -1).all())


# --- subnormals and flush-denormal ------------------------------------------------------------------------------------
@pytest.fixture
def flush_denormal():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    torch.set_flush_denormal(False)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def subnormal_problem(M=400, N=400):
    """Every product is 2^-140; ones on the other side keep it exact."""
    return torch.full((M, 2), 2.0**-70), torch.full((2, N), 2.0**-70)


@pytest.mark.rows(dtype="float32")
@pytest.mark.parametrize("threads", [1, 2])
def test_subnormals_are_kept_by_default(gemm, threads, generator):
    a, b = subnormal_problem()
    out = torch.empty(400, 400)
    gemm(out, a, b, threads=threads)
    assert bool((out == 2.0**-139).all())
    scale = 2.0**-130
    a, b = integer_matrix((30, 50), 50, generator) * scale, integer_matrix((50, 40), 50, generator)
    out = torch.empty(30, 40)
    gemm(out, a, b, threads=threads)
    assert torch.equal(out, (a.double() @ b.double()).float())


@pytest.mark.rows(dtype="float32")
@pytest.mark.parametrize("threads", [1, 2])
def test_flush_denormal_reaches_the_team_and_does_not_stay(gemm, threads, flush_denormal):
    a, b = subnormal_problem()
    out = torch.empty(400, 400)
    flush_denormal(True)
    gemm(out, a, b, threads=threads)
    flush_denormal(False)
    assert int((out != 0).sum()) == 0
    gemm(out, a, b, threads=threads)
    assert int((out == 2.0**-139).sum()) == out.numel()


@pytest.mark.rows(dtype="float32")
@pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])
def test_sums_around_the_smallest_normal_number(kernel, gemm, flush, flush_denormal, generator):
    """Products from 2^-146 to 2^-106: some vanish, some are subnormal, sums are often normal."""
    a = torch.randn(60, 90, generator=generator) * torch.exp2(torch.linspace(-83, -43, 90))
    b = torch.randn(90, 70, generator=generator) * 2.0**-63
    out = torch.empty(60, 70)
    flush_denormal(flush)
    gemm(out, a, b)
    flush_denormal(False)
    reference = testing.gemm_reference(a, b)
    testing.assert_within_bound(out, reference, flush_denormal=flush, precision=kernel["precision"])


def test_flush_denormal_does_not_leak_into_torch(flush_denormal):
    """torch's own loops run on the same team: its threads must get their state back."""
    tiny, half = torch.full((1 << 20,), 2.0**-126), torch.tensor(0.5)
    flush_denormal(True)
    _C.gemm(torch.empty(400, 400), *subnormal_problem(), threads=torch.get_num_threads())
    flush_denormal(False)
    assert int((tiny * half == 0).sum()) == 0


# --- empty and huge ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("M, N", [(5, 7), (1, 1), (40, 100)])
def test_k_zero(kernel, gemm, M, N):
    dtype = DTYPES[kernel["dtype"]]
    a, b, bias = torch.empty(M, 0, dtype=dtype), torch.empty(0, N, dtype=dtype), torch.arange(N).to(dtype)
    for given_bias, accumulate in itertools.product((None, bias), (False, True)):
        out = torch.full((M, N), 3.0 if accumulate else NAN, dtype=dtype)
        gemm(out, a, b, given_bias, accumulate)
        assert torch.equal(out, (torch.zeros_like(bias) if given_bias is None else bias).expand(M, N) + 3 * accumulate)
    out = torch.full((2, M, N), NAN, dtype=dtype)
    _C.linear(out, a.expand(2, M, 0), b.t(), bias, kernel=kernel["name"])
    assert torch.equal(out, bias.expand(2, M, N))


@pytest.mark.parametrize(
    "batch, M, N, K", [((), 0, 5, 3), ((), 5, 0, 3), ((), 0, 0, 0), ((0,), 4, 4, 4), ((2, 0), 1, 1, 0)]
)
def test_empty_output(gemm, integers, batch, M, N, K):
    out = torch.empty(*batch, M, N)
    gemm(integers((*batch, M, N), 1), integers((*batch, M, K), 1), integers((*batch, K, N), 1), integers((N,), 1))
    assert functional.matmul(torch.empty(*batch, M, K), torch.empty(*batch, K, N)).shape == out.shape
    assert functional.linear(torch.empty(*batch, M, K), torch.empty(N, K)).shape == out.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.linear(x, x),
        lambda x: functional.matmul(x, x.mT),
        lambda x: functional.matmul(x[None].expand(2**20, *x.shape), x.mT),
    ],
    ids=["linear", "matmul", "batched"],
)
def test_sizes_whose_product_overflows(call):
    """2^40 x 2^40 elements: an error from the allocation, as in torch; never a small buffer and a write behind it."""
    x = torch.ones(1, 1).expand(2**40, 1)
    with pytest.raises(RuntimeError):
        call(x)


def test_long_strides_are_64_bit(kernel, integers):
    """Offsets beyond 2^31 elements, in an address range of which only the ends are ever touched."""
    dtype = DTYPES[kernel["dtype"]]
    size = dtype.itemsize * (2**31 + 64)
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    far = torch.frombuffer(memory, dtype=dtype).as_strided((2, 3), (2**31, 1))
    far.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    rows, columns = integers((4, 3), 3), b_for(kernel, integers((3, 4), 3))
    pairs = [(far, columns), (rows, far.mT), (far[:, :2].mT, columns[:2]), (rows[:, :2], far[:, :2])]
    pairs = [(a, b) for a, b in pairs if takes(kernel, a, b)]
    assert len(pairs) >= 2
    for a, b in pairs:
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
        _C.gemm(out, a, b, kernel=kernel["name"])
        assert torch.equal(out, exact_product(a, b))


# --- tensors that are more than data ----------------------------------------------------------------------------------
def test_negative_bit_views():
    """.imag of a conjugate is a view that torch negates on reading: the sign must not be lost at the border."""
    x = torch.randn(5, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    plain = x.clone()
    weight = torch.randn(6, 6)
    assert torch.equal(functional.linear(x, weight), functional.linear(plain, weight))
    assert torch.equal(functional.linear(weight, x.mT[:, :].mT), functional.linear(weight, plain))
    assert torch.equal(functional.matmul(weight, x.mT), functional.matmul(weight, plain.mT))
    bias = torch.randn(5, dtype=torch.complex64).conj().imag
    assert torch.equal(functional.linear(weight, plain, bias), functional.linear(weight, plain, bias.clone()))


def test_in_place_change_between_forward_and_backward():
    for which in (0, 1):
        operands = [torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)]
        inputs = [t * 1 for t in operands]
        y = functional.linear(*inputs)
        with torch.no_grad():
            inputs[which].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_double_backward_agrees_with_torch():
    def second_derivatives(linear, args):
        leaves = [t.clone().requires_grad_() for t in args]
        grads = torch.autograd.grad(linear(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves)

    generator = torch.Generator().manual_seed(3)
    args = [torch.randn(s, generator=generator) for s in ((4, 5), (6, 5), (6,))]
    # y: 6; its square, thrice: 14; a gradient, 4 to 6 of it times an operand: 20; that of its square: 2 * 20 + 20.
    assert_sums_of_products(second_derivatives, functional.linear, torch.nn.functional.linear, args, roundings=60)


def test_inference_tensors(generator):
    with torch.inference_mode():
        x, w = torch.randn(4, 5, generator=generator), torch.randn(6, 5, generator=generator)
        y = functional.linear(x, w)
        assert y.is_inference()
    assert not y.requires_grad
    testing.assert_gemm_close(y.clone(), x.clone(), w.clone().t())


def test_results_are_ordinary_tensors():
    y = functional.linear(torch.randn(4, 5), torch.randn(6, 5))
    assert torch.equal(copy.deepcopy(y), y) and torch.equal(pickle.loads(pickle.dumps(y)), y)
    y.resize_(100)  # the storage is torch's own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_layout(layout, generator):
    """dgrad, wgrad and the bias gradient from an upstream gradient in any layout, exact."""
    x, w = (integer_matrix(s, 60, generator).requires_grad_() for s in ((2, 9, 17), (33, 17)))
    bias = integer_matrix((33,), 1, generator).requires_grad_()
    dy = LAYOUTS[layout](integer_matrix((2, 9, 33), 60, generator))
    dx, dw, db = torch.autograd.grad(functional.linear(x, w, bias), (x, w, bias), dy)
    dy64 = dy.double()
    assert torch.equal(dx, (dy64 @ w.detach().double()).float())
    assert torch.equal(dw, (dy64.flatten(0, 1).t() @ x.detach().double().flatten(0, 1)).float())
    assert torch.equal(db, dy64.sum((0, 1)).float())
