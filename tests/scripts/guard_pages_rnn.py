"""Runs the recurrent kernels of a level on tensors that end, or begin, at a page that may not be accessed.

usage: guard_pages_rnn.py ISA      prints each case before it runs
"""

import sys
from pathlib import Path

import torch
from guard_pages import Fenced

from fastdl import _C

sys.path.insert(0, str(Path(__file__).parents[1]))
from rnn_reference import GATES, Problem

STATES = ("x", "w", "b", "r", "h0", "c0", "dy", "dh_n", "dc_n")


def run(problem, kernel, at_end, homes):
    """Forward and backward with every tensor of the problem and every result beside the fence."""
    dtype = problem.dtype

    def fence(key, x):
        return homes.setdefault((key, dtype), Fenced(1 << 19, dtype)).place(x, at_end)

    for key in STATES:
        if getattr(problem, key) is not None:
            setattr(problem, key, fence(key, getattr(problem, key)))
    results = iter(range(100))
    problem.empty = lambda *shape: fence(next(results), torch.zeros(shape, dtype=dtype))
    forward = problem.forward(kernel=kernel)
    assert forward["y"].isfinite().all()
    assert problem.backward(forward, kernel=kernel)["d_gates"].shape[-1] == GATES[problem.mode] * problem.H


def main(isa):
    homes = {}
    for row in _C.kernels("rnn"):
        if row["isa"] != isa:
            continue
        mode = {"rnn": "rnn_relu"}.get(row["kind"], row["kind"])
        units, mr = row["units"], row["mr"]
        cases = [(2, 1, 1, 0), (2, mr + 1, units + 1, 0), (1, 1, 161, 0), (2, 3, 2 * units - 1, 0)]
        cases += [(2, 3, units + 1, units - 1)] if mode == "lstm" else []
        for at_end in (True, False):
            for T, B, H, P in cases:
                for sizes in (None, [B] * (T - 1) + [1]):
                    print(f"{row['name']} at_end={at_end} T={T} B={B} H={H} P={P} sizes={sizes}", flush=True)
                    problem = Problem(mode, T, B, H, P, batch_sizes=sizes, dtype=getattr(torch, row["dtype"]))
                    run(problem, row["name"], at_end, homes)


if __name__ == "__main__":
    main(sys.argv[1])
