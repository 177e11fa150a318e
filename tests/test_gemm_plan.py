"""plan(): pure, for any level on any machine, and honest about workspace, grid and threads."""

import itertools

import pytest
import torch

from conftest import DTYPES
from fastdl import _C

LEVELS = ["scalar", "avx2", "avx512", "avx512bf16", "amx"]
SHAPES = [(1, 1, 1), (1, 4096, 4096), (4096, 1, 4096), (5, 7, 3), (128, 45, 45), (384, 1024, 1024), (384, 1024, 4096)]
SHAPES += [
    (4096, 4096, 4096),
    (1576, 768, 3072),
    (512, 28672, 4096),
    (100000, 8, 8),
    (64, 64, 100000),
    (0, 5, 5),
    (5, 5, 0),
]
CACHES = {"l1d": 48 << 10, "l2": 2 << 20, "l3": 32 << 20}


ROWS = {row["name"]: row for row in _C.kernels("gemm")}


def up(n, tile):
    return -(-n // tile) * tile


def keeps_sums(row):
    """Whether sums wait in scratch: results in 16 bits, and operands in parts."""
    return row["dtype"] != "float32" or row["precision"] != "fma"


def part_rows(plan, row):
    """Rows of the largest part: tiles are cut between multiples of 32."""
    unit = 32 if row["isa"] == "amx" else 1
    return max(1, min(plan["M"], -(-up(plan["M"], unit) // unit // plan["grid"][0]) * unit))


def repairs(row):
    """Whether some elements are computed again: operands in parts."""
    return row["isa"] == "amx" and row["dtype"] != "bfloat16"


def plans(**options):
    """(M, N, K, isa, threads, dtype, plan) over all of them."""
    for (M, N, K), isa, threads, dtype in itertools.product(SHAPES, LEVELS, (1, 2, 8, 64), DTYPES):
        plan = _C.gemm_plan(M, N, K, isa=isa, threads=threads, dtype=dtype, **CACHES, **options)
        yield M, N, K, isa, threads, dtype, plan


def test_same_question_same_answer():
    first = [plan for *_, plan in plans()]
    torch.set_num_threads(torch.get_num_threads())
    assert first == [plan for *_, plan in plans()]


def test_levels_this_machine_lacks_can_be_planned():
    compiled = _C.build_info()["isa_compiled"]
    for isa in LEVELS:
        if isa in compiled:
            for dtype in DTYPES:
                plan = _C.gemm_plan(512, 512, 512, isa=isa, threads=2, dtype=dtype, **CACHES)
                assert LEVELS.index(plan["isa"]) <= LEVELS.index(isa)
                assert plan["kernel"] in {row["name"] for row in _C.kernels("gemm")}


def test_plan_names_a_row_with_its_tile():
    rows = {row["name"]: row for row in _C.kernels("gemm")}
    for M, N, K, isa, _, dtype, plan in plans():
        row = rows[plan["kernel"]]
        assert row["dtype"] == dtype
        assert (plan["M"], plan["N"], plan["K"], plan["batch"]) == (M, N, K, 1)
        assert 1 <= plan["mr"] <= row["mr"]  # M cut evenly may need fewer rows
        assert (plan["nr"], plan["isa"]) == (row["nr"], row["isa"])
        assert LEVELS.index(row["isa"]) <= LEVELS.index(isa)
        assert plan["op"] == "gemm" and plan["why"]


def test_forced_kernel_is_planned(kernel):
    plan = _C.gemm_plan(300, 300, 300, b_strides=(1, 300), kernel=kernel["name"], threads=2, dtype=kernel["dtype"])
    assert plan["kernel"] == kernel["name"]


@pytest.mark.parametrize(
    "a_strides, b_strides", [(None, None), ((1, 5000), (1, 5000)), ((7, 3), (9, 2)), ((0, 1), (1, 0))]
)
def test_workspace_is_the_packed_blocks_and_the_sums(a_strides, b_strides):
    """A thread: A block mc x kc, B block kc x nc (half for pairs of 16 bits, times the parts), float32 sums of a part
    of C in 16 bits, from parts or streamed, or of a tile where K is one block (two of them where C is turned),
    operands of a 32x32 block of FMA; each with at most two pages of slack; 0 where there is none.
    """
    for _, N, K, _, _, _, plan in plans(a_strides=a_strides, b_strides=b_strides):
        row = ROWS[plan["kernel"]]
        once = row["kind"] == "tile" and plan["kc"] >= K
        kc = up(plan["kc"], row["k_step"]) // row["k_unit"] * row["planes"]
        blocks = plan["pack_a"] * plan["mc"] * kc + plan["pack_b"] * kc * (
            plan["nr"] if plan["one_panel"] else plan["nc"]
        )
        along_n = plan["grid"][1]
        columns = max(1, min(N, -(-up(N, plan["nr"]) // plan["nr"] // along_n) * plan["nr"]))
        rows = part_rows(plan, row)
        sums = row["mr"] * row["nr"] * (1 + plan["turned"]) if once and keeps_sums(row) else 0
        apart = plan["span"] < K
        if apart or (keeps_sums(row) and not once):
            sums = rows * (up(columns, row["nr"]) if row["k_step"] == 32 else columns) * (1 + apart)
        elif plan["streamed"]:
            sums = rows * plan["nc"]
        again = row["mr"] * 32 + 192 * (14 + 32) if repairs(row) else 0
        if plan["strips"]:  # one of A, or all that is packed for several blocks of B; a block of sums
            kept = plan["pack_a"] and plan["nc"] < up(columns, row["nr"])
            blocks = (plan["mc"] if kept else 32) * kc + plan["pack_b"] * kc * plan["nc"]
            sums, again = 32 * 32, 0
        again += rows + columns if row["precision"] != "fma" else 0
        slack = 8192 * ((plan["pack_a"] or plan["strips"]) + plan["pack_b"] + (sums > 0) + repairs(row))
        assert plan["workspace_bytes"] % plan["threads"] == 0
        floats, given = blocks + sums + again, plan["workspace_bytes"] // plan["threads"]
        assert 4 * floats <= given <= 4 * floats + slack, plan


@pytest.mark.parametrize("a_strides, b_strides", [(None, None), ((1, 5000), (1, 5000))])
def test_blocks_are_whole_tiles_and_no_larger_than_the_problem(a_strides, b_strides):
    for M, N, K, *_, plan in plans(a_strides=a_strides, b_strides=b_strides):
        assert plan["mc"] % plan["mr"] == 0 and plan["nc"] % plan["nr"] == 0, plan
        assert plan["mc"] < M + plan["mr"] or M == 0, plan
        assert plan["nc"] < N + plan["nr"] or N == 0, plan
        assert plan["kc"] < K + max(16, ROWS[plan["kernel"]]["k_step"]) or K == 0, plan


@pytest.mark.parametrize("M", [7, 16, 32, 100, 128, 200])
def test_rows_that_fit_half_of_l2_are_one_block(kernel, M):
    """Cut in two, they would have all of B read or packed twice."""
    levels = {"kernel": kernel["name"], "isa": kernel["isa"], "dtype": kernel["dtype"], "threads": 1}
    for K in (64, 600):
        plan = _C.gemm_plan(M, 700, K, b_strides=(1, K), **levels, **CACHES)
        assert plan["mc"] >= M, plan


def test_workspace_stays_near_the_caches():
    """Packed in pieces: never the whole operand (4096^3 would be 128 MB)."""
    for *_, threads, _, plan in plans():
        assert plan["workspace_bytes"] <= max(threads, 1) * 8 * CACHES["l2"], plan


def test_threads_are_one_or_all_and_the_grid_covers_the_output():
    for M, N, _, _, threads, _, plan in plans():
        assert plan["threads"] in (1, threads)
        along_m, along_n = plan["grid"]
        assert along_m * along_n >= plan["threads"] or plan["batch"] > 1 or min(M, N) == 0, plan
        assert along_m >= 1 and along_n >= 1, plan
        if plan["threads"] == 1 and not keeps_sums(ROWS[plan["kernel"]]):  # else cut until the sums of a part fit
            assert (along_m, along_n) == (1, 1), plan


def test_tiny_problems_stay_serial_and_large_ones_do_not():
    assert _C.gemm_plan(8, 8, 8, threads=2)["threads"] == 1
    assert _C.gemm_plan(1024, 1024, 1024, threads=2)["threads"] == 2


def test_sizes_near_the_end_of_64_bits():
    for M, N, K in itertools.product((1, 2**31, 2**40), repeat=3):
        plan = _C.gemm_plan(M, N, K, threads=64, **CACHES)
        assert 0 <= plan["workspace_bytes"] <= 64 * 8 * CACHES["l2"], plan


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_a_part_are_at_most_4_mib(dtype):
    for M, N in ((1, 4096), (4096, 4096), (100000, 8), (3, 2**24), (2**24, 1)):
        plan = _C.gemm_plan(M, N, 10000, dtype=dtype, threads=3, **CACHES)
        row = ROWS[plan["kernel"]]
        again, line = (64 << 10) * repairs(row), up(plan["kc"], row["k_step"]) // row["k_unit"] * row["planes"]
        assert plan["workspace_bytes"] <= 3 * ((4 << 20) + 3 * 8192 + again + 4 * (plan["mc"] + plan["nc"]) * line), (
            plan
        )
        along_n = plan["grid"][1]
        assert part_rows(plan, row) * min(N, -(-up(N, plan["nr"]) // plan["nr"] // along_n) * plan["nr"]) <= 2**20, plan


def test_dtype_without_that_kernel_is_an_error():
    rows = {row["dtype"]: row["name"] for row in _C.kernels("gemm")}
    for dtype, other in itertools.permutations(rows, 2):
        with pytest.raises(RuntimeError, match=rf"{rows[other]}.*expected.*got"):
            _C.gemm_plan(8, 8, 8, dtype=dtype, kernel=rows[other], b_strides=(1, 8))
    with pytest.raises(RuntimeError, match=r"dtype.*float64"):
        _C.gemm_plan(8, 8, 8, dtype="float64")


def test_what_lost_is_listed_with_a_reason():
    plan = _C.gemm_plan(512, 512, 512, isa="avx2", threads=2)
    assert plan["candidates"] and all(plan["kernel"] not in c.split() for c in plan["candidates"])
    names = [row["name"] for row in _C.kernels("gemm")]
    for line in plan["candidates"]:
        assert any(name in line for name in names) and len(line.split()) > 1, line


def test_plan_of_tensors_is_the_plan_of_their_sizes():
    x, w = torch.empty(2, 150, 300), torch.empty(400, 300)
    plan = _C.linear_plan(torch.empty(2, 150, 400), x, w)
    same = _C.gemm_plan(300, 400, 300, b_strides=(1, 300))
    assert plan == same
    plan = _C.matmul_plan(torch.empty(5, 20, 30), torch.empty(5, 20, 40), torch.empty(5, 40, 30))
    assert plan == _C.gemm_plan(20, 30, 40, batch=5)


def test_log_prints_each_new_plan_once(run_python):
    code = (
        "import os, torch\n"
        "from fastdl import _C\n"
        "os.dup2(1, 2)\n"  # the log goes to stderr; run_python returns stdout
        "for size in (256, 256, 300):\n"
        "    x = torch.ones(size, size)\n"
        "    _C.gemm(torch.empty(size, size), x, x)\n"
    )
    name = _C.gemm_plan(256, 256, 256)["kernel"]
    log = run_python("-c", code, env={"FASTDL_LOG": "1"})
    chosen = [line for line in log.splitlines() if name in line and not line.startswith(" ")]
    assert len(chosen) == 2, log
    assert run_python("-c", code, env={"FASTDL_LOG": ""}) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frozen_layers_of_few_rows_read_the_weight(dtype):
    """Where a level has a dot kernel: for one row the weight, for many the pack."""
    name = str(dtype).removeprefix("torch.")
    dots = [
        row["name"] for row in _C.kernels("gemm") if row["dtype"] == name and row["kind"] == "dot" and row["available"]
    ]
    weight = torch.zeros(512, 512, dtype=dtype)

    def kernel(M):
        x = torch.zeros(M, 512, dtype=dtype)
        return _C.linear_plan(torch.zeros(M, 512, dtype=dtype), x, weight, packed=True)["kernel"]

    assert (kernel(1) in dots) == bool(dots)
    assert kernel(100) == _C.pack_kernel(name)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_threads_share_a_frozen_pack_of_few_rows(isa):
    """Split along N: along M each would read all of it."""
    for M in (2, 4, 16):
        assert _C.gemm_plan(M, 4096, 4096, packed=True, isa=isa, threads=2)["grid"] == (1, 2)
