"""Plans of the CUDA side's GEMM: pure, so that any of its modules makes them for any GPU, without one."""

import pytest
import torch

from fastdl.ops import cuda

MODULE = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
if MODULE is None:
    pytest.skip("built without CUDA kernels and without FASTDL_TWIN", allow_module_level=True)
ROWS = MODULE.kernels("gemm")


def plan(M, N, K, dtype=torch.bfloat16, batch=(), gpu="sm80", linear=False, **options):
    """linear: b is a weight [N, K], transposed."""
    a, b, w, out = (torch.empty(*batch, *s, dtype=dtype, device="meta") for s in ((M, K), (K, N), (N, K), (M, N)))
    return MODULE.gemm_plan(a, w.mT if linear else b, out, gpu=gpu, **options)


@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
def test_plans(gpu):
    large = plan(4096, 4096, 4096, gpu=gpu)
    assert large["kernel"] == "gemm_bf16_128x128_sm80" and large["splits"] == 1 and large["workspace_bytes"] == 0
    skinny = plan(8, 4096, 14336, gpu=gpu)
    assert skinny["kernel"] == "gemm_bf16_16x64_sm80" and skinny["splits"] > 1
    assert skinny["workspace_bytes"] == skinny["splits"] * 8 * 4096 * 4
    deep = plan(256, 256, 65536, gpu=gpu)  # a weight gradient: few tiles, much K
    assert deep["splits"] > 4
    assert plan(64, 64, 64, gpu=gpu)["splits"] == 1
    assert plan(4096, 4096, 4096, torch.float32, gpu=gpu)["kernel"] == "gemm_f32_split_128x128_sm80"
    assert plan(4096, 4096, 4096, torch.float32, gpu=gpu, precision="tf32")["kernel"] == "gemm_f32_high_128x128_sm80"
    assert plan(4096, 4096, 4096, torch.float32, gpu=gpu, precision="bf16")["kernel"] == "gemm_f32_medium_128x128_sm80"
    assert "fma" in plan(4096, 4096, 4096, torch.float32, gpu=gpu, precision="fma")["kernel"]
    few = plan(4, 4096, 4096, torch.float32, gpu=gpu)
    assert few["kernel"] == "gemm_f32_split_32x64_sm80" and few["splits"] > 1
    assert "gemm bf16 batch=1 M=8 N=4096 K=14336" in skinny["text"]


@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plans_of_few_rows(gpu, dtype):
    """Few rows of a linear layer, or few columns, take the kernels that read the weight once; enough blocks to ask for
    all of memory; the time is that of the bytes."""
    name, item = {torch.float32: ("f32", 4), torch.bfloat16: ("bf16", 2), torch.float16: ("f16", 2)}[dtype]
    bandwidth = {"sm80": 10 * 108, "sm90": 18 * 132}[gpu] * 1400  # bytes a microsecond
    for M, row in ((1, "2x4"), (2, "2x4"), (4, "8x4")):
        p = plan(M, 4096, 14336, dtype, gpu=gpu, linear=True)
        assert p["kernel"] == f"gemm_{name}_dot_{row}_sm80" and p["splits"] == 1, (M, p["text"])
        least = 4096 * 14336 * item / bandwidth
        assert least < p["microseconds"] < 1.5 * least + 6, (M, p["text"])
        assert plan(4096, M, 14336, dtype, gpu=gpu, linear=True)["kernel"] == p["kernel"]
    assert plan(1, 64, 65536, dtype, gpu=gpu, linear=True)["splits"] > 1  # few lines, much K
    assert "dot" not in plan(9, 9, 32, dtype, gpu=gpu, linear=True)["kernel"]  # more than are taken at a time
    other = plan(1, 4096, 4096, dtype, gpu=gpu)
    assert "dot" not in other["kernel"] and "not contiguous along K" in other["why"]
    assert "contiguous" not in plan(99, 4096, 4096, dtype, gpu=gpu)["why"]
    assert "dot" in plan(1, 4096, 4096, dtype, gpu=gpu, linear=True, batch=(3,))["kernel"]


def test_every_k_is_in_one_split():
    for kernel, depth in (("gemm_bf16_128x128_sm80", 32), ("gemm_bf16_dot_2x4_sm80", 1024)):
        for K in (1, depth - 1, depth, depth + 1, 31 * depth + 5, 128 * depth + 1):
            for splits in (1, 2, 5, 32):
                p = plan(16, 16, K, linear=True, splits=splits, kernel=kernel)
                assert (p["splits"] - 1) * p["split_depth"] < K <= p["splits"] * p["split_depth"], (K, splits)
                assert p["split_depth"] % depth == 0


def test_plan_of_nothing_and_of_strangers():
    assert plan(0, 5, 3)["blocks"] == 0 and plan(5, 5, 0)["splits"] == 1
    with pytest.raises(RuntimeError, match=r"argument 'kernel': expected one of .*gemm_bf16_128x128_sm80"):
        plan(5, 5, 5, kernel="gemm")
    with pytest.raises(RuntimeError, match="expected f32 operands, got bf16"):
        plan(5, 5, 5, kernel="gemm_f32_fma_64x64_sm80")
    with pytest.raises(RuntimeError, match="no GPU named"):
        plan(5, 5, 5, gpu="sm70")
    with pytest.raises(RuntimeError, match="argument 'precision': expected fma, ieee, tf32 or bf16, got 'high'"):
        plan(5, 5, 5, precision="high")
    with pytest.raises(RuntimeError, match="expected one of attention, conv, gemm, rnn"):
        MODULE.kernels("conv3")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_shared_memory_fits_a_multiprocessor(row):
    assert row["shared_bytes"] <= 99 << 10  # what a block may have on sm_86 and sm_89, the least of all
