"""Small calls of every operation, forward and backward, as a model makes them: what tools/gpu_check runs under
compute-sanitizer, a thousand times over, and from a CUDA graph.

usage: python tools/gpu_cases.py [--twin] [--repeat N] [--graph] [--only TEXT] [--json FILE] [--seconds S] [--first N]

Each case runs once and is compared with float64; with --repeat up to N times more, every result the same bit for bit as
the first; with --graph also captured, forward and backward, and replayed on a stream of its own. Every output starts as
NaN. A case that was handed to torch is listed with the reason and proves nothing. Exits 1 where a case fails; 87 where
nothing can run on the GPU in this process any more: the cases from the next one on (--first) need another.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("FASTDL_CUDA_UNVERIFIED", "1")  # before fastdl: it is read at import

import torch
from gpu_lost import leave_if_lost
from torch import Tensor
from torch.nn import functional as F

import fastdl
from fastdl import functional
from fastdl.ops import calls
from fastdl.testing import twin

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the largest element, what a result may be off by: sums are short, so that few units in the last place do.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """run(library, *operands): library is fastdl's functional forms or torch's."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Any]
    graph: bool = True


def _linear(lib: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return lib.linear(x, w, b)


def _fused(lib: Any, x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    if lib is functional:
        return lib.linear(x, w, b, activation="gelu", residual=r)
    return F.gelu(F.linear(x, w, b)) + r


def _matmul(lib: Any, a: Tensor, b: Tensor) -> Tensor:
    return (torch if lib is F else lib).matmul(a, b.mT)


def _attention(**options: Any) -> Callable[..., Tensor]:
    return lambda lib, q, k, v: lib.scaled_dot_product_attention(q, k, v, **options)


def _conv(name: str, **options: Any) -> Callable[..., Tensor]:
    return lambda lib, x, w: getattr(lib, name)(x, w, **options)


def _recurrent(cls: str, H: int) -> Callable[..., Tensor]:
    def run(lib: Any, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        module = getattr(fastdl.nn if lib is functional else torch.nn, cls)
        layer = module(x.shape[-1], H, bias=False, device="meta")
        values = {"weight_ih_l0": w, "weight_hh_l0": u}
        return torch.func.functional_call(layer, values, (x,))[0] if lib is F else _call(layer, values, x)

    return run


def _call(layer: torch.nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """As functional_call, with the tensors themselves as parameters, which is what fastdl takes."""
    for name, value in values.items():
        layer._parameters[name] = value
    layer._flat_weights = list(values.values())
    return layer(x)[0]


CASES = (
    Case("linear", ((70, 40), (50, 40), (50,)), _linear),
    Case("linear, one row", ((1, 96), (50, 96), (50,)), _linear),
    Case("linear, gelu, residual", ((2, 33, 40), (50, 40), (50,), (2, 33, 50)), _fused),
    Case("linear, few rows", ((5, 1100), (9, 1100), (9,)), _linear),
    Case("linear, few columns", ((40, 96), (3, 96), (3,)), _linear),
    Case("linear, long K", ((20, 1500), (9, 1500), (9,)), _linear),
    Case("matmul, batched", ((3, 34, 65), (3, 20, 65)), _matmul),
    Case("attention", ((1, 2, 33, 64), (1, 2, 65, 64), (1, 2, 65, 64)), _attention()),
    Case("attention, causal", ((1, 2, 66, 32),) * 3, _attention(is_causal=True)),
    Case("attention, shared heads", ((1, 4, 20, 16), (1, 2, 40, 16), (1, 2, 40, 16)), _attention(enable_gqa=True)),
    Case("attention, decoding", ((2, 2, 1, 64), (2, 2, 130, 64), (2, 2, 130, 64)), _attention()),
    Case("conv2d", ((2, 12, 9, 8), (20, 12, 3, 3)), _conv("conv2d", padding=1, stride=2)),
    Case("conv2d, grouped", ((1, 16, 7, 7), (24, 4, 3, 3)), _conv("conv2d", padding=1, groups=4)),
    Case("conv2d, depthwise", ((1, 24, 9, 9), (24, 1, 3, 3)), _conv("conv2d", padding=1, groups=24)),
    Case("conv1d", ((2, 6, 30), (10, 6, 5)), _conv("conv1d", dilation=2)),
    Case("conv_transpose2d", ((1, 8, 5, 6), (8, 6, 3, 3)), _conv("conv_transpose2d", stride=2)),
    Case("lstm", ((5, 3, 12), (4 * 20, 12), (4 * 20, 20)), _recurrent("LSTM", 20)),
    Case("gru", ((4, 2, 12), (3 * 20, 12), (3 * 20, 20)), _recurrent("GRU", 20)),
)


# --- one case -----------------------------------------------------------------------------------------------------
def operands(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(case.name))
    scale = case.shapes[0][-1] ** -0.5 if case.name.startswith(("lstm", "gru")) else 1.0
    values = [torch.randn(shape, generator=generator) * (scale if i else 1.0) for i, shape in enumerate(case.shapes)]
    return [value.to(dtype).to(device).requires_grad_() for value in values]


def results(case: Case, lib: Any, args: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all operands."""
    out = case.run(lib, *args)
    return [out.detach(), *torch.autograd.grad(out, args, grad)]


def reference(case: Case, args: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(torch's results in float64 on the CPU, the output's gradient: of its place alone)."""
    doubles = [x.detach().cpu().double().requires_grad_() for x in args]
    with torch.no_grad():
        out = case.run(F, *doubles)
    grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(args[0].dtype)
    return results(case, F, doubles, grad.double()), grad.to(args[0].device)


def compare(name: str, actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, of the result's largest element; AssertionError beyond the tolerance, or where not finite."""
    worst = 0.0
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = ((a.cpu().double() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[a.dtype]:
            what = "output" if index == 0 else f"gradient {index}"
            raise AssertionError(f"{name}: {what}: off by {error:.2e} of its largest element")
        worst = max(worst, error)
    return worst


@contextmanager
def recorded() -> Iterator[list[calls.Call]]:
    """The calls of fastdl's operations inside it."""
    seen: list[calls.Call] = []
    before, calls.observer = calls.observer, seen.append
    try:
        yield seen
    finally:
        calls.observer = before


def replayed(case: Case, args: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The same results, from a CUDA graph captured on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(case, functional, args, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = results(case, functional, args, grad)
    for x in out:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return [x.clone() for x in out]


def repeated(case: Case, args: list[Tensor], grad: Tensor, first: list[Tensor], times: int, seconds: float) -> int:
    """Runs it that often, or as long; AssertionError unless every result is `first`, bit for bit."""
    end = time.monotonic() + seconds
    differ = torch.zeros((), dtype=torch.bool, device=grad.device)
    for n in range(times):
        for a, b in zip(first, results(case, functional, args, grad), strict=True):
            differ |= (a != b).any()  # neither holds a NaN
        if n % 50 == 49 or n == times - 1 or time.monotonic() > end:
            if differ:
                raise AssertionError(f"{case.name}: one of the first {n + 2} runs differs from the first")
            if time.monotonic() > end:
                return n + 1
    return times


def run(case: Case, dtype: torch.dtype, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    args = operands(case, dtype, torch.device("cpu" if options.twin else "cuda"))
    expected, grad = reference(case, args)
    with twin() if options.twin else nullcontext() as module:
        with recorded() as seen:
            first = results(case, functional, args, grad)
        row: dict[str, Any] = {
            "kernels": sorted({call.kernel for call in seen if not call.reason}),
            "handed_back": sorted({call.reason for call in seen if call.reason}),
            "error": compare(case.name, first, expected),
        }
        if row["handed_back"]:
            return row
        if options.twin and options.repeat:
            module.set_seed(1)
        row["repeated"] = repeated(case, args, grad, first, options.repeat, seconds)
        if options.graph:
            names = ("output", *(f"gradient {i + 1}" for i in range(len(args))))
            for name, a, b in zip(names, first, replayed(case, args, grad), strict=True):
                if not torch.equal(a, b):
                    raise AssertionError(f"{case.name}: {name}: that of the replayed graph differs")
            row["replayed"] = True
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", action="store_true", help="on the host twin, without a GPU")
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--keep-memory", action="store_true", help="do not fill new memory with NaN (initcheck)")
    parser.add_argument("--json", default="", help="written before and after each case")
    parser.add_argument("--first", type=int, default=0, help="cases before this one are left out")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case begins later, and repeats share them")
    parser.add_argument("--case-seconds", type=float, default=0, help="a case that takes longer ends the process")
    options = parser.parse_args()
    if options.graph and options.twin:
        parser.error("--graph needs a GPU")
    if not options.keep_memory:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # outputs start as NaN
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # no tf32: one tolerance for all
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    todo = [(case, name) for name in options.dtypes.split(",") for case in CASES if options.only in case.name]
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + options.seconds

    def write() -> None:
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"cases": len(todo), "first": options.first, "rows": rows}, file, indent=1)

    for index, (case, name) in enumerate(todo[options.first :], options.first):
        start = time.monotonic()
        if start > end:
            break
        rows.append({"case": case.name, "dtype": name, "failure": "did not end"})
        write()
        if options.case_seconds:
            faulthandler.dump_traceback_later(options.case_seconds, exit=True)
        try:
            row = run(case, DTYPES[name], options, (end - start) / (len(todo) - index)) | {"failure": ""}
        except Exception as error:
            traceback.print_exc()
            row = {"failure": f"{type(error).__name__}: {error}"}
        faulthandler.cancel_dump_traceback_later()
        seconds = round(time.monotonic() - start, 2)
        rows[-1] = {"case": case.name, "dtype": name, "seconds": seconds, **row}
        write()
        said = row["failure"] or "; ".join(f"handed to torch: {why}" for why in row["handed_back"]) or "passed"
        print(f"{case.name:<26} {name:<9} {seconds:7.2f} s  {said}", flush=True)
        if row["failure"]:
            leave_if_lost()
    if not rows or any(row["failure"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
