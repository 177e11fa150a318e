"""conv_guard_pages.py ROW: operands of a direct kernel between pages that nobody may touch; prints ok."""

import ctypes
import mmap
import sys
from functools import partial

import torch

from fastdl import _C

LIBC = ctypes.CDLL(None)
KEPT = []


def place(x, at_end):
    """x (its strides as they are) where memory ends, or begins."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    pages = (size + page - 1) // page
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    KEPT.append(memory)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=page + (pages * page - size) * at_end)
    result = flat.as_strided(x.shape, x.stride()).copy_(x)
    for guard in (start, start + (pages + 1) * page):
        assert LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    return result


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


row = next(r for r in _C.kernels("conv") if r["name"] == sys.argv[1])
dtype, depthwise = getattr(torch, row["dtype"]), row["kind"] == "depthwise"
calls = 0
for groups, inputs, outputs, size, kernel, stride in (
    *((5, 2, 3, (5, 7), 3, 1), (16, 4, 4, (6, 18), 3, 2), (33, 2, 2, (40,), 31, 1)),
    *((32, 2, 2, (3, 4, 5), 3, 1), (64, 1, 1, (7, 9), 5, 1), (54, 1, 1, (3, 8), 4, 1), (47, 1, 1, (9, 9), 3, 2)),
):
    inputs, outputs = (1, 1) if depthwise else (inputs, outputs)
    dims = len(size)
    x, w = torch.randn(2, groups * inputs, *size), torch.randn(groups * outputs, inputs, *(kernel,) * dims)
    options = {"stride": (stride,) * dims, "padding": (kernel // 2,) * dims, "dilation": (1,) * dims, "groups": groups}
    y = (None, torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims](
        x, w, None, *options.values()
    )
    for layout in (torch.Tensor.contiguous, channels_last):
        for at_end in (True, False):
            tensors = [place(layout(t.to(dtype)), at_end) for t in (x, y)]
            tensors += [place(t.to(dtype), at_end) for t in (w, w[:, 0].flatten(1)[:, 0].contiguous())]
            ours, out, weight, bias = tensors
            for run, *operands in (
                (_C.conv, out, ours, weight, bias),
                (_C.conv_dgrad, ours, out, weight),
                (partial(_C.conv_wgrad, dbias=bias), weight, out, ours),
            ):
                try:
                    run(*operands, **options, kernel=row["name"])
                    calls += 1
                except RuntimeError as e:
                    assert "expected several groups" in str(e), e
assert calls
print("ok")
