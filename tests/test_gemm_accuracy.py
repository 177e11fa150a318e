"""Bound and quality tier: every kernel against float64, and against torch's own error (design, section 7)."""

import pytest
import torch

from conftest import DTYPES, b_for, every_dtype
from fastdl import _C, testing


def widely_scaled_rows(shape, generator, dtype=torch.float32):
    """Rows from 2^-30 to 2^30, float16 2^-2 to 2^2: a large row's error must not leak into a small one."""
    scale = torch.linspace(-1, 1, shape[0]) * (2 if dtype == torch.float16 else 30)
    return (torch.randn(shape, generator=generator) * torch.exp2(scale).unsqueeze(1)).to(dtype)


def all_positive(shape, generator, dtype=torch.float32):
    """S = C: errors of one sign pile up, the worst case for a long sum kept in one accumulator."""
    return torch.rand(shape, generator=generator).to(dtype)


def normal(shape, generator, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


def cancelling(shape, generator, dtype=torch.float32):
    """Values near 1 whose sign alternates along K in half of the rows: sums near 0 of terms near 1, and near K."""
    x = 1 + 1e-3 * torch.randn(shape, generator=generator)
    x[::2, 1::2] *= -1
    return x.to(dtype)


@pytest.mark.parametrize("K", [1, 5, 64, 1000, 4096, 16384])
@pytest.mark.parametrize("data", [normal, all_positive, widely_scaled_rows, cancelling])
def test_against_float64_and_torch(kernel, data, K, generator):
    M, N, dtype = 70, 100, DTYPES[kernel["dtype"]]
    a, bt = data((M, K), generator, dtype), data((N, K), generator, dtype)
    for bias in (None, normal((N,), generator, dtype)):
        out = torch.empty(M, N, dtype=dtype)
        _C.linear(out, a, bt, bias, kernel=kernel["name"])
        # Against the product plus the bias: on some processors torch's linear starts from the bias, and so rounds a
        # product of K = 1 not at all.
        testing.assert_gemm_close(out, a, bt.t(), bias, precision=kernel["precision"])


def test_accumulate(kernel, generator):
    dtype = DTYPES[kernel["dtype"]]
    a, b, before, bias = (normal(shape, generator, dtype) for shape in ((70, 600), (600, 100), (70, 100), (100,)))
    b = b_for(kernel, b)
    out = before.clone()
    _C.gemm(out, a, b, bias, True, kernel=kernel["name"])
    testing.assert_gemm_close(out, a, b, bias, initial=before, precision=kernel["precision"])


@pytest.mark.skipif(
    _C.cpu_info()["isa_cap"] != "", reason="FASTDL_ISA caps fastdl, but not the torch it is compared to"
)
@every_dtype
@pytest.mark.parametrize("data", [normal, all_positive])
@pytest.mark.parametrize("M", [1, 2, 5, 40, 128])
def test_default_kernel(M, data, dtype, generator):
    """No kernel forced: what users get, on the shapes where the plan takes different paths."""
    for N, K in ((300, 4000), (1000, 10), (3000, 1024), (1024, 300), (500, 16384)):
        x, weight = data((M, K), generator, dtype), data((N, K), generator, dtype)
        out = torch.empty(M, N, dtype=dtype)
        _C.linear(out, x, weight)
        testing.assert_gemm_close(out, x, weight.t())
        b = weight.t().contiguous()
        _C.gemm(out, x, b)
        testing.assert_gemm_close(out, x, b)


@pytest.mark.rows(kind="tile")
def test_packed_agrees_with_unpacked(kernel, generator):
    """A frozen weight changes speed, not bits."""
    dtype = DTYPES[kernel["dtype"]]
    x, weight = normal((70, 1500), generator, dtype), normal((100, 1500), generator, dtype)
    pack = torch.empty(_C.pack_numel(1500, 100, kernel["name"]))
    _C.pack(pack, weight.t(), kernel["name"])
    frozen, plain = torch.empty(70, 100, dtype=dtype), torch.empty(70, 100, dtype=dtype)
    _C.linear_packed(frozen, x, pack, None, 100, kernel["name"])
    _C.linear(plain, x, weight, kernel=kernel["name"])
    testing.assert_gemm_close(frozen, x, weight.t(), precision=kernel["precision"])
    assert torch.equal(frozen, plain)


@every_dtype
@pytest.mark.parametrize("rows", [1, 100, 20000])
def test_sum_rows(rows, dtype, generator):
    for data in (normal, all_positive):
        x = data((rows, 300), generator, dtype)
        out = torch.empty(300, dtype=dtype)
        _C.sum_rows(out, x)
        ones = torch.ones(1, rows, dtype=dtype)
        testing.assert_gemm_close(out.unsqueeze(0), ones, x, torch_result=x.sum(0, keepdim=True))
