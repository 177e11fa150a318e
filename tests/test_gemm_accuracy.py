"""Bound and quality tier: every kernel against float64, and against torch's own error (design, section 7)."""

import pytest
import torch

from conftest import b_for
from fastdl import _C, testing


def widely_scaled_rows(shape, generator):
    """Rows from 2^-30 to 2^30: a large row's error must not leak into a small one."""
    return torch.randn(shape, generator=generator) * torch.exp2(torch.linspace(-30, 30, shape[0])).unsqueeze(1)


def all_positive(shape, generator):
    """S = C: errors of one sign pile up, the worst case for a long sum kept in one accumulator."""
    return torch.rand(shape, generator=generator)


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def cancelling(shape, generator):
    """Values near 1 whose sign alternates along K in half of the rows: sums near 0 of terms near 1, and near K."""
    x = 1 + 1e-3 * torch.randn(shape, generator=generator)
    x[::2, 1::2] *= -1
    return x


@pytest.mark.parametrize("K", [1, 5, 64, 1000, 4096, 16384])
@pytest.mark.parametrize("data", [normal, all_positive, widely_scaled_rows, cancelling])
def test_against_float64_and_torch(kernel, data, K, generator):
    M, N = 70, 100
    a, bt = data((M, K), generator), data((N, K), generator)
    for bias in (None, torch.randn(N, generator=generator)):
        out = torch.empty(M, N)
        _C.linear(out, a, bt, bias, kernel=kernel["name"])
        testing.assert_gemm_close(out, a, bt.t(), bias)


def test_accumulate(kernel, generator):
    a, b = torch.randn(70, 600, generator=generator), b_for(kernel, torch.randn(600, 100, generator=generator))
    before, bias = torch.randn(70, 100, generator=generator), torch.randn(100, generator=generator)
    out = before.clone()
    _C.gemm(out, a, b, bias, True, kernel=kernel["name"])
    testing.assert_gemm_close(out, a, b, bias, initial=before)


@pytest.mark.skipif(
    _C.cpu_info()["isa_cap"] != "", reason="FASTDL_ISA caps fastdl, but not the torch it is compared to"
)
@pytest.mark.parametrize("data", [normal, all_positive])
@pytest.mark.parametrize("M", [1, 2, 5, 40, 128])
def test_default_kernel(M, data, generator):
    """No kernel forced: what users get, on the shapes where the plan takes different paths."""
    for N, K in ((300, 4000), (1000, 10), (3000, 1024), (1024, 300), (500, 16384)):
        x, weight = data((M, K), generator), data((N, K), generator)
        out = torch.empty(M, N)
        _C.linear(out, x, weight)
        testing.assert_gemm_close(out, x, weight.t())
        b = weight.t().contiguous()
        _C.gemm(out, x, b)
        testing.assert_gemm_close(out, x, b)


def test_packed_agrees_with_unpacked(kernel, generator):
    """A frozen weight changes speed, not bits."""
    if kernel["kind"] != "tile":
        pytest.skip("frozen packs are laid out for tile kernels")
    x, weight = torch.randn(70, 1500, generator=generator), torch.randn(100, 1500, generator=generator)
    pack = torch.empty(_C.pack_numel(1500, 100, kernel["name"]))
    _C.pack(pack, weight.t(), kernel["name"])
    frozen, plain = torch.empty(70, 100), torch.empty(70, 100)
    _C.linear_packed(frozen, x, pack, None, 100, kernel["name"])
    _C.linear(plain, x, weight, kernel=kernel["name"])
    testing.assert_gemm_close(frozen, x, weight.t())
    assert torch.equal(frozen, plain)


@pytest.mark.parametrize("rows", [1, 100, 20000])
def test_sum_rows(rows, generator):
    for x in (torch.randn(rows, 300, generator=generator), torch.rand(rows, 300, generator=generator)):
        out = torch.empty(300)
        _C.sum_rows(out, x)
        ones = torch.ones(1, rows)
        testing.assert_gemm_close(out.unsqueeze(0), ones, x, torch_result=x.sum(0, keepdim=True))
