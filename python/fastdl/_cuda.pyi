"""Stubs of the CUDA kernels' module. Tensors cross as `torch.Tensor`; the caller allocates outputs and workspace.

Every function that takes tensors checks rank, shape, dtype and device itself, all tensors on one GPU, and raises
`TypeError` (not a tensor) or `RuntimeError` (anything else, errors of CUDA among them) with a message that names
operation, argument, expected and got. Work goes to torch's current stream of that GPU; nothing waits for it.
`fastdl._twin` has the same functions for CPU tensors.
"""

from typing import TypedDict

from torch import Tensor

__version__: str
twin: bool  # this is the host twin

class GpuInfo(TypedDict):
    sm: int  # 80: compute capability 8.0
    multiprocessors: int
    shared_bytes: int  # of a block, at most
    l2_bytes: int

# --- the GPUs ---------------------------------------------------------------------------------------------------
def gpu_count() -> int:
    """GPUs that can be used; 0 without a driver."""

def gpu_info(device: int) -> GpuInfo:
    """The GPU of this index. RuntimeError where there is none."""

def gpu_named(name: str) -> GpuInfo:
    """The GPU that plans are made for anywhere: "sm80" or "sm90"."""

def gpu_name(device: int) -> str: ...

# --- single instructions, for tests -----------------------------------------------------------------------------
def mma_probe(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[16,8] = a[16,K] b[8,K]^T by one warp: cp.async, ldmatrix, mma.sync."""
