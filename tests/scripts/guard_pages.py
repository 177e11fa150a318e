"""Runs a kernel on operands that end, or begin, at a page that may not be accessed: a stray access is a SIGSEGV.

usage: guard_pages.py KERNEL      prints each case before it runs
       guard_pages.py --touch     touches the page on purpose: must die
"""

import ctypes
import itertools
import mmap
import sys

import torch

from fastdl import _C
from fastdl.testing import LAYOUTS, integer_matrix

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
PROT_NONE = 0
ALONG_ROWS, ALONG_COLUMNS = ("contiguous", "wide_rows", "expanded_rows"), ("transposed", "wide_columns")  # unit stride


class Fenced:
    """Memory with a page before and behind it that may not be accessed."""

    def __init__(self, size, dtype=torch.float32):
        size = -(-size // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, size + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert base != ctypes.c_void_p(-1).value
        assert libc.mprotect(base, PAGE, PROT_NONE) == 0
        assert libc.mprotect(base + PAGE + size, PAGE, PROT_NONE) == 0
        self.end = base + PAGE + size
        self.elements = torch.frombuffer((ctypes.c_char * size).from_address(base + PAGE), dtype=dtype)

    def place(self, x, at_end):
        """x with its own strides, its last (or first) element beside the fence."""
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        view = self.elements.as_strided(x.shape, x.stride(), self.elements.numel() - extent if at_end else 0)
        view[tuple(0 if stride == 0 else slice(None) for stride in x.stride())] = 2.0  # expanded: one write an element
        return view if 0 in x.stride() else view.copy_(x)


def main(name):
    row = {row["name"]: row for row in _C.kernels("gemm")}[name]
    mr, nr, dtype = row["mr"], row["nr"], getattr(torch, row["dtype"])
    generator = torch.Generator().manual_seed(1)
    a_home, b_home, out_home, bias_home, residual_home, pre_home = (Fenced(1 << 19, dtype) for _ in range(6))
    pack_home = Fenced(1 << 19)
    layouts = ("contiguous", "transposed", "wide_rows", "wide_columns", "both_strided", "expanded_rows")
    layouts += ("expanded_columns",)
    sizes = [(1, 1, 1), (mr, nr, 8), (mr + 1, nr + 1, 17), (2 * mr - 1, 2 * nr - 1, 15), (3, 5, 3), (1, nr + 3, 31)]
    for at_end, a_layout, b_layout, (M, N, K) in itertools.product((True, False), layouts, layouts, sizes):
        if row["kind"] == "dot" and not (a_layout in ALONG_ROWS and b_layout in ALONG_COLUMNS):
            continue
        print(f"at_end={at_end} a={a_layout} b={b_layout} M={M} N={N} K={K}", flush=True)
        a = a_home.place(LAYOUTS[a_layout](integer_matrix((M, K), K, generator, dtype)), at_end)
        b = b_home.place(LAYOUTS[b_layout](integer_matrix((K, N), K, generator, dtype)), at_end)
        bias = bias_home.place(integer_matrix((N,), 1, generator, dtype), at_end)
        out, residual, pre = (
            home.place(torch.ones(M, N + 3, dtype=dtype)[:, :N], at_end) for home in (out_home, residual_home, pre_home)
        )
        product = a.double() @ b.double()
        _C.gemm(out, a, b, bias, True, kernel=name)
        assert torch.equal(out, (product + bias + 1).to(dtype))
        _C.gemm(out, a, b, kernel=name)
        assert torch.equal(out, product.to(dtype))
        _C.linear_fused(out, a, b.mT, bias, "relu", residual, pre, kernel=name)
        assert torch.equal(pre, (product + bias).to(dtype))
        assert torch.equal(out, ((product + bias).relu() + 1).to(dtype))
        _C.sum_rows(bias, out)
        assert torch.equal(bias, out.double().sum(0).to(dtype))
        pack_kernel = _C.pack_kernel(row["dtype"])
        numel = _C.pack_numel(K, N, pack_kernel)
        _C.pack(pack_home.elements[-numel:], b, pack_kernel)


if __name__ == "__main__":
    if sys.argv[1] == "--touch":
        ctypes.c_float.from_address(Fenced(PAGE).end).value = 1.0
    else:
        main(sys.argv[1])
