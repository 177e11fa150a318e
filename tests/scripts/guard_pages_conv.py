"""Runs the dense convolution kernels of a level on tensors that end, or begin, at a page that may not be accessed.

usage: guard_pages_conv.py ISA      prints each case before it runs
"""

import sys
from pathlib import Path

import torch
from guard_pages import Fenced

from fastdl import _C

sys.path.insert(0, str(Path(__file__).parents[1]))
from conv_reference import LAYOUTS, Conv, lay

CALL = {"forward": _C.conv, "dgrad": _C.conv_dgrad}


def main(isa):
    homes = {}
    for row in _C.kernels("conv"):
        if row["isa"] != isa or row["kind"] != "dense":
            continue
        dtype, mr, nr = getattr(torch, row["dtype"]), row["mr"], row["nr"]
        cases = [
            dict(C=1, K=1, size=(1,), kernel=(1,)),
            dict(C=3, K=nr + 1, size=(5, mr + 1), kernel=(2, 3), padding=(0, 1)),
            dict(C=17, K=3, size=(4, 9), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
            dict(C=5, K=7, size=(3, 4), kernel=(1, 1)),
            dict(C=nr + 1, K=35, size=(2, 17), kernel=(1, 1)),
            dict(C=9, K=9, size=(33,), kernel=(5,), dilation=(3,)),
            dict(C=2, K=5, size=(3, 4, 5), kernel=(2, 2, 2)),
        ]

        def fence(key, x):
            return homes.setdefault((key, dtype), Fenced(1 << 18, dtype)).place(x, at_end)  # noqa: B023

        for at_end in (True, False):
            for case in cases:
                for layout in LAYOUTS:
                    for pass_ in CALL:
                        print(f"{row['name']} at_end={at_end} {case} {layout} {pass_}", flush=True)
                        problem = Conv(N=2, **case, dtype=dtype, layout=layout)
                        source, bias, shape = problem.operands(pass_)
                        read = [fence(i, lay(t, layout)) for i, t in enumerate((source, problem.w))]
                        out, residual, pre = (fence(i, lay(torch.ones(shape, dtype=dtype), layout)) for i in (2, 3, 4))
                        options = dict(residual=residual, pre=pre, kernel=row["name"])
                        CALL[pass_](out, *read, fence(5, bias), **problem.options, **options)
                        expected = problem.reference(pass_)
                        assert torch.equal(out, (expected + 1).to(dtype))
                        assert torch.equal(pre, expected.to(dtype))


if __name__ == "__main__":
    main(sys.argv[1])
