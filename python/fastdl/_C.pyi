"""Stubs of the native module. Tensors cross as `torch.Tensor`; outputs are allocated by the caller.

Every function that takes tensors checks rank, shape, dtype (float32, bfloat16 or float16, the same for all; packs are
float32), device (cpu) and overlap itself, raises
`TypeError` (not a tensor) or `RuntimeError` (anything else) with a message that names operation, argument,
expected and got, and releases the GIL while it computes.
"""

from typing import Any, TypedDict

from torch import Tensor

__version__: str

class KernelRow(TypedDict):
    name: str  # e.g. "gemm_f32_14x32_avx512"; the same name in the log, the tests and the bench rows
    isa: str  # "scalar" | "avx2" | "avx512" | "avx512bf16" | "amx"
    dtype: str  # of the operands in memory: "float32", "bfloat16" or "float16"
    kind: str  # gemm: "tile": C tile += packed or strided A x panel of B; "dot": both operands contiguous along K
    # attention: "tile": packed panels of K; "decode": few query rows, K and V in place
    mr: int  # rows of the register tile
    nr: int  # columns of the register tile
    available: bool  # can run on this machine, under FASTDL_ISA
    reason: str  # why not, or ""

class Plan(TypedDict):
    op: str
    M: int
    N: int
    K: int
    batch: int
    kernel: str
    isa: str
    mr: int
    nr: int
    mc: int
    nc: int
    kc: int
    pack_a: bool
    pack_b: bool
    grid: tuple[int, int]  # how C is cut over threads: (along M, along N); batches are cut first
    threads: int
    workspace_bytes: int  # shared + threads x per_thread
    why: str
    candidates: list[str]  # what lost, each with the reason, for FASTDL_LOG=1

# --- the machine and the build --------------------------------------------------------------------------------
def build_info() -> dict[str, Any]:
    """compiler, openmp (bool), isa_compiled (list), isa_missing ({isa: reason}), cuda ({"built", "reason"})."""

def cpu_info() -> dict[str, Any]:
    """vendor, brand, isa_supported (list), isa (in use), isa_cap (FASTDL_ISA or ""), l1d, l2, l3 (bytes), cpus."""

def threads(requested: int = 0) -> tuple[int, str]:
    """Threads a region entered now by this thread would use, and why (requested 0: torch.get_num_threads())."""

def measure_fma(isa: str = "", threads: int = 0, seconds: float = 0.1) -> float:
    """Peak float32 FMA rate at this level, FLOP/s. RuntimeError where the machine lacks the level."""

def measure_amx(threads: int = 0, seconds: float = 0.1) -> float:
    """Peak AMX bf16 rate, FLOP/s. RuntimeError without AMX."""

def measure_read_bandwidth(bytes_per_thread: int, threads: int = 0, seconds: float = 0.1) -> float:
    """Bytes/s read, by all threads together, over a private buffer of this size each."""

def counters() -> dict[str, int]:
    """Calls of `run` per kernel name since the last reset."""

def reset_counters() -> None: ...

# --- GEMM -----------------------------------------------------------------------------------------------------
def kernels(op: str) -> list[KernelRow]:
    """The kernel table of an operation ("gemm", "attention"), every row of this build."""

def gemm_plan(
    M: int,
    N: int,
    K: int,
    *,
    batch: int = 1,
    a_strides: tuple[int, int] | None = None,  # (along M, along K) in elements; None: row-major
    b_strides: tuple[int, int] | None = None,  # (along K, along N); None: row-major
    packed: bool = False,  # B is a frozen pack
    isa: str = "",  # plan for this level, runnable here or not; "": the level in use
    threads: int = 0,
    l1d: int = 0,
    l2: int = 0,
    l3: int = 0,  # cache sizes to plan for; 0: this machine's
    kernel: str = "",
    dtype: str = "float32",
) -> Plan:
    """Pure: the decision for a problem on a machine. Runs nothing."""

def gemm(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    accumulate: bool = False,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """out[..., M, N] (+)= a[..., M, K] @ b[..., K, N] (+ bias[N]).

    a and b may have any strides, 0 included; their batch dimensions broadcast against out's. out is row-major in
    its last two dimensions (unit stride along N) with any batch strides and overlaps neither input.
    kernel forces a row of the table; threads > 0 forces the team size (default: design, section 5).
    """

def linear(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, kernel: str = "", threads: int = 0
) -> None:
    """out[..., N] = input[..., K] @ weight[N, K]^T + bias[N]; input 1-D or more, any strides."""

def linear_fused(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """z = input @ weight^T + bias; pre = z; out = activation(z) + residual, in one pass, rounded once each.

    activation: none, relu, gelu (exact), gelu_tanh or silu. residual and pre have the shape and strides of out.
    """

def activation_grad(out: Tensor, grad: Tensor, pre: Tensor, activation: str, threads: int = 0) -> None:
    """out = grad * activation'(pre), elementwise; all contiguous and of one shape."""

def linear_plan(
    out: Tensor, input: Tensor, weight: Tensor, packed: bool = False, kernel: str = "", threads: int = 0
) -> Plan:
    """The plan `linear` (or `linear_packed`) would run for these tensors."""

def matmul_plan(out: Tensor, a: Tensor, b: Tensor, kernel: str = "", threads: int = 0) -> Plan:
    """The plan `gemm` would run for these tensors."""

def linear_wgrad(out: Tensor, grad: Tensor, input: Tensor, threads: int = 0) -> None:
    """out[N, K] = grad[..., N]^T @ input[..., K], contracted over all leading dimensions; any strides."""

def linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, ...] | None:
    """The output shape if `linear` can take these as they are; None for whatever it cannot (never raises)."""

def matmul_shape(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    """The output shape if `gemm` can take these as they are (both at least 2-D); None otherwise (never raises)."""

def sum_rows(out: Tensor, x: Tensor, threads: int = 0) -> None:
    """out[N] = sum of x[..., N] over all leading dimensions: the bias gradient. Fixed order, any strides."""

# --- frozen packs: the weight in panel order, [ceil(N/nr)][K][nr], zero padded, as a 1-D float32 tensor ---------
def pack_kernel(dtype: str = "float32") -> str:
    """The table row that frozen packs are laid out for on this machine."""

def pack_numel(K: int, N: int, kernel: str) -> int: ...
def pack(out: Tensor, b: Tensor, kernel: str) -> None:
    """Write b[K, N] (any strides) in panel order into out[pack_numel(K, N, kernel)]."""

def linear_packed(
    out: Tensor, input: Tensor, packed: Tensor, bias: Tensor | None, N: int, kernel: str, threads: int = 0
) -> None:
    """linear with a frozen weight: packed = pack of weight.T, shape given by input's K and N."""

# --- attention: query [B, H, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], any strides ----------------------
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
    kernel: str = "",
    threads: int = 0,
) -> None:
    """out[B, H, Lq, Dv] (unit stride along Dv) = softmax(scale * query @ key^T + mask) @ value, with dropout.

    lse[B, H, Lq], contiguous float32, gets log sum exp of the scores: -Inf where a row sees no key (out is 0 there).
    Query head h reads key head h // (H // Hkv). mask: [B or 1, H or 1, Lq, Lk], bool (True: seen), float32 or the dtype
    of query, added; any strides. Keys outside lo <= j - i <= hi are not seen; align_end counts j - i from the bottom
    right corner. softcap > 0: scores become softcap * tanh(score / softcap) before the mask is added.
    cu_seqlens: int32 or int64 [n + 1] offsets of n sequences along the rows of a batch of one, each for itself.
    """

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
    kernel: str = "",
    threads: int = 0,
    backward: bool = False,
) -> dict[str, Any]:
    """What `attention` would run: kernel, strips, key_block, keep_k, pack_v, threads, workspace_bytes, why, ..."""

def attention_keep(out: Tensor, *, dropout_p: float, seed: int) -> None:
    """Fill out[B, H, Lq, Lk], bool and contiguous, with the elements that dropout keeps under this seed."""
