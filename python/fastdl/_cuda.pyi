"""Stubs of the CUDA kernels' module. Tensors cross as `torch.Tensor`; the caller allocates outputs and workspace.

Every function that takes tensors checks rank, shape, dtype and device itself, all tensors on one GPU, and raises
`TypeError` (not a tensor) or `RuntimeError` (anything else, errors of CUDA among them) with a message that names
operation, argument, expected and got. Work goes to torch's current stream of that GPU; nothing waits for it.
`fastdl._twin` has the same functions for CPU tensors.
"""

from collections.abc import Sequence
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

# --- attention --------------------------------------------------------------------------------------------------
def attention(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    lo: int = ...,
    hi: int = ...,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    align_end: bool = False,
    precision: str = "ieee",
    workspace: Tensor | None = None,
    kernel: str = "",
) -> None:
    """Fill out[B, H, Lq, Dv] and lse[B, H, Lq, 2], float32, from query[B, H, Lq, D], key and value [B, Hkv, Lk, D, Dv].

    As `_C.attention`; cu_seqlens are int32, on the GPU. precision: of products of float32, fma or ieee (all
    three parts), tf32 or bf16. workspace: uint8, of attention_plan()'s workspace_bytes.
    """

def attention_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    lo: int = ...,
    hi: int = ...,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    align_end: bool = False,
    precision: str = "ieee",
    workspace: Tensor | None = None,
) -> None:
    """Fill the gradients that are not None, from what `attention` took and gave; dmask is float32."""

def attention_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    lo: int = ...,
    hi: int = ...,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    align_end: bool = False,
    precision: str = "ieee",
    kernel: str = "",
    backward: bool = False,
    gpu: str = "",
) -> dict[str, Any]:
    """What `attention` would do with tensors like these, on a GPU named sm80, sm86 or sm90; "": the first here."""

def attention_refusal(*, D: int, Dv: int, dtype: str = "float32", device: int = 0, gpu: str = "") -> str:
    """Why these head dimensions have no kernel on that GPU, or ""."""

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

def fragment_probe(a: Tensor, b: Tensor, d: Tensor) -> None:
    """mma.sync alone: d[lane, register] +=, operands a[32, 4, 2] and b[32, 2, 2] as lanes and registers hold them."""

def matrix_probe(x: Tensor, out: Tensor, transposed: bool) -> None:
    """ldmatrix alone: out[lane, register, 2] of x[32, 8], of which lane l gives the address of row l."""

def sums_probe(x: Tensor, out: Tensor) -> None:
    """out[l] = the sum over all lanes of x[lane, l / (32 / n)], x[32, n], n 1, 8 or 32."""

# --- convolution ------------------------------------------------------------------------------------------------
class ConvRow(TypedDict):
    name: str  # e.g. "conv_bf16_128x128_sm80"
    isa: str  # "sm80"
    dtype: str
    precision: str  # of products: "fma", or of float32 split into bfloat16 "ieee", "tf32" or "bf16"
    kind: str  # "tile": forward and dgrad; "wgrad"; "depthwise" and "direct": every pass
    tile: tuple[int, int, int]  # rows, columns and depth of a block's step; zeros: no tiles
    threads: int

class ConvPlan(TypedDict):
    op: str
    kernel: str
    schedule: str  # the row's kind
    tile: tuple[int, int, int]
    phases: int  # of dgrad
    merged: int  # groups that tiles take as one
    tiles: int  # of as many groups
    grid: tuple[int, int, int]  # of the tiles' launch
    chunks: int  # that a sum is cut into; their sums are added in order
    pack_bytes: int  # the weight in the order that tiles read
    partial_bytes: int  # sums of all chunks
    workspace_bytes: int  # what `workspace` must have
    why: str
    text: str
    candidates: list[str]  # what lost, each with the reason

def conv(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    precision: str = "ieee",
    workspace: Tensor | None = None,
    kernel: str = "",
) -> None:
    """As `_C.conv`; precision: how exact float32 products must be; workspace: uint8, as `conv_plan` says."""

def conv_dgrad(
    dx: Tensor,
    dy: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    precision: str = "ieee",
    workspace: Tensor | None = None,
    kernel: str = "",
) -> None:
    """The gradient of conv's input; bias, activation, residual and pre are for conv_transpose, whose forward it is."""

def conv_wgrad(
    dw: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    dbias: Tensor | None = None,
    precision: str = "ieee",
    workspace: Tensor | None = None,
    kernel: str = "",
) -> None:
    """The gradient of conv's weight, and of its bias where dbias is given."""

def conv_plan(
    pass_: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    y_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    dtype: str = "float32",
    channels_last: bool = True,
    precision: str = "ieee",
    gpu: str = "",
    device: int = 0,
    kernel: str = "",
) -> ConvPlan:
    """What "forward", "dgrad" or "wgrad" of these shapes runs, on the GPU named or on that of this index. Pure."""

def conv_coordinates(
    pass_: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    y_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """(position written, [(tap, channel, element read, or -1 outside)]) of each row of the gather, for tests."""

def conv_tiles(
    pass_: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    y_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    dtype: str,
    kernel: str,
) -> list[tuple[int, int, int]]:
    """(phase, tile of pixels, tile of channels) of each block of a group, for tests."""

def conv_places(
    pass_: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    y_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    phase: int,
    m: int,
    k: int,
) -> tuple[int, int, int]:
    """(element written, element read or -1 outside, weight) of pixel m's product k, of one group, for tests."""

def divide_fast(n: int, divisor: int) -> int:
    """n // divisor as index arithmetic has it, for tests; 0 <= n < 2^31."""
