"""Exact tier: integer operands whose sums fit float32, so that every kernel must match bit for bit.

Catches dropped, doubled and misplaced terms at every tail around every tile and block size.
"""

import pytest
import torch

from conftest import DTYPES, VECTOR_WIDTH, every_dtype, exact_product, layout_pairs, takes
from fastdl import _C, testing
from fastdl.testing import GuardedOutput, integer_matrix, tails


def blocks(kernel):
    """The plan for a problem larger than its blocks."""
    strides, levels = {"b_strides": (1, 4096)}, {"kernel": kernel["name"], "isa": kernel["isa"]}
    return _C.gemm_plan(4096, 4096, 4096, **strides, **levels, dtype=kernel["dtype"], threads=1)


def m_tails(kernel):
    """Every size of a register tile; on tiles of 16 rows, two by two in a call of 64, around each of these."""
    mr = kernel["mr"]
    if mr > 32:
        return sorted({2, 3, *tails(16), *tails(32), *tails(mr)})
    return [*range(1, mr + 2), 2 * mr + 1]


def n_tails(kernel):
    return sorted({*tails(kernel["nr"]), *tails(VECTOR_WIDTH[kernel["isa"]]), 2, 3})


def k_tails(kernel):
    kc = blocks(kernel)["kc"]
    two = 2 * kc + 3 if kc <= 1024 else 385  # longer: in test_k_blocks_and_parts
    return sorted({1, 2, 3, 7, 8, 15, 16, 17, 31, 33, kc - 1, kc, kc + 1, two} - {0})


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "accumulate"])
def test_every_tail(kernel, bias, accumulate, integers, guarded):
    sizes_m, sizes_n = m_tails(kernel), n_tails(kernel)
    for K in k_tails(kernel):
        a_all = integers((sizes_m[-1], K), K)
        bt_all = integers((sizes_n[-1], K), K)
        add = integers((sizes_n[-1],), 1) if bias else None
        before = 3.0 if accumulate else 0.0
        terms = [torch.tensor(before), *([add] if bias else [])]
        expected = exact_product(a_all, bt_all.t(), *terms)
        b_all = bt_all.t().contiguous()
        for M in sizes_m:
            for N in sizes_n:
                for b in (b_all[:, :N], bt_all[:N].t()):  # rows along N, rows along K
                    if not takes(kernel, a_all, b):
                        continue
                    out = guarded((M, N), fill=before if accumulate else float("nan"))
                    _C.gemm(out.view, a_all[:M], b, add[:N] if bias else None, accumulate, kernel=kernel["name"])
                    assert torch.equal(out.view, expected[:M, :N]), (M, N, K, b.stride())
                    out.assert_guards_intact()


@pytest.mark.parametrize("threads", [1, 2])
def test_k_blocks_and_parts(kernel, threads, integers, guarded):
    """K beyond two blocks, with a tail; C cut into parts of a few tiles, each with a tail."""
    mr, nr, kc = kernel["mr"], kernel["nr"], blocks(kernel)["kc"]
    for a_layout, b_layout in layout_pairs(kernel, ("contiguous", "transposed")):
        for M, N, K in [
            (2 * mr + 1, 2 * nr + 3, 2 * kc + 3),
            (6 * mr + 1, nr + 1, kc + 9),
            (mr + 1, 6 * nr + 1, kc + 9),
        ]:
            a = testing.LAYOUTS[a_layout](integers((M, K), K))
            b = testing.LAYOUTS[b_layout](integers((K, N), K))
            bias = integers((N,), 1)
            out = guarded((M, N), fill=-2.0)
            _C.gemm(out.view, a, b, bias, True, kernel=kernel["name"], threads=threads)
            assert torch.equal(out.view, exact_product(a, b, bias, torch.tensor(-2))), (a_layout, b_layout, M, N, K)
            out.assert_guards_intact()


@pytest.mark.rows(kind="tile")
@pytest.mark.parametrize("crossed, threads", [("mc", 1), ("mc", 2), ("nc", 1), ("nc", 2)])
def test_packed_blocks(kernel, crossed, threads, integers, guarded):
    check_packed_blocks(kernel, crossed, threads, integers, guarded)


@pytest.mark.rows(kind="tile")
def test_panels_reached_again(kernel, integers, guarded):
    """A weight along K that is packed panel by panel, in several blocks of columns, for several blocks of rows."""
    levels = {"kernel": kernel["name"], "isa": kernel["isa"], "dtype": kernel["dtype"], "threads": 1}
    K = min(blocks(kernel)["kc"], 600)
    plan = _C.gemm_plan(4096, 1 << 15, K, b_strides=(1, K), **levels)
    M, N = plan["mc"] + 37, plan["nc"] + 45
    if plan["one_panel"] or M * N > 2**24:
        pytest.skip("the caches of this machine hold every block of a problem that is still quick to multiply")
    a, bt = integers((M, K), K), integers((N, K), K)
    out = guarded((M, N), fill=float("nan"))
    _C.gemm(out.view, a, bt.t(), None, False, kernel=kernel["name"], threads=1)
    assert torch.equal(out.view, exact_product(a, bt.t())), (M, N, K)
    out.assert_guards_intact()


@pytest.mark.rows(kind="tile", dtype="float32")  # 16 bits: the sums that a part keeps bound it to fewer blocks
def test_packed_blocks_both_ways(kernel, integers, guarded):
    check_packed_blocks(kernel, "mc and nc", 1, integers, guarded)


def check_packed_blocks(kernel, crossed, threads, integers, guarded):
    """The output grown until the plan cuts it into several packed blocks along M, along N, along both."""
    K = 2 * blocks(kernel)["kc"] - 5
    M, N = (1024 if "mc" in crossed else 50), 1024

    def cut(plan):
        along_m = plan["pack_a"] and plan["mc"] * plan["grid"][0] < M
        along_n = plan["pack_b"] and plan["nc"] * plan["grid"][1] < N
        return ("mc" not in crossed or along_m) and ("nc" not in crossed or along_n)

    while True:
        a = integers((K, M), K).t()
        b = integers((K, -(-N // 512) * 512), K)[:, :N]  # rows that collide in L1 are packed
        out = guarded((M, N), fill=-2.0)
        if cut(_C.matmul_plan(out.view, a, b, kernel=kernel["name"], threads=threads)):
            break
        if M * N > 2**25:
            pytest.skip("the caches of this machine hold every block of a problem that is still quick to multiply")
        M, N = M + 512 * ("mc" in crossed), N + 1024 * ("nc" in crossed)
    bias = integers((N,), 1)
    _C.gemm(out.view, a, b, bias, True, kernel=kernel["name"], threads=threads)
    assert torch.equal(out.view, exact_product(a, b, bias, torch.tensor(-2))), (M, N, K)
    out.assert_guards_intact()


@pytest.mark.rows(kind="tile")
@pytest.mark.parametrize("threads", [1, 2])
def test_several_blocks_of_rows(kernel, threads, integers, guarded):
    """And panels and chunks of K, the last ones short; a weight in both layouts."""
    levels = {"kernel": kernel["name"], "isa": kernel["isa"], "dtype": kernel["dtype"], "threads": threads}
    N = 2 * kernel["nr"] + 45
    for K in (70, 449):
        plan = _C.gemm_plan(1 << 15, 512, K, b_strides=(1, K), **levels)
        M = min(plan["mc"], 800) * plan["grid"][0] + 37
        a, bt, bias = integers((M, K), K), integers((N, K), K), integers((N,), 1)
        for b in (bt.t(), bt.t().contiguous()):
            out = guarded((M, N), fill=float("nan"))
            _C.gemm(out.view, a, b, bias, False, kernel=kernel["name"], threads=threads)
            assert torch.equal(out.view, exact_product(a, b, bias)), (M, N, K, b.stride())
            out.assert_guards_intact()


@pytest.mark.rows(kind="tile", isa="amx")
@pytest.mark.parametrize("rows_of_a", [True, False])
@pytest.mark.parametrize("K", [1, 64, 500, 960])
def test_strips(kernel, rows_of_a, K, integers, guarded):
    """Several strips and blocks of B, and where A is packed for all of those, blocks of packed A; all the last ones
    short, and the last step along K. float32: several blocks along K, whose sums wait in C.
    """
    strides = {"a_strides": None if rows_of_a else (1, 9000), "b_strides": (1, K)}

    def planned(M, N):
        return _C.gemm_plan(M, N, K, kernel=kernel["name"], dtype=kernel["dtype"], threads=1, **strides)

    plan = planned(8192, 8192)
    assert plan["strips"]
    assert (plan["kc"] < K) == (kernel["dtype"] == "float32" and K > 256)
    M, N = min(plan["mc"], 2800) + 69, min(plan["nc"], 2000) + 45
    packs = plan["pack_a"]
    while packs and M < 3000 and planned(M, N)["mc"] >= M:  # blocks are even: this one may be cut otherwise
        M += 64
    assert not packs or plan["kc"] * kernel["planes"] < 700 or planned(M, N)["mc"] < M
    a = integers((M, K), K) if rows_of_a else integers((K, M), K).t()
    bt, bias = integers((N, K), K), integers((N,), 1)
    for b in (bt.t(), bt.t().contiguous()):
        for threads in (1, 2):
            out = guarded((M, N), fill=float("nan"))
            _C.gemm(out.view, a, b, bias, False, kernel=kernel["name"], threads=threads)
            assert torch.equal(out.view, exact_product(a, b, bias)), (M, N, K, b.stride())
            out.assert_guards_intact()


@pytest.mark.rows(kind="tile", isa="amx")
@pytest.mark.parametrize("M", [64, 65, 1000])
@pytest.mark.parametrize("K", [256, 520])
def test_strips_of_whole_blocks(kernel, M, K, integers, guarded):
    """The last block of the last strip waits for a call that finishes it; one that is packed before, too."""
    N = 96
    a, bt, bias = integers((M, K), K), integers((N, K), K), integers((N,), 1)
    expected = exact_product(a, bt.t(), bias)
    out = guarded((M, N), fill=float("nan"))
    _C.gemm(out.view, a, bt.t(), bias, False, kernel=kernel["name"], threads=2)
    assert torch.equal(out.view, expected)
    out.assert_guards_intact()
    pack = torch.empty(_C.pack_numel(K, N, kernel["name"]))
    _C.pack(pack, bt.t(), kernel["name"])
    out = guarded((M, N), fill=float("nan"))
    _C.linear_packed(out.view, a, pack, bias, N, kernel["name"], 2)
    assert torch.equal(out.view, expected)
    out.assert_guards_intact()


@pytest.mark.rows(kind="dot")
@pytest.mark.parametrize("K", [1024, 1025, 2500, 9000])
def test_dots_of_many_rows(kernel, K, integers, guarded):
    """Tiles of rows that share pieces of the columns, their lanes waiting; more tiles than wait at a time."""
    for M in (kernel["mr"] + 1, 3 * kernel["mr"], 19 * kernel["mr"] - 1):
        a, bt, bias = integers((M, K), K), integers((11, K), K), integers((11,), 1)
        out = guarded((M, 11), fill=float("nan"))
        _C.gemm(out.view, a, bt.t(), bias, False, kernel=kernel["name"], threads=2)
        assert torch.equal(out.view, exact_product(a, bt.t(), bias)), M
        out.assert_guards_intact()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear(kernel, threads, integers, guarded):
    mr, nr = kernel["mr"], kernel["nr"]
    for lead, K, N in (
        ((1,), 40, nr),
        ((), 17, nr + 1),
        ((2, mr + 1), 33, 2 * nr + 1),
        ((6 * mr + 1,), 129, 5 * nr + 3),
    ):
        x = integers((*lead, K), K)
        weight = integers((N, K), K)
        bias = integers((N,), 1)
        out = torch.full((*lead, N), float("nan"), dtype=x.dtype)
        _C.linear(out, x, weight, bias, kernel=kernel["name"], threads=threads)
        assert torch.equal(out, exact_product(x, weight.t(), bias)), (lead, N, K)
        _C.linear(out, x, weight, kernel=kernel["name"], threads=threads)
        assert torch.equal(out, exact_product(x, weight.t())), (lead, N, K)


def unpacked(pack, K, kernel):
    """The panels of a pack as rows: [N rounded up to panels, K rounded up to whole steps]."""
    nr, pairs = kernel["nr"], kernel["k_unit"] == 2  # a float of a panel holds two elements that follow each other
    if kernel["k_step"] == 32:  # tiles: [panel][K / 32][part][columns / 16][pair][column of 16]
        steps, parts = -(-K // 32), kernel["planes"]
        panels = len(pack) // (steps * parts * nr * 16)
        tiles = pack[: panels * steps * parts * nr * 16].view(panels, steps, parts, nr // 16, 16, 16)
        pairs_of_rows = tiles.permute(2, 0, 3, 5, 1, 4).contiguous().view(torch.bfloat16)
        return pairs_of_rows.view(parts, panels * nr, steps * 32).float().sum(0).to(DTYPES[kernel["dtype"]])
    steps = (K + 1) // 2 if pairs else K
    floats = pack.view(-1, steps, nr).permute(0, 2, 1).flatten()
    return floats.view(torch.bfloat16).view(-1, 2 * steps) if pairs else floats.view(-1, steps)


def assert_pack_holds(pack, b, kernel):
    """Every element of b [K, N] once, zeros elsewhere."""
    K, N = b.shape
    rows = unpacked(pack, K, kernel)
    expected = torch.zeros_like(rows)
    expected[:N, :K] = b.t()
    assert torch.equal(rows, expected), (N, K)


@pytest.mark.rows(kind="tile")
def test_linear_packed(kernel, integers, guarded):
    """Frozen packs: the panels hold every weight once, zeros elsewhere, and multiply as the plain weight."""
    name, nr = kernel["name"], kernel["nr"]
    kc = blocks(kernel)["kc"]
    for N in tails(nr):
        for K in (1, 7, kc - 1, kc, kc + 1):
            weight = integers((N, K), K)
            pack = torch.full((_C.pack_numel(K, N, name),), float("nan"))
            _C.pack(pack, weight.t(), name)
            assert_pack_holds(pack, weight.t(), kernel)
            bias = integers((N,), 1)
            for M in (1, kernel["mr"], 2 * kernel["mr"] + 1):
                x = integers((M, K), K)
                out = guarded((M, N))
                _C.linear_packed(out.view, x, pack, bias, N, name)
                assert torch.equal(out.view, exact_product(x, weight.t(), bias)), (M, N, K)
                out.assert_guards_intact()


@pytest.mark.rows(kind="tile")
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_pack_in_every_layout(kernel, layout, integers, guarded):
    name, nr = kernel["name"], kernel["nr"]
    for N in tails(nr):
        for K in (19, 70):
            b = testing.LAYOUTS[layout](integers((K, N), 1))
            pack = torch.full((_C.pack_numel(K, N, name),), float("nan"))
            _C.pack(pack, b, name)
            assert_pack_holds(pack, b, kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_pack_kernel_is_a_row_of_the_table(dtype):
    row = {row["name"]: row for row in _C.kernels("gemm")}[_C.pack_kernel(dtype)]
    assert row["available"] and row["kind"] == "tile" and row["dtype"] == dtype


def test_forced_kernel_is_the_one_that_runs(kernel, integers):
    a, b = integers((20, 30), 30), integers((40, 30), 30).t()
    out = torch.empty(20, 40, dtype=a.dtype)
    _C.reset_counters()
    _C.gemm(out, a, b, kernel=kernel["name"])
    _C.linear(out, a, b.t(), kernel=kernel["name"])
    assert {name: n for name, n in _C.counters().items() if n} == {kernel["name"]: 2}


@every_dtype
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sum_rows(layout, threads, dtype, generator):
    for shape in ((1, 1), (1, 70), (300, 1), (33, 17), (2, 5, 16), (1000, 259), (4, 300, 259)):
        x = testing.LAYOUTS[layout](integer_matrix(shape, 2000, generator, dtype))
        out = GuardedOutput((1, shape[-1]), dtype=dtype)
        _C.sum_rows(out.view[0], x, threads=threads)
        assert torch.equal(out.view[0], x.double().flatten(0, -2).sum(0).to(dtype)), shape
        out.assert_guards_intact()


@every_dtype
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 0)])
def test_sum_rows_of_nothing_is_zero(shape, dtype):
    out = torch.full((shape[-1],), float("nan"), dtype=dtype)
    _C.sum_rows(out, torch.empty(shape, dtype=dtype))
    assert torch.equal(out, torch.zeros(shape[-1], dtype=dtype))


WGRAD_SHAPES = [((), 5, 7), ((1,), 33, 17), ((40,), 33, 17), ((2, 9), 1, 30), ((3, 4, 5), 30, 1), ((700,), 70, 130)]


@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lead, N, K", WGRAD_SHAPES, ids=str)
def test_linear_wgrad(lead, N, K, threads, dtype, generator):
    """Contracted over all leading dimensions, also where they do not merge into rows of one stride."""
    for permute in (False, True):
        grad = integer_matrix((*lead, N), 700, generator, dtype)
        x = integer_matrix((*lead, K), 700, generator, dtype)
        if permute and len(lead) > 1:
            grad, x = grad.transpose(0, len(lead) - 1), x.transpose(0, len(lead) - 1)
        out = GuardedOutput((N, K), dtype=dtype)
        _C.linear_wgrad(out.view, grad, x, threads=threads)
        rows = grad.reshape(-1, N).double(), x.reshape(-1, K).double()
        assert torch.equal(out.view, (rows[0].t() @ rows[1]).to(dtype))
        out.assert_guards_intact()


@every_dtype
@pytest.mark.parametrize("x_layout", testing.LAYOUTS)
@pytest.mark.parametrize("grad_layout", testing.LAYOUTS)
def test_linear_wgrad_layouts(grad_layout, x_layout, dtype, generator):
    grad = testing.LAYOUTS[grad_layout](integer_matrix((2, 21, 37), 42, generator, dtype))
    x = testing.LAYOUTS[x_layout](integer_matrix((2, 21, 35), 42, generator, dtype))
    out = GuardedOutput((37, 35), dtype=dtype)
    _C.linear_wgrad(out.view, grad, x)
    rows = grad.reshape(-1, 37).double(), x.reshape(-1, 35).double()
    assert torch.equal(out.view, (rows[0].t() @ rows[1]).to(dtype))
    out.assert_guards_intact()


@every_dtype
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_linear_wgrad_of_nothing_is_zero(lead, dtype):
    out = torch.full((4, 5), float("nan"), dtype=dtype)
    _C.linear_wgrad(out, torch.empty(*lead, 4, dtype=dtype), torch.empty(*lead, 5, dtype=dtype))
    assert torch.equal(out, torch.zeros(4, 5, dtype=dtype))
