"""Which module runs the tensors of a device: `_cuda` those of a GPU, its host twin `_twin` those of the CPU in a test.

The kernels in `_cuda` have run on the twin alone, never on a GPU: they are off unless FASTDL_CUDA_UNVERIFIED=1, and a
call with CUDA tensors is handed to torch with that reason.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdl import _C
from fastdl._version import __version__
from fastdl.ops.calls import run_while_tracing

UNVERIFIED = os.environ.get("FASTDL_CUDA_UNVERIFIED", "0") not in ("", "0")
OFF = "CUDA kernels are not verified on a GPU yet (FASTDL_CUDA_UNVERIFIED=1 turns them on)"
OLDEST_SM = 80
_FLOAT32 = os.environ.get("FASTDL_FLOAT32", "")

# CPU tensors run on the twin. Written by `use_twin` alone; a rule of `plain` says that no call is plain meanwhile.
twin_active = False


@functools.cache
def load(name: str) -> tuple[Any, str]:
    """(the module "_cuda" or "_twin", ""), or (None, why there is none)."""
    try:
        module = importlib.import_module(f"fastdl.{name}")
    except ModuleNotFoundError:
        built = _C.build_info()["cuda"]
        return None, f"no CUDA kernels in this build: {built['reason'] or 'the module _cuda is missing'}"
    except ImportError as error:
        return None, f"the CUDA kernels cannot be loaded: {error}"
    if module.__version__ != __version__:
        return None, f"the CUDA kernels are of version {module.__version__}, fastdl is {__version__}: reinstall it"
    return module, ""


@functools.cache
def gpu_reason(index: int) -> str:
    """Why the kernels cannot run on that GPU, or ""."""
    module, why = load("_cuda")
    if module is None:
        return why
    if torch.version.hip is not None:
        return "CUDA kernels need an NVIDIA GPU, this torch is built for ROCm"
    if not 0 <= index < module.gpu_count():
        return f"no GPU with index {index} can be used"
    sm = module.gpu_info(index)["sm"]
    return "" if sm >= OLDEST_SM else f"CUDA kernels need sm_{OLDEST_SM} or newer, cuda:{index} is sm_{sm}"


@run_while_tracing
def reason(device: torch.device) -> str | None:
    """Why no CUDA kernels run on tensors of this CUDA device, or None where they do."""
    if UNVERIFIED:
        return gpu_reason(device.index or 0) or None
    return load("_cuda")[1] or OFF


def runs(x: Tensor) -> bool:
    """Whether a CUDA kernel, or its twin, is what runs x."""
    return twin_active if x.is_cpu else x.is_cuda and reason(x.device) is None


def native(x: Tensor) -> Any:
    """The module whose kernels run x: `_cuda`, in a test `_twin`; None where x is no tensor of theirs."""
    return load("_twin" if x.is_cpu else "_cuda")[0] if runs(x) else None


def require(op: str, x: Tensor) -> Any:
    """`native(x)`; RuntimeError with the reason where there is none."""
    module = native(x)
    if module is None:
        why = reason(x.device) if x.is_cuda else f"no CUDA kernels for tensors on {x.device}"
        raise RuntimeError(f"fastdl.{op}: {why}")
    return module


def precision(operation: str) -> str:
    """How exact float32 products on a GPU must be, by torch's switch for "matmul", "conv" or "rnn": ieee, tf32 or fma.

    torch gives cuDNN's operations leave to use tf32 unless it is told otherwise. "fma": FASTDL_FLOAT32=ieee.
    """
    if _FLOAT32 == "ieee":
        return "fma"
    asked = torch._C._get_fp32_precision_getter("cuda", operation)
    return asked if asked in ("tf32", "bf16") else "ieee"


def kernels(operation: str, module: Any) -> list[dict[str, Any]]:
    """The rows of an operation's table of CUDA kernels; none where it has no table yet."""
    try:
        return list(module.kernels(operation))
    except RuntimeError:
        return []


def workspace(like: Tensor, bytes: int) -> Tensor | None:
    """Scratch of a call on the device of `like`, from torch's allocator; None for no bytes."""
    return torch.empty(bytes, dtype=torch.uint8, device=like.device) if bytes else None


@contextmanager
def use_twin(seed: int = 0) -> Iterator[Any]:
    """CPU tensors run on the host twin inside it; `seed` orders its threads. Gives the module."""
    global twin_active
    module, why = load("_twin")
    if module is None:
        raise RuntimeError(f"fastdl.testing.twin: the host twin is not in this build (FASTDL_TWIN=ON builds it): {why}")
    before = twin_active
    module.set_seed(seed)
    twin_active = True
    try:
        yield module
    finally:
        twin_active = before
        module.set_seed(0)
