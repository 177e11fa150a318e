"""fastdl.testing itself: the checks that the other tests lean on must fail on what they are there to catch."""

import math

import pytest
import torch

from fastdl import testing


def operands(generator, M=40, N=48, K=100):
    return torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)


def test_correct_product_passes(generator):
    a, b = operands(generator)
    bias = torch.randn(48, generator=generator)
    measures = testing.assert_gemm_close(a @ b + bias, a, b, bias)
    assert 0 < measures.rms <= measures.rms_per_row_max <= measures.max < 2**-20


def test_bound_is_violated_by_one_dropped_term(generator):
    a, b = operands(generator)
    wrong = a @ b
    wrong[3, 5] -= a[3, 99] * b[99, 5]
    with pytest.raises(AssertionError, match=r"1 of 1920 elements beyond the bound, first at \(3, 5\)"):
        testing.assert_gemm_close(wrong, a, b)


def test_quality_is_violated_within_the_bound(generator):
    a, b = operands(generator)
    reference = testing.gemm_reference(a, b)
    noisy = (reference.expected + 2**-22 * reference.scale).float()  # 8 times torch's rms, a fifteenth of the bound
    testing.assert_within_bound(noisy, reference)
    with pytest.raises(AssertionError, match=r"rms\(err/S\)"):
        testing.assert_gemm_close(noisy, a, b)


def test_low_precision_is_checked_row_by_row(generator):
    a, b = (t.bfloat16() for t in operands(generator, M=64, N=64))
    good = (a.double() @ b.double()).bfloat16()
    testing.assert_gemm_close(good, a, b)
    one_bad_row = good.clone()
    one_bad_row[7] = (good[7].double() * (1 + 2**-7)).bfloat16()
    with pytest.raises(AssertionError, match=r"row 7|beyond the bound"):
        testing.assert_gemm_close(one_bad_row, a, b)


@pytest.mark.parametrize("wrong", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("right", [0.0, math.inf, -math.inf, math.nan])
def test_special_values_must_match_in_place_and_sign(wrong, right):
    expected = torch.tensor([[1.0, right]], dtype=torch.float64)
    testing.assert_special_values(torch.tensor([[1.0, right]]), expected)
    if str(wrong) != str(right):
        with pytest.raises(AssertionError, match=r"first at \(0, 1\)"):
            testing.assert_special_values(torch.tensor([[1.0, wrong]]), expected)


def test_error_where_the_scale_is_zero_is_infinite():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert testing.error_measures(torch.tensor([[0.0, 1e-30]]), zero, zero).max == math.inf
    assert testing.error_measures(torch.zeros(1, 2), zero, zero).max == 0
    assert testing.error_measures(torch.zeros(0, 2), zero[:0], zero[:0]).max == 0


@pytest.mark.parametrize("K", [1, 100, 2**15, 2**23])
def test_integer_matrix_sums_fit_float32(K, generator):
    x = testing.integer_matrix((50, 50), K, generator)
    assert x.dtype == torch.float32 and bool((x != 0).all()) and bool((x == x.round()).all())
    assert K * x.abs().max().item() ** 2 <= 2**23
    with pytest.raises(ValueError, match="do not fit"):
        testing.integer_matrix((1, 1), 2**23 + 1)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_keep_shape_and_values(layout, generator):
    for shape in ((5, 7), (2, 3, 1), (2, 2, 4, 3)):
        x = testing.integer_matrix(shape, 1, generator)
        y = testing.LAYOUTS[layout](x)
        assert y.shape == x.shape and not y.isnan().any()
        if "expanded" not in layout and layout != "overlapping":
            assert torch.equal(x, y)


def test_guarded_output_reports_stray_writes():
    out = testing.GuardedOutput((2, 3, 4))
    assert out.view.isnan().all() and out.view.stride() == (27, 9, 1)
    out.view.zero_()
    out.assert_guards_intact()
    out.view.as_strided((1,), (1,), out.view.storage_offset() + 4).zero_()  # one element past the first row
    with pytest.raises(AssertionError, match="1 elements outside the output were written, first 4 elements"):
        out.assert_guards_intact()


def test_tails():
    assert testing.tails(14) == [1, 13, 14, 15, 27, 29]
    assert testing.tails(1) == [1, 2, 3]
