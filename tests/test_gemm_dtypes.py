"""bfloat16 and float16: conversions bit by bit, one rounding to nearest even, the same bits at any thread count."""

import pytest
import torch

from conftest import DTYPES, b_for, every_dtype
from fastdl import _C, testing

SMALL = {"bfloat16": torch.bfloat16, "float16": torch.float16}
in_16_bits = pytest.mark.rows(dtype=tuple(SMALL))


def flushes(kernel):
    """vdpbf16ps and tdpbf16ps take subnormal operands for zeros and make zeros of subnormal results."""
    return kernel["isa"] in ("avx512bf16", "amx") and kernel["dtype"] == "bfloat16"


def every_value(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_values(out, expected):
    """Equal bits apart from the payload of NaN and the sign of zero."""
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    wrong = (out != expected) & numbers
    assert not bool(wrong.any()), (out[wrong][:5], expected[wrong][:5])
    nonzero = numbers & (expected != 0)
    assert torch.equal(out[nonzero].view(torch.int16), expected[nonzero].view(torch.int16))


# --- conversions ------------------------------------------------------------------------------------------------------
@in_16_bits
@pytest.mark.parametrize("side", ["a", "b", "bias", "out"])
def test_every_bit_pattern_survives_a_product_with_one(kernel, side):
    """Widened exactly and narrowed back: as an operand (times 1), as the bias and as what is accumulated into."""
    dtype = DTYPES[kernel["dtype"]]
    values = every_value(dtype).view(256, 256)
    ones, zeros = torch.ones(256, 1, dtype=dtype), torch.zeros(256, 1, dtype=dtype)
    rows = []
    for row in values:
        out = torch.zeros(3, 256, dtype=dtype)
        if side == "a":  # K = 1: a column of values times a row of ones
            out = torch.empty(256, 3, dtype=dtype)
            _C.gemm(out, row.unsqueeze(1), b_for(kernel, ones[:3].t()), kernel=kernel["name"])
            out = out.t()
        elif side == "b":
            _C.gemm(out, ones[:3], b_for(kernel, row.unsqueeze(0)), kernel=kernel["name"])
        elif side == "bias":
            _C.gemm(out, ones[:3], b_for(kernel, zeros.t()), row, kernel=kernel["name"])
        else:
            out.copy_(row)
            _C.gemm(out, ones[:3], b_for(kernel, zeros.t()), None, True, kernel=kernel["name"])
        rows.append(out)
    expected = values.clone()
    if flushes(kernel) and side in ("a", "b"):
        expected[expected.abs() < torch.finfo(dtype).smallest_normal] = 0
    for i in range(3):
        assert_same_values(torch.stack([out[i] for out in rows]), expected)


@pytest.mark.rows(dtype=tuple(SMALL), kind="tile")
def test_every_bit_pattern_survives_a_pack(kernel):
    """Through a frozen pack, in both storage orders of the weight."""
    dtype = DTYPES[kernel["dtype"]]
    values = every_value(dtype).view(256, 256)  # [N, K]: a row of the identity picks a column
    finite = torch.where(values.isfinite(), values, torch.ones_like(values))
    expected = finite.clone()
    if flushes(kernel):
        expected[expected.abs() < torch.finfo(dtype).smallest_normal] = 0
    identity = torch.eye(256, dtype=dtype)
    for weight in (finite, finite.t().contiguous().t()):
        pack = torch.empty(_C.pack_numel(256, 256, kernel["name"]))
        _C.pack(pack, weight.t(), kernel["name"])
        out = torch.empty(256, 256, dtype=dtype)
        _C.linear_packed(out, identity, pack, None, 256, kernel["name"])
        assert_same_values(out, expected.t())


def neighbours(dtype):
    """Pairs (x, y) of `dtype` whose exact sum lies on, or just beside, the middle of two numbers of the dtype."""
    eps = torch.finfo(dtype).eps  # spacing of the numbers in [1, 2)
    steps = torch.arange(64, dtype=torch.float64) * eps + 1
    halves = torch.tensor([0, 0.25, 0.5, 0.75, 0.5 + 2**-6, 0.5 - 2**-6, -0.5, -0.25], dtype=torch.float64) * eps
    scales = torch.exp2(torch.tensor([-6.0, 0, 1, 12], dtype=torch.float64))
    x = steps.view(-1, 1, 1) * scales.view(1, 1, -1) * torch.ones(1, 8, 1, dtype=torch.float64)
    y = halves.view(1, -1, 1) * scales.view(1, 1, -1) * torch.ones(64, 1, 1, dtype=torch.float64)
    x, y = (torch.cat([t.flatten(), -t.flatten()]) for t in (x, y))
    return x, y


@in_16_bits
def test_results_are_rounded_to_nearest_even(kernel):
    """Sums of two products that lie on and around the middle of neighbours, of both signs."""
    dtype = DTYPES[kernel["dtype"]]
    x, y = neighbours(dtype)
    a = torch.stack([x, y], 1).to(dtype)
    assert torch.equal(a.double(), torch.stack([x, y], 1)), "the operands themselves must not round"
    out = torch.empty(len(x), 3, dtype=dtype)
    _C.gemm(out, a, b_for(kernel, torch.ones(2, 3, dtype=dtype)), kernel=kernel["name"])
    expected = (x + y).to(dtype)
    assert_same_values(out, expected.unsqueeze(1).expand(-1, 3))
    assert int((expected.double() != x + y).sum()) > 500  # there was something to round


@in_16_bits
def test_results_near_the_ends_of_the_range(kernel):
    """Around overflow and, where nothing flushes, into the subnormals: what rounding the exact product gives."""
    dtype = DTYPES[kernel["dtype"]]
    info = torch.finfo(dtype)
    power = torch.exp2(torch.arange(-4.0, 4.0, dtype=torch.float64))
    fractions = 1 + torch.arange(0, 1, 2**-6, dtype=torch.float64)
    large = (info.max / 64 * fractions).to(dtype)
    small = (info.smallest_normal * fractions).to(dtype)
    factors = [("large", large, (64 * power).to(dtype)), ("small", small, (power / 8).to(dtype))]
    for name, values, scale in factors:
        if name == "small" and flushes(kernel):
            scale = scale[scale >= 1]
            if not len(scale):
                continue
        out = torch.empty(len(values), len(scale), dtype=dtype)
        _C.gemm(out, values.unsqueeze(1), b_for(kernel, scale.unsqueeze(0)), kernel=kernel["name"])
        product = values.double().unsqueeze(1) * scale.double()
        assert_same_values(out, product.float().to(dtype))


@pytest.mark.rows(dtype="bfloat16")
def test_sums_are_float32(kernel):
    """256 + 1 + ... + 1 stays at 256 when a sum is kept in bfloat16."""
    a, b = torch.ones(5, 1025, dtype=torch.bfloat16), torch.ones(1025, 40, dtype=torch.bfloat16)
    a[:, 0] = 256
    out = torch.empty(5, 40, dtype=torch.bfloat16)
    _C.gemm(out, a, b_for(kernel, b), kernel=kernel["name"])
    assert bool((out == 1280).all())
    out.fill_(256)
    bias = torch.full((40,), 256, dtype=torch.bfloat16)
    _C.gemm(out, a[:, 1:6], b_for(kernel, b[1:6]), bias, True, kernel=kernel["name"])
    assert bool((out == 516).all())  # 517, rounded once; 512 + 5 in steps of bfloat16 is 512


# --- gradients --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("lead", [(300,), (7, 40), (3, 20, 5)], ids=str)
def test_wgrad_rounds_once(small, lead, generator):
    """Leading dimensions that do not merge are summed in float32, in one call."""
    dtype = SMALL[small]
    for merge in (True, False):
        grad, x = (torch.randn(*lead, n, generator=generator).to(dtype) for n in (33, 47))
        if not merge and len(lead) > 1:
            grad, x = grad.transpose(0, len(lead) - 1), x.transpose(0, len(lead) - 1)
        results = []
        for threads in (1, 2, 3):
            out = torch.empty(33, 47, dtype=dtype)
            _C.linear_wgrad(out, grad, x, threads=threads)
            results.append(out)
        rows = grad.reshape(-1, 33), x.reshape(-1, 47)
        testing.assert_gemm_close(results[0], rows[0].t(), rows[1])
        assert all(torch.equal(results[0], other) for other in results[1:])


# --- one dtype for all ------------------------------------------------------------------------------------------------
@every_dtype
@pytest.mark.parametrize("argument", ["a", "b", "bias", "out"])
def test_mixed_dtypes_are_errors(dtype, argument):
    args = {name: torch.zeros(s, dtype=dtype) for name, s in {"out": (3, 5), "a": (3, 4), "b": (4, 5)}.items()}
    args["bias"] = torch.zeros(5, dtype=dtype)
    for other in DTYPES.values():
        if other != dtype:
            with pytest.raises(RuntimeError, match=r"gemm: argument '\w+': expected \w+, .*got \w+"):
                _C.gemm(**{**args, argument: args[argument].to(other)})


def test_kernel_of_another_dtype_is_an_error(kernel):
    for name, dtype in DTYPES.items():
        if name != kernel["dtype"]:
            x = torch.ones(4, 4, dtype=dtype)
            with pytest.raises(RuntimeError, match=rf"{kernel['name']}.*expected.*got"):
                _C.linear(torch.empty(4, 4, dtype=dtype), x, x, kernel=kernel["name"])
