"""The tile product of the CUDA kernels, alone: one warp, every storage order, every dtype and number of parts."""

import pytest
import torch

twin = pytest.importorskip("fastdl._twin")

MODES = [(torch.bfloat16, "fma"), (torch.float16, "fma")] + [(torch.float32, p) for p in ("bf16", "tf32", "ieee")]


def run(a, b, a_transposed, b_transposed, precision):
    """(a @ b, peaks of a's rows, peaks of b's columns)"""
    out = torch.full((16 * 32 + 48,), float("nan"))
    x = a.t().contiguous() if a_transposed else a.contiguous()
    y = b.contiguous() if b_transposed else b.t().contiguous()
    twin.tile_probe(x, y, out, a_transposed, b_transposed, precision)
    return out[: 16 * 32].view(16, 32), out[16 * 32 : 16 * 33], out[16 * 33 :]


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("dtype, precision", MODES, ids=str)
def test_exact_on_integers_without_conflicts(dtype, precision, a_transposed, b_transposed, generator):
    a = torch.randint(-15, 16, (16, 32), generator=generator).to(dtype)
    b = torch.randint(-15, 16, (32, 32), generator=generator).to(dtype)
    twin.take_counts()
    for seed in (0, 1, 2):
        twin.set_seed(seed)
        c, rows, cols = run(a, b, a_transposed, b_transposed, precision)
        assert torch.equal(c.double(), a.double() @ b.double())
        if dtype == torch.float32:
            assert torch.equal(rows, a.abs().amax(1)) and torch.equal(cols, b.abs().amax(0))
    twin.set_seed(0)
    assert twin.take_counts()[0] == 0


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("precision, unit", [("bf16", 2.0**-7), ("tf32", 2.0**-15), ("ieee", 2.0**-22)])
def test_parts_of_float32(precision, unit, a_transposed, b_transposed, generator):
    a, b = (torch.randn(n, 32, generator=generator) for n in (16, 32))
    c, _, _ = run(a, b, a_transposed, b_transposed, precision)
    error = (c.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    assert unit / 1000 < error.max().item() < unit, error.max().item()


def test_three_parts_hold_a_float32(generator):
    """Against an identity the product is the operand, bit for bit."""
    a = torch.randn(16, 32, generator=generator) * 2.0 ** torch.randint(-40, 40, (16, 32), generator=generator)
    for transposed in (False, True):
        c, _, _ = run(a, torch.eye(32), transposed, transposed, "ieee")
        assert torch.equal(c, a)
