"""Runs an attention kernel, forward and backward, on operands that end, or begin, at a page that may not be accessed.

usage: guard_pages_attention.py KERNEL      prints each case before it runs
"""

import itertools
import sys

import torch
from guard_pages import Fenced

from fastdl import _C

LAYOUTS = {
    "BHSD": lambda x: x,
    "BSHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "column-major": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def main(name):
    row = {row["name"]: row for row in _C.kernels("attention")}[name]
    dtype = getattr(torch, row["dtype"])
    homes = {key: Fenced(1 << 18, dtype) for key in ("q", "k", "v", "out", "same", "dout", "dq", "dk", "dv")}
    lse_home, float_home, bool_home = Fenced(1 << 14), Fenced(1 << 18), Fenced(1 << 18, torch.uint8)
    generator = torch.Generator().manual_seed(1)
    sizes = [(1, 1, 1, 1), (row["mr"] + 1, row["nr"] + 1, 17, 33), (3, 47, 64, 5), (2 * row["mr"] - 1, 31, 7, 64)]
    for at_end, layout, (Lq, Lk, D, Dv) in itertools.product((True, False), LAYOUTS, sizes):
        if row["kind"] == "decode" and layout in ("column-major", "strided"):
            continue
        print(f"at_end={at_end} layout={layout} Lq={Lq} Lk={Lk} D={D} Dv={Dv}", flush=True)
        shapes = {"q": (1, 2, Lq, D), "k": (1, 2, Lk, D), "v": (1, 2, Lk, Dv)}
        x = {
            key: homes[key].place(LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype)), at_end)
            for key, shape in shapes.items()
        }
        out = homes["out"].place(torch.zeros(1, 2, Lq, Dv, dtype=dtype), at_end)
        lse = lse_home.place(torch.zeros(1, 2, Lq, 2), at_end)
        added = torch.randn(1, 2, Lq, Lk, generator=generator)
        boolean = bool_home.place((added > -1).byte(), at_end).view(torch.bool)
        for mask in (None, float_home.place(added, at_end), homes["same"].place(added.to(dtype), at_end), boolean):
            for hi in (0, 2**63 - 1):
                _C.attention(out, lse, x["q"], x["k"], x["v"], mask, scale=0.3, hi=hi, kernel=name)
                assert out.isfinite().all()
                if row["kind"] == "decode":
                    continue
                dout = homes["dout"].place(LAYOUTS[layout](torch.ones_like(out)), at_end)
                grads = [homes["d" + key].place(torch.zeros(x[key].shape, dtype=dtype), at_end) for key in "qkv"]
                _C.attention_backward(
                    *grads, None, dout, x["q"], x["k"], x["v"], out, lse, mask, scale=0.3, hi=hi, kernel=name
                )
                assert all(grad.isfinite().all() for grad in grads)


if __name__ == "__main__":
    main(sys.argv[1])
