"""Exact tier: integer operands whose sums fit float32, so that every kernel must match bit for bit.

Catches dropped, doubled and misplaced terms at every tail around every tile and block size.
"""

import pytest
import torch

from conftest import VECTOR_WIDTH, layout_pairs, takes
from fastdl import _C, testing
from fastdl.testing import GuardedOutput, integer_matrix, tails


def blocks(kernel):
    """The plan for a problem larger than its blocks."""
    return _C.gemm_plan(4096, 4096, 4096, b_strides=(1, 4096), kernel=kernel["name"], isa=kernel["isa"], threads=1)


def exact_product(a, b):
    return (a.double() @ b.double()).float()


def m_tails(kernel):
    mr = kernel["mr"]
    return [*range(1, mr + 2), 2 * mr + 1]


def n_tails(kernel):
    return sorted({*tails(kernel["nr"]), *tails(VECTOR_WIDTH[kernel["isa"]]), 2, 3})


def k_tails(kernel):
    kc = blocks(kernel)["kc"]
    return sorted({1, 2, 3, 7, 8, 15, 16, 17, 31, 33, kc - 1, kc, kc + 1, 2 * kc + 3} - {0})


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "accumulate"])
def test_every_tail(kernel, bias, accumulate, generator):
    sizes_m, sizes_n = m_tails(kernel), n_tails(kernel)
    for K in k_tails(kernel):
        a_all = integer_matrix((sizes_m[-1], K), K, generator)
        bt_all = integer_matrix((sizes_n[-1], K), K, generator)
        add = integer_matrix((sizes_n[-1],), 1, generator) if bias else None
        before = 3.0 if accumulate else 0.0
        expected = exact_product(a_all, bt_all.t()) + before + (add if bias else 0.0)
        b_all = bt_all.t().contiguous()
        for M in sizes_m:
            for N in sizes_n:
                for b in (b_all[:, :N], bt_all[:N].t()):  # rows along N, rows along K
                    if not takes(kernel, a_all, b):
                        continue
                    out = GuardedOutput((M, N), fill=before if accumulate else float("nan"))
                    _C.gemm(out.view, a_all[:M], b, add[:N] if bias else None, accumulate, kernel=kernel["name"])
                    assert torch.equal(out.view, expected[:M, :N]), (M, N, K, b.stride())
                    out.assert_guards_intact()


@pytest.mark.parametrize("threads", [1, 2])
def test_k_blocks_and_parts(kernel, threads, generator):
    """K beyond two blocks, with a tail; C cut into parts of a few tiles, each with a tail."""
    mr, nr, kc = kernel["mr"], kernel["nr"], blocks(kernel)["kc"]
    for a_layout, b_layout in layout_pairs(kernel, ("contiguous", "transposed")):
        for M, N, K in [
            (2 * mr + 1, 2 * nr + 3, 2 * kc + 3),
            (6 * mr + 1, nr + 1, kc + 9),
            (mr + 1, 6 * nr + 1, kc + 9),
        ]:
            a = testing.LAYOUTS[a_layout](integer_matrix((M, K), K, generator))
            b = testing.LAYOUTS[b_layout](integer_matrix((K, N), K, generator))
            bias = integer_matrix((N,), 1, generator)
            out = GuardedOutput((M, N), fill=-2.0)
            _C.gemm(out.view, a, b, bias, True, kernel=kernel["name"], threads=threads)
            assert torch.equal(out.view, exact_product(a, b) + bias - 2), (a_layout, b_layout, M, N, K)
            out.assert_guards_intact()


@pytest.mark.parametrize("crossed, threads", [("mc", 1), ("mc", 2), ("nc", 1), ("nc", 2), ("mc and nc", 1)])
def test_packed_blocks(kernel, crossed, threads, generator):
    """The output grown until the plan cuts it into several packed blocks along M, along N, along both."""
    if kernel["kind"] == "dot":
        pytest.skip("packs nothing")
    K = 2 * blocks(kernel)["kc"] - 5
    M, N = (1024 if "mc" in crossed else 50), 1024

    def cut(plan):
        along_m = plan["pack_a"] and plan["mc"] * plan["grid"][0] < M
        along_n = plan["pack_b"] and plan["nc"] * plan["grid"][1] < N
        return ("mc" not in crossed or along_m) and ("nc" not in crossed or along_n)

    while True:
        a = integer_matrix((K, M), K, generator).t()
        b = integer_matrix((K, -(-N // 512) * 512), K, generator)[:, :N]  # rows that collide in L1 are packed
        out = GuardedOutput((M, N), fill=-2.0)
        if cut(_C.matmul_plan(out.view, a, b, kernel=kernel["name"], threads=threads)):
            break
        if M * N > 2**25:
            pytest.skip("the caches of this machine hold every block of a problem that is still quick to multiply")
        M, N = M + 512 * ("mc" in crossed), N + 1024 * ("nc" in crossed)
    bias = integer_matrix((N,), 1, generator)
    _C.gemm(out.view, a, b, bias, True, kernel=kernel["name"], threads=threads)
    assert torch.equal(out.view, exact_product(a, b) + bias - 2), (M, N, K)
    out.assert_guards_intact()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear(kernel, threads, generator):
    mr, nr = kernel["mr"], kernel["nr"]
    for lead, K, N in (
        ((1,), 40, nr),
        ((), 17, nr + 1),
        ((2, mr + 1), 33, 2 * nr + 1),
        ((6 * mr + 1,), 129, 5 * nr + 3),
    ):
        x = integer_matrix((*lead, K), K, generator)
        weight = integer_matrix((N, K), K, generator)
        bias = integer_matrix((N,), 1, generator)
        out = torch.full((*lead, N), float("nan"))
        _C.linear(out, x, weight, bias, kernel=kernel["name"], threads=threads)
        assert torch.equal(out, exact_product(x, weight.t()) + bias), (lead, N, K)
        _C.linear(out, x, weight, kernel=kernel["name"], threads=threads)
        assert torch.equal(out, exact_product(x, weight.t())), (lead, N, K)


def test_linear_packed(kernel, generator):
    """Frozen packs: the panels hold every weight once, zeros elsewhere, and multiply as the plain weight."""
    if kernel["kind"] != "tile":
        pytest.skip("frozen packs are laid out for tile kernels")
    name, nr = kernel["name"], kernel["nr"]
    kc = blocks(kernel)["kc"]
    for N in tails(nr):
        for K in (1, 7, kc - 1, kc, kc + 1):
            weight = integer_matrix((N, K), K, generator)
            pack = torch.full((_C.pack_numel(K, N, name),), float("nan"))
            _C.pack(pack, weight.t(), name)
            panels = pack.view(-1, K, nr).permute(0, 2, 1).reshape(-1, K)
            assert torch.equal(panels[:N], weight) and bool((panels[N:] == 0).all()), (N, K)
            bias = integer_matrix((N,), 1, generator)
            for M in (1, kernel["mr"], 2 * kernel["mr"] + 1):
                x = integer_matrix((M, K), K, generator)
                out = GuardedOutput((M, N))
                _C.linear_packed(out.view, x, pack, bias, N, name)
                assert torch.equal(out.view, exact_product(x, weight.t()) + bias), (M, N, K)
                out.assert_guards_intact()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_pack_in_every_layout(kernel, layout, generator):
    name, nr = kernel["name"], kernel["nr"]
    if kernel["kind"] != "tile":
        pytest.skip("frozen packs are laid out for tile kernels")
    for N in tails(nr):
        b = testing.LAYOUTS[layout](integer_matrix((19, N), 1, generator))
        pack = torch.full((_C.pack_numel(19, N, name),), float("nan"))
        _C.pack(pack, b, name)
        panels = pack.view(-1, 19, nr).permute(0, 2, 1).reshape(-1, 19)
        assert torch.equal(panels[:N], b.t()) and bool((panels[N:] == 0).all()), N


def test_frozen_pack_kernel_is_a_row_of_the_table():
    rows = {row["name"]: row for row in _C.kernels("gemm")}
    assert rows[_C.pack_kernel()]["available"] and rows[_C.pack_kernel()]["kind"] == "tile"


def test_forced_kernel_is_the_one_that_runs(kernel, generator):
    a, b = integer_matrix((20, 30), 30, generator), integer_matrix((40, 30), 30, generator).t()
    _C.reset_counters()
    _C.gemm(torch.empty(20, 40), a, b, kernel=kernel["name"])
    _C.linear(torch.empty(20, 40), a, b.t(), kernel=kernel["name"])
    assert {name: n for name, n in _C.counters().items() if n} == {kernel["name"]: 2}


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sum_rows(layout, threads, generator):
    for shape in ((1, 1), (1, 70), (300, 1), (33, 17), (2, 5, 16), (1000, 259), (4, 300, 259)):
        x = testing.LAYOUTS[layout](integer_matrix(shape, 2000, generator))
        out = GuardedOutput((1, shape[-1]))
        _C.sum_rows(out.view[0], x, threads=threads)
        assert torch.equal(out.view[0], x.double().flatten(0, -2).sum(0).float()), shape
        out.assert_guards_intact()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 0)])
def test_sum_rows_of_nothing_is_zero(shape):
    out = torch.full((shape[-1],), float("nan"))
    _C.sum_rows(out, torch.empty(shape))
    assert torch.equal(out, torch.zeros(shape[-1]))


WGRAD_SHAPES = [((), 5, 7), ((1,), 33, 17), ((40,), 33, 17), ((2, 9), 1, 30), ((3, 4, 5), 30, 1), ((700,), 70, 130)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lead, N, K", WGRAD_SHAPES, ids=str)
def test_linear_wgrad(lead, N, K, threads, generator):
    """Contracted over all leading dimensions, also where they do not merge into rows of one stride."""
    for permute in (False, True):
        grad = integer_matrix((*lead, N), 700, generator)
        x = integer_matrix((*lead, K), 700, generator)
        if permute and len(lead) > 1:
            grad, x = grad.transpose(0, len(lead) - 1), x.transpose(0, len(lead) - 1)
        out = GuardedOutput((N, K))
        _C.linear_wgrad(out.view, grad, x, threads=threads)
        rows = grad.reshape(-1, N).double(), x.reshape(-1, K).double()
        assert torch.equal(out.view, (rows[0].t() @ rows[1]).float())
        out.assert_guards_intact()


@pytest.mark.parametrize("x_layout", testing.LAYOUTS)
@pytest.mark.parametrize("grad_layout", testing.LAYOUTS)
def test_linear_wgrad_layouts(grad_layout, x_layout, generator):
    grad = testing.LAYOUTS[grad_layout](integer_matrix((2, 21, 37), 42, generator))
    x = testing.LAYOUTS[x_layout](integer_matrix((2, 21, 35), 42, generator))
    out = GuardedOutput((37, 35))
    _C.linear_wgrad(out.view, grad, x)
    rows = grad.reshape(-1, 37).double(), x.reshape(-1, 35).double()
    assert torch.equal(out.view, (rows[0].t() @ rows[1]).float())
    out.assert_guards_intact()


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_linear_wgrad_of_nothing_is_zero(lead):
    out = torch.full((4, 5), float("nan"))
    _C.linear_wgrad(out, torch.empty(*lead, 4), torch.empty(*lead, 5))
    assert torch.equal(out, torch.zeros(4, 5))
