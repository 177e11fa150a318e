"""CUDA convolution in tests: the module, its rows, plans and calls into NaN, on the host twin or a GPU."""

import math

import pytest
import torch

from conv_reference import CONV, lay
from fastdl.ops import cuda

MODULE = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
needs_module = pytest.mark.skipif(MODULE is None, reason="neither the CUDA kernels nor their host twin are built")
ROWS = MODULE.kernels("conv") if MODULE else []
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "dgrad", "wgrad")


def rows(*kinds, every=False):
    """Of these kinds. Rows that cut float32 short are the code of the others: their own sums are in test_bounds."""
    short = () if every else ("tf32", "bf16")
    return [pytest.param(r, id=r["name"]) for r in ROWS if r["kind"] in kinds and r["precision"] not in short]


def plan(c, pass_, *, module=MODULE, last=True, kernel="", precision="ieee", gpu="sm80"):
    dtype = str(c.dtype).removeprefix("torch.")
    sizes = (tuple(c.x.shape), tuple(c.w.shape), tuple(c.dy.shape))
    options = {"dtype": dtype, "channels_last": last, "precision": precision, "gpu": gpu, "kernel": kernel}
    return module.conv_plan(pass_, *sizes, **c.options, **options)


def run(gpu, c, pass_, layout="channels_last", *, out_layout=None, kernel="", precision="ieee", bias=True, **epilogue):
    """forward or dgrad into NaN."""
    read, b, shape = c.operands(pass_)
    to = out_layout or layout
    p = plan(c, pass_, module=gpu.module, last=to == "channels_last", kernel=kernel, precision=precision, gpu="")
    out = lay(torch.full(shape, math.nan, dtype=c.dtype), to).to(gpu.device)
    function = gpu.module.conv if pass_ == "forward" else gpu.module.conv_dgrad
    operands = [lay(t, layout).to(gpu.device) for t in (read, c.w)]
    workspace = torch.full((p["workspace_bytes"],), 255, dtype=torch.uint8, device=gpu.device)
    options = {"precision": precision, "workspace": workspace, "kernel": kernel, **epilogue}
    function(out, *operands, b.to(gpu.device) if bias else None, **c.options, **options)
    return out.cpu()


def run_wgrad(gpu, c, layout="channels_last", *, kernel="", precision="ieee"):
    """(dw, dbias), into NaN."""
    p = plan(c, "wgrad", module=gpu.module, kernel=kernel, precision=precision, gpu="")
    dw = lay(torch.full(c.w.shape, math.nan, dtype=c.dtype), layout).to(gpu.device)
    db = torch.full((c.K,), math.nan, dtype=c.dtype, device=gpu.device)
    workspace = torch.full((p["workspace_bytes"],), 255, dtype=torch.uint8, device=gpu.device)
    options = {"precision": precision, "workspace": workspace, "kernel": kernel}
    dy, x = (lay(t, layout).to(gpu.device) for t in (c.dy, c.x))
    gpu.module.conv_wgrad(dw, dy, x, **c.options, dbias=db, **options)
    return dw.cpu(), db.cpu()


def wgrad_reference(c, absolute=False):
    x, dy = (t.double().abs() if absolute else t.double() for t in (c.x, c.dy))
    w = torch.zeros(c.w.shape, dtype=torch.float64, requires_grad=True)
    y = CONV[len(c.size)](x, w, None, c.stride, c.padding, c.dilation, c.groups)
    return torch.autograd.grad(y, w, dy)[0], dy.sum([0, *range(2, dy.ndim)])


def check_exact(gpu, c, layout, kernel="", passes=PASSES):
    """Integers, whose sums are exact in float32 in any order, and round once."""
    for pass_ in passes:
        if pass_ == "wgrad":
            dw, db = run_wgrad(gpu, c, layout, kernel=kernel)
            expected, sums = wgrad_reference(c)
            assert torch.equal(dw, expected.to(c.dtype)), f"wgrad {layout} {kernel}"
            assert torch.equal(db, sums.to(c.dtype)), f"dbias {layout} {kernel}"
        else:
            out = run(gpu, c, pass_, layout, kernel=kernel)
            assert torch.equal(out, c.reference(pass_).to(c.dtype)), f"{pass_} {layout} {kernel}"
