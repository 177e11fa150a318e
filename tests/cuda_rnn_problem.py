"""The rows of the recurrent CUDA kernels' table, and problems that run on one of them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastdl.ops import cuda
from rnn_reference import Problem

MODES_OF = {"lstm": ("lstm",), "gru": ("gru",), "rnn": ("rnn_tanh", "rnn_relu")}
module = cuda.load("_twin")[0] or cuda.load("_cuda")[0]
ROWS = module.kernels("rnn") if module else []
CASES = [(row, mode) for row in ROWS for mode in MODES_OF[row["kind"]]]
every_case = pytest.mark.parametrize("row, mode", [pytest.param(*c, id=f"{c[0]['name']}-{c[1]}") for c in CASES])
# The rows of one dtype differ in it alone, and so do those of two parts from those of three: not all cases need all.
SOME = [(r, m) for r, m in CASES if r["dtype"] != "float16" and r["precision"] != "tf32" and m != "rnn_relu"]
some_cases = pytest.mark.parametrize("row, mode", [pytest.param(*c, id=f"{c[0]['name']}-{c[1]}") for c in SOME])
every_row = pytest.mark.parametrize("row", [pytest.param(row, id=row["name"]) for row in ROWS])


@dataclass
class GpuProblem(Problem):
    gpu: Any = None
    kernel: str = ""
    multiprocessors: int = 0

    def call(self, name, *tensors, **options):
        device, backward = self.gpu.device, name == "rnn_backward"
        shape = (self.T, self.B, self.H, self.P)
        named = {"mode": self.mode, "kernel": self.kernel, "multiprocessors": self.multiprocessors}
        plan = self.gpu.module.rnn_plan(
            *shape, backward=backward, dtype=str(self.dtype).removeprefix("torch."), **named
        )
        workspace = torch.full((plan["workspace_bytes"],), 0xFF, dtype=torch.uint8, device=device)  # NaN
        here = {k: v for k, v in options.items() if k.startswith(("d_", "hidden"))}
        there = {k: None if v is None else v.to(device) for k, v in here.items()}
        moved = [None if x is None else x.to(device) for x in tensors]
        getattr(self.gpu.module, name)(*moved, workspace, **{**options, **there, **named})
        for x, y in zip((*tensors, *here.values()), (*moved, *there.values()), strict=True):
            if x is not None and x is not y:
                x.copy_(y)
