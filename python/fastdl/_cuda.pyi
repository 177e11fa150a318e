"""Stubs of the CUDA kernels' module. Tensors cross as `torch.Tensor`; the caller allocates outputs and workspace.

Every function that takes tensors checks rank, shape, dtype and device itself, all tensors on one GPU, and raises
`TypeError` (not a tensor) or `RuntimeError` (anything else, errors of CUDA among them) with a message that names
operation, argument, expected and got. Work goes to torch's current stream of that GPU; nothing waits for it.
`fastdl._twin` has the same functions for CPU tensors.
"""

from typing import Any, TypedDict

from torch import Tensor

__version__: str
twin: bool  # this is the host twin
nvcc: str  # version of the compiler that made it
architectures: str  # what there is code for

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

# --- GEMM -------------------------------------------------------------------------------------------------------
def kernels(op: str) -> list[dict[str, Any]]:
    """The kernel table of an operation ("gemm", ...): each row's name, isa and dtype, and what that operation adds."""

def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    activation: str = "none",
    accumulate: bool = False,
    precision: str = "ieee",
    workspace: Tensor | None = None,
    kernel: str = "",
    splits: int = 0,
) -> None:
    """out = activation(z) + residual, pre = z = [out +] a[..., M, K] @ b[..., K, N] [+ bias[N]].

    Any strides; out has unit stride along N, residual and pre its shape and strides. activation: none, relu, gelu,
    gelu_tanh or silu. precision, of float32: fma, ieee, tf32 or bf16. workspace: uint8, of gemm_workspace() bytes.
    kernel forces a row of the table, splits > 0 the number of runs that K is cut into.
    """

def gemm_workspace(
    a: Tensor, b: Tensor, out: Tensor, precision: str = "ieee", kernel: str = "", splits: int = 0
) -> int:
    """Bytes of workspace that gemm() of these needs."""

def gemm_plan(
    a: Tensor, b: Tensor, out: Tensor, precision: str = "ieee", kernel: str = "", gpu: str = "", splits: int = 0
) -> dict[str, Any]:
    """What gemm() would do with tensors like these, of any device, on a GPU named sm80 or sm90; "": the first here."""

def activation_grad(dy: Tensor, z: Tensor, dz: Tensor, activation: str) -> None:
    """dz = dy * d activation(z) / dz, elementwise, contiguous."""

def sum_rows(x: Tensor, out: Tensor) -> None:
    """out[N] = the sum of x[..., N] over all leading dimensions."""

def tile_probe(a: Tensor, b: Tensor, out: Tensor, a_transposed: bool, b_transposed: bool, precision: str) -> None:
    """out[16,32] = a b by one warp, and the largest magnitudes of the rows of a and the columns of b."""

# --- recurrent layers -------------------------------------------------------------------------------------------
def rnn(
    y: Tensor,
    h_n: Tensor | None,
    c_n: Tensor | None,
    saved: Tensor | None,
    x_gates: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    workspace: Tensor,
    *,
    mode: str,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    precision: str = "ieee",
    kernel: str = "",
    multiprocessors: int = 0,  # > 0: of these at most
) -> None:
    """`_C.rnn` on a GPU; batch_sizes stays on the CPU. workspace: uint8, of rnn_plan()'s workspace_bytes."""

def rnn_backward(
    d_gates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    saved: Tensor | None,
    y: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    workspace: Tensor,
    *,
    mode: str,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    d_recurrent: Tensor | None = None,
    d_hidden: Tensor | None = None,
    hidden: Tensor | None = None,
    precision: str = "ieee",
    kernel: str = "",
    multiprocessors: int = 0,  # > 0: of these at most
) -> None:
    """`_C.rnn_backward` on a GPU; workspace as for rnn(), of a plan with backward=True."""

def rnn_states_before(out: Tensor, y: Tensor, h0: Tensor, batch_sizes: Tensor, reverse: bool = False) -> None:
    """out [rows, P] = of each row of packed y the state that its step started from; h0 [B, P]."""

def rnn_saved_shape(mode: str, rows: int, B: int, H: int, P: int) -> tuple[int, int]: ...
def rnn_plan(
    T: int,
    B: int,
    H: int,
    P: int = 0,
    *,
    mode: str = "lstm",
    backward: bool = False,
    dtype: str = "float32",
    precision: str = "ieee",
    gpu: str = "",
    device: int = 0,
    kernel: str = "",
    multiprocessors: int = 0,  # > 0: of these at most
) -> dict[str, Any]:
    """The plan for these sizes (P > 0: projected) on a GPU named sm80 or sm90, or ("") on that of this index: kernel,
    resident, the grid, tile_rows, shared_bytes, workspace_bytes, why, text, candidates.

    precision, of float32: ieee, tf32 or bf16.
    """

# --- single instructions, for tests -----------------------------------------------------------------------------
def mma_probe(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[16,8] = a[16,K] b[8,K]^T by one warp: cp.async, ldmatrix, mma.sync."""
