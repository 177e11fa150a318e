"""Runs a kernel on operands that end, or begin, at a page that may not be accessed: a stray access is a SIGSEGV.

usage: guard_pages.py KERNEL KIND MR NR     prints each case before it runs
       guard_pages.py --touch             touches the page on purpose: must die
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

    def __init__(self, size):
        size = -(-size // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, size + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert base != ctypes.c_void_p(-1).value
        assert libc.mprotect(base, PAGE, PROT_NONE) == 0
        assert libc.mprotect(base + PAGE + size, PAGE, PROT_NONE) == 0
        self.end = base + PAGE + size
        self.floats = torch.frombuffer((ctypes.c_char * size).from_address(base + PAGE), dtype=torch.float32)

    def place(self, x, at_end):
        """x with its own strides, its last (or first) element beside the fence."""
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        view = self.floats.as_strided(x.shape, x.stride(), self.floats.numel() - extent if at_end else 0)
        view[tuple(0 if stride == 0 else slice(None) for stride in x.stride())] = 2.0  # expanded: one write an element
        return view if 0 in x.stride() else view.copy_(x)


def main(name, kind, mr, nr):
    generator = torch.Generator().manual_seed(1)
    a_home, b_home, out_home, bias_home = (Fenced(1 << 19) for _ in range(4))
    layouts = ("contiguous", "transposed", "wide_rows", "wide_columns", "both_strided", "expanded_rows")
    layouts += ("expanded_columns",)
    sizes = [(1, 1, 1), (mr, nr, 8), (mr + 1, nr + 1, 17), (2 * mr - 1, 2 * nr - 1, 15), (3, 5, 3), (1, nr + 3, 31)]
    for at_end, a_layout, b_layout, (M, N, K) in itertools.product((True, False), layouts, layouts, sizes):
        if kind == "dot" and not (a_layout in ALONG_ROWS and b_layout in ALONG_COLUMNS):
            continue
        print(f"at_end={at_end} a={a_layout} b={b_layout} M={M} N={N} K={K}", flush=True)
        a = a_home.place(LAYOUTS[a_layout](integer_matrix((M, K), K, generator)), at_end)
        b = b_home.place(LAYOUTS[b_layout](integer_matrix((K, N), K, generator)), at_end)
        bias = bias_home.place(integer_matrix((N,), 1, generator), at_end)
        out = out_home.place(torch.ones(M, N + 3)[:, :N], at_end)
        product = (a.double() @ b.double()).float()
        _C.gemm(out, a, b, bias, True, kernel=name)
        assert torch.equal(out, product + bias + 1)
        _C.gemm(out, a, b, kernel=name)
        assert torch.equal(out, product)
        _C.sum_rows(bias, out)
        assert torch.equal(bias, product.sum(0))
        numel = _C.pack_numel(K, N, _C.pack_kernel())
        _C.pack(out_home.floats[-numel:], b, _C.pack_kernel())


if __name__ == "__main__":
    if sys.argv[1] == "--touch":
        ctypes.c_float.from_address(Fenced(PAGE).end).value = 1.0
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
