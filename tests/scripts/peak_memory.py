"""Peak memory of one call in each stride case: at most output + the plan's workspace (+ 4 MiB of noise).

Prints one line a case: extra bytes held at the peak, the bytes allowed. Operands are 32 MiB: a copy of one shows.
"""

import sys
from pathlib import Path

import torch

from fastdl import _C, functional
from fastdl.testing import LAYOUTS

NOISE = 4 << 20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status_bytes(field):
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith(field))


def peak_of(call):
    """Bytes by which the resident set grew at its peak during call()."""
    CLEAR.write_text("5")  # resets VmHWM to the present size
    before = status_bytes("VmRSS")
    result = call()
    return status_bytes("VmHWM") - before, result


def check(name, call, allowed):
    extra, _result = peak_of(call)
    print(f"{name}: {extra} of {allowed + NOISE}", flush=True)
    assert extra <= allowed + NOISE, name


def main():
    generator = torch.Generator().manual_seed(1)
    torch.randn(64, 64) @ torch.randn(64, 64)
    M, N, K = 48, 2048, 4096
    allocated, _ = peak_of(lambda: torch.ones(8 << 20))
    assert allocated >= 32 << 20, f"32 MiB were allocated, {allocated} bytes seen: this measure sees nothing"
    for layout in LAYOUTS:
        a = LAYOUTS[layout](torch.randn(M, K, generator=generator))
        b = LAYOUTS[layout](torch.randn(K, N, generator=generator))
        out = torch.empty(M, N).fill_(0)
        plan = _C.matmul_plan(out, a, b)
        check(f"gemm {layout}", lambda out=out, a=a, b=b: _C.gemm(out, a, b), plan["workspace_bytes"])
        bound = out.numel() * 4 + plan["workspace_bytes"]
        check(f"matmul {layout}", lambda a=a, b=b: functional.matmul(a, b), bound)
        weight = b.mT
        plan = _C.linear_plan(out, a, weight)
        bound = out.numel() * 4 + plan["workspace_bytes"]
        check(f"linear {layout}", lambda a=a, w=weight: functional.linear(a, w), bound)
        # The large operand on the left, and a batch of it: the same matrices with their roles exchanged.
        out = torch.empty(N, M).fill_(0)
        plan = _C.matmul_plan(out, b.mT, a.mT)
        check(f"gemm {layout} tall", lambda out=out, a=a, b=b: _C.gemm(out, b.mT, a.mT), plan["workspace_bytes"])
        del a, b, weight
    a, b = torch.randn(4, M, K // 4, generator=generator), torch.randn(2, K // 4, N * 2, generator=generator)
    b = b[:1].expand(4, K // 4, N * 2)
    out = torch.empty(4, M, N * 2).fill_(0)
    plan = _C.matmul_plan(out, a, b)
    check("gemm broadcast batch", lambda: _C.gemm(out, a, b), plan["workspace_bytes"])
    bound = out.numel() * 4 + plan["workspace_bytes"]
    check("matmul broadcast batch", lambda: functional.matmul(a, b), bound)


if __name__ == "__main__":
    if not CLEAR.exists():
        print("SKIP: no /proc/self/clear_refs")
        sys.exit(0)
    main()
