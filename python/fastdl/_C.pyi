"""Stubs of the native module. Tensors cross as `torch.Tensor`; outputs are allocated by the caller.

Every function that takes tensors checks rank, shape, dtype (float32, bfloat16 or float16, the same for all; packs are
float32), device (cpu) and overlap itself, raises
`TypeError` (not a tensor) or `RuntimeError` (anything else) with a message that names operation, argument,
expected and got, and releases the GIL while it computes.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from torch import Tensor

__version__: str

class KernelRow(TypedDict):
    name: str  # e.g. "gemm_f32_14x32_avx512"; the same name in the log, the tests and the bench rows
    isa: str  # "scalar" | "avx2" | "avx512" | "avx512bf16" | "amx"
    dtype: str  # of the operands in memory: "float32", "bfloat16" or "float16"
    precision: str  # of products: "fma", "ieee", "tf32" or "bf16"; the last three are float32 split into bfloat16
    kind: str  # gemm: "tile": C tile += packed or strided A x panel of B; "dot": both operands contiguous along K
    # attention: "tile": packed panels of K; "decode": few query rows, K and V in place; rnn: the cell
    k_unit: int  # elements along K in a float of a packed panel
    k_step: int  # packed panels are padded to a multiple of this many elements along K
    planes: int  # parts that each operand is split into
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
    span: int  # elements along K whose sums are taken together; those of the next are added when they are complete
    pack_a: bool
    pack_b: bool
    strips: bool  # strips of 32 rows of A against a block of B in L2
    turned: bool  # C' = B' A': rows of B are read as they lie, A is packed
    one_panel: bool  # B is packed panel by panel, each used up before the next
    finish_cols: int  # columns of C that the dot kernel finishes at a time
    streamed: bool  # B is read in place, a few of its rows at a time
    grid: tuple[int, int]  # how C is cut over threads: (along M, along N); batches are cut first
    threads: int
    workspace_bytes: int  # shared + threads x per_thread
    why: str
    candidates: list[str]  # what lost, each with the reason, for FASTDL_LOG=1

# --- the machine and the build --------------------------------------------------------------------------------
def build_info() -> dict[str, Any]:
    """compiler, openmp (bool), isa_compiled (list), isa_missing ({isa: reason}), cuda ({"built", "reason"}),
    amx_emulated (bool: the level amx runs on a model of the tile unit)."""

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
def recomputed() -> int:
    """Elements that kernels for parts of float32 or float16 computed a second time, by FMA, so far: Inf, NaN, and those
    of tiny rows or columns."""

# --- GEMM -----------------------------------------------------------------------------------------------------
def kernels(op: str) -> list[KernelRow]:
    """The kernel table of an operation ("gemm", "attention", "rnn"), every row of this build."""

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
    precision: str = "ieee",  # asked of float32: "fma", "ieee", "tf32", "bf16"
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
    switch: str = "matmul",  # or conv, rnn: which of torch.backends.mkldnn.*.fp32_precision is asked
) -> None:
    """out[..., M, N] (+)= a[..., M, K] @ b[..., K, N] (+ bias[N]).

    a and b may have any strides, 0 included; their batch dimensions broadcast against out's. out is row-major in
    its last two dimensions (unit stride along N) with any batch strides and overlaps neither input.
    kernel forces a row of the table; threads > 0 forces the team size (default: design, section 5).
    """

def linear(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel: str = "",
    threads: int = 0,
    switch: str = "matmul",  # as in gemm
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
    packed: Tensor | None = None,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """z = input @ weight^T + bias; pre = z; out = activation(z) + residual, in one pass, rounded once each.

    activation: none, relu, gelu (exact), gelu_tanh or silu. residual and pre have the shape and strides of out.
    packed: the frozen pack of the weight for the level's own kernel, read in its place where that is faster.
    """

def activation_grad(out: Tensor, grad: Tensor, pre: Tensor, activation: str, threads: int = 0) -> None:
    """out = grad * activation'(pre), elementwise; all contiguous and of one shape."""

def linear_plan(
    out: Tensor, input: Tensor, weight: Tensor, packed: bool = False, kernel: str = "", threads: int = 0
) -> Plan:
    """The plan `linear` (or `linear_packed`) would run for these tensors."""

def matmul_plan(out: Tensor, a: Tensor, b: Tensor, kernel: str = "", threads: int = 0) -> Plan:
    """The plan `gemm` would run for these tensors."""

def linear_wgrad(
    out: Tensor,
    grad: Tensor,
    input: Tensor,
    accumulate: bool = False,
    threads: int = 0,
    switch: str = "matmul",  # as in gemm
) -> None:
    """out[N, K] (+)= grad[..., N]^T @ input[..., K], contracted over all leading dimensions; any strides."""

def plain_rules(
    types: tuple[type, ...],
    probes: tuple[Callable[[], object], ...],
    settings: tuple[tuple[dict[str, object], str, object], ...],
    grad_enabled: Callable[[], bool],
) -> None:
    """What plain calls are: tensors exactly of these types; probes all false; names[name] == value in all settings."""

def eager_is_plain() -> bool:
    """Whether the probes and settings of `plain_rules` say so."""

def plain_linear(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, /) -> Tensor | bool | None:
    """The result of a plain call; True where autograd must record it; None where it is not plain or does not fit."""

def plain_matmul(input: Tensor, other: Tensor, /) -> Tensor | bool | None:
    """As `plain_linear`."""

def linear_result(input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, /) -> Tensor | None:
    """`linear`, with the weight's pack as in linear_fused, into a new tensor; None where the arguments do not fit."""

def matmul_result(a: Tensor, b: Tensor, /) -> Tensor | None:
    """`gemm` of matrices, or of batches of them, into a new tensor; None where the arguments do not fit."""

def rnn_cell(
    mode: str,
    H: int,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    /,
) -> Any:
    """The new h, or (h, c) of lstm, of one step without grad: x [B, I], h, c [B, H]; None where the call is not plain,
    or does not fit."""

def linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, ...] | None:
    """The output shape if `linear` can take these as they are; None for whatever it cannot (never raises)."""

def matmul_shape(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    """The output shape if `gemm` can take these as they are (both at least 2-D); None otherwise (never raises)."""

def sum_rows(out: Tensor, x: Tensor, threads: int = 0) -> None:
    """out[N] = sum of x[..., N] over all leading dimensions: the bias gradient. Fixed order, any strides."""

# --- frozen packs: the weight in panel order, [ceil(N/nr)][K][nr], zero padded, as a 1-D float32 tensor ---------
def pack_kernel(dtype: str = "float32") -> str:
    """The table row that frozen packs are laid out for on this machine, at the precision asked of float32 now."""

def pack_numel(K: int, N: int, kernel: str) -> int: ...
def pack(out: Tensor, b: Tensor, kernel: str) -> None:
    """Write b[K, N] (any strides) in panel order into out[pack_numel(K, N, kernel)]."""

def linear_packed(
    out: Tensor,
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    N: int,
    kernel: str,
    threads: int = 0,
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
    kernel: str = "",
    threads: int = 0,
) -> None:
    """Gradients of `attention`, each where it is not None, from its out and lse; unit stride in the last dimension.

    dmask: float32, sizes 1 where the mask is broadcast; summed over what it is broadcast along.
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
    isa: str = "",
    precision: str = "",
) -> dict[str, Any]:
    """What `attention` would run: kernel, strips, key_block, keep_k, pack_v, threads, workspace_bytes, why, ...

    isa, precision: those of another machine and setting; "" as they are now.
    """

def attention_keep(out: Tensor, *, dropout_p: float, seed: int) -> None:
    """Fill out[B, H, Lq, Lk], bool and contiguous, with the elements that dropout keeps under this seed."""

# --- recurrent layers -----------------------------------------------------------------------------------------
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
    *,
    mode: str,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """One layer in one direction over a sequence: gates = x_gates + h @ w_hh^T + b_hh, then the cell of torch's.

    mode: lstm, gru, rnn_tanh or rnn_relu. x_gates = x @ w_ih^T + b_ih [T, B, gates*H], contiguous; y [T, B, P] with
    any strides but a unit one in the last dimension; h0, h_n [B, P], c0, c_n [B, H]. batch_sizes (int64, positive, not
    rising): packed, x_gates and y are [rows, ...]. w_hr [P, H]: projected, lstm only. None: zeros, or not wanted.
    saved, of rnn_saved_shape and contiguous, gets what rnn_backward needs; x_gates may be its beginning.
    """

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
    *,
    mode: str,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    d_recurrent: Tensor | None = None,
    d_hidden: Tensor | None = None,
    hidden: Tensor | None = None,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """The gradients of x_gates, h0 and c0; those of the weights are products of what this writes.

    gru: d_recurrent [..., H], the gradient of h @ w_n^T + b_n. Projected: d_hidden [..., P], the whole gradient of h,
    and hidden [..., H], what was projected. All contiguous, as are d_gates and saved.
    """

def advise_huge_pages(out: Tensor) -> None:
    """Asks for huge pages under a tensor of 32 MB and more that is about to be written for the first time."""

def rnn_saved_shape(mode: str, rows: int, B: int, H: int, P: int) -> tuple[int, int]: ...
def rnn_plan(
    T: int,
    B: int,
    H: int,
    P: int = 0,
    *,
    mode: str = "lstm",
    backward: bool = False,
    isa: str = "",
    threads: int = 0,
    kernel: str = "",
    dtype: str = "float32",
    precision: str = "",  # "": torch.backends.mkldnn.rnn.fp32_precision
    l2: int = 0,  # 0: this machine's
) -> dict[str, Any]:
    """The plan for these sizes (P > 0: projected), on any level: kernel, product, direct (W_hh read in place, or None),
    units, row_block, threads, workspace_bytes, why, candidates."""

# --- convolution: x [N, C, ...], y [N, K, ...], w [K, C/groups, ...] with 1 to 3 spatial dimensions ----------------
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
    pack: Tensor | None = None,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """y = activation(z) + residual, z(n,k,o) = sum_{c,t} w(k,c,t) x(n, c, o*stride - padding + t*dilation) + bias(k).

    x and w have any strides; y, with residual and pre in the same layout, a unit one in the channels or the last
    dimension. padding is that before each dimension; the one behind follows from y. pre, if any, gets z; pack, from
    conv_pack, is read in place of w.
    """

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
    pack: Tensor | None = None,
    kernel: str = "",
    threads: int = 0,
) -> None:
    """dx, the gradient of x from that of y; with bias [C] and the rest, a transposed convolution of dy."""

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
    kernel: str = "",
    threads: int = 0,
) -> None:
    """dw, the gradient of w; dbias [K], if any, gets the sums of dy."""

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
    isa: str = "",
    threads: int = 0,
    kernel: str = "",
    frozen: bool = False,
    precision: str = "ieee",  # asked of float32: "fma", "ieee", "tf32", "bf16"
) -> dict[str, Any]:
    """The plan for these shapes on any level, pass_ "forward", "dgrad" or "wgrad": kernel, schedule, why, ..."""

def conv_pack_numel(
    pass_: str,
    w_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    dtype: str = "float32",
) -> int: ...
def conv_pack(
    out: Tensor,
    pass_: str,
    w: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    threads: int = 0,
) -> None:
    """Write w in the order that pass_ "forward" or "dgrad" reads on this machine into out[conv_pack_numel(...)]."""
