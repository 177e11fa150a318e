"""The instructions of csrc/ptx one by one, as the PTX manual has them: on the twin, and on a GPU, which must agree."""

import pytest
import torch

pytestmark = pytest.mark.sanitized
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@dtypes
def test_fragments_of_mma_m16n8k16(gpu, dtype, generator):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": row and col of a_i, b_i, c_i of a lane."""
    A, B, C = (torch.randint(-9, 10, s, generator=generator).to(dtype) for s in ((16, 16), (16, 8), (16, 8)))
    a, b, d, expected = torch.empty(32, 8), torch.empty(32, 4), torch.empty(32, 4), torch.empty(32, 4)
    product = C.double() + A.double() @ B.double()
    for lane in range(32):
        group, of_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            a[lane, i] = A[row, of_group * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            b[lane, i] = B[of_group * 2 + (i & 1) + (8 if i >= 2 else 0), group]
        for i in range(4):
            row, col = group if i < 2 else group + 8, of_group * 2 + (i & 1)
            d[lane, i], expected[lane, i] = C[row, col], product[row, col]
    a, b, d = a.to(dtype).to(gpu.device), b.to(dtype).to(gpu.device), d.to(gpu.device)
    gpu.module.fragment_probe(a, b, d)
    assert torch.equal(d.cpu(), expected)


@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
def test_rows_of_ldmatrix(gpu, dtype, transposed):
    """PTX ISA, ldmatrix: of each 8x8 matrix lane l holds elements l % 4 * 2 and the next of row l / 4."""
    x = torch.arange(256.0).view(32, 8).to(dtype)
    out = torch.full((32, 8), -1.0, dtype=dtype, device=gpu.device)
    gpu.module.matrix_probe(x.to(gpu.device), out, transposed)
    matrices = x.view(4, 8, 8).mT if transposed else x.view(4, 8, 8)
    expected = matrices.reshape(4, 32, 2).transpose(0, 1).reshape(32, 8)  # [matrix, lane, 2]
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("n", [1, 8, 32])
def test_sums_over_a_warp(gpu, n, generator):
    x = torch.randint(-99, 100, (32, n), generator=generator).float()
    for _ in gpu.orders():
        out = torch.full((32,), float("nan"), device=gpu.device)
        gpu.module.sums_probe(x.to(gpu.device), out)
        assert torch.equal(out.cpu(), x.sum(0).repeat_interleave(32 // n))
