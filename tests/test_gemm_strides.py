"""Every layout torch produces, read in place: exact results, guard bands, no access outside, no copies."""

import itertools
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DTYPES, b_for, exact_product, layout_pairs, takes
from fastdl import _C, functional, testing
from fastdl.testing import LAYOUTS, GuardedOutput, integer_matrix


def test_every_pair_of_layouts(kernel, integers, guarded):
    mr, nr = kernel["mr"], kernel["nr"]
    pairs = layout_pairs(kernel)
    assert len(pairs) == (len(LAYOUTS) ** 2 if kernel["kind"] == "tile" else 25)
    for a_layout, b_layout in pairs:
        for M, N, K in [(2 * mr + 1, nr + 3, 37), (1, 2 * nr, 16), (mr, 5, 3), (3, 1, 50), (70, 1, 9)]:
            a = LAYOUTS[a_layout](integers((M, K), K))
            b = LAYOUTS[b_layout](integers((K, N), K))
            out = guarded((M, N), row_gap=5 if N > 1 else 0)  # a dense column is computed as a row
            _C.gemm(out.view, a, b, kernel=kernel["name"], threads=2)
            assert torch.equal(out.view, exact_product(a, b)), (a_layout, b_layout, M, N, K)
            out.assert_guards_intact()


@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_every_pair_of_layouts_by_default(a_layout, generator):
    """No kernel forced: whatever the plan chooses takes every layout."""
    for b_layout, (M, N, K) in itertools.product(LAYOUTS, [(37, 70, 130), (1, 70, 65), (33, 1, 65), (4, 3, 500)]):
        a = LAYOUTS[a_layout](integer_matrix((M, K), K, generator))
        b = LAYOUTS[b_layout](integer_matrix((K, N), K, generator))
        out = GuardedOutput((M, N), row_gap=5 if N > 1 else 0)
        _C.gemm(out.view, a, b)
        assert torch.equal(out.view, exact_product(a, b)), (b_layout, M, N, K)
        out.assert_guards_intact()


@pytest.mark.rows(kind="dot")
def test_dot_kernels_refuse_other_layouts(kernel, integers):
    rows, columns, square = integers((5, 7), 1), integers((7, 5), 1).mT, integers((5, 5), 1)
    out = torch.empty(5, 7, dtype=rows.dtype)
    with pytest.raises(RuntimeError, match=rf"gemm.*{kernel['name']}.*contiguous along K"):
        _C.gemm(out[:, :5].clone(), columns, columns.mT, kernel=kernel["name"])
    with pytest.raises(RuntimeError, match=rf"gemm.*{kernel['name']}.*contiguous along K"):
        _C.gemm(out, square, rows, kernel=kernel["name"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_layouts(kernel, layout, integers, guarded):
    x = LAYOUTS[layout](integers((3, 19, 45), 45))
    weight = LAYOUTS[layout](integers((33, 45), 45))
    if not takes(kernel, x, weight.mT):
        pytest.skip("not contiguous along K")
    bias = integers((66,), 1)[::2]
    out = guarded((3, 19, 33))
    _C.linear(out.view, x, weight, bias, kernel=kernel["name"])
    assert torch.equal(out.view, exact_product(x, weight.mT, bias))
    out.assert_guards_intact()
    permuted = x.movedim(0, 1)  # leading dimensions that do not merge into one stride
    out = guarded((19, 3, 33))
    _C.linear(out.view, permuted, weight, bias, kernel=kernel["name"])
    assert torch.equal(out.view, exact_product(permuted, weight.mT, bias))
    out.assert_guards_intact()


@pytest.mark.parametrize("stride", [0, 1, 3], ids="stride{}".format)
def test_bias_strides(kernel, stride, integers, guarded):
    a, b = integers((9, 20), 20), b_for(kernel, integers((20, 70), 20))
    bias = integers((300,), 1).as_strided((70,), (stride,), 1)
    out = guarded((9, 70))
    _C.gemm(out.view, a, b, bias, kernel=kernel["name"])
    assert torch.equal(out.view, exact_product(a, b, bias))
    out.assert_guards_intact()


@pytest.mark.parametrize("batch_a, batch_b", list(testing.broadcast_batches()), ids=str)
def test_batches(kernel, batch_a, batch_b, integers, guarded):
    batch = torch.broadcast_shapes(batch_a, batch_b)
    pairs = layout_pairs(kernel, ("contiguous", "transposed", "both_strided", "expanded_rows"))
    K = 19
    for (a_layout, b_layout), (M, N) in itertools.product(
        pairs, [(kernel["mr"] + 2, kernel["nr"] + 1), (9, 1), (1, 9)]
    ):
        a = LAYOUTS[a_layout](integers((*batch_a, M, K), K))
        b = LAYOUTS[b_layout](integers((*batch_b, K, N), K))
        bias = integers((N,), 1)
        for threads, accumulate in ((1, False), (2, True)):
            out = guarded((*batch, M, N), row_gap=5 if N > 1 else 0, fill=5.0 if accumulate else float("nan"))
            _C.gemm(out.view, a, b, bias, accumulate, kernel=kernel["name"], threads=threads)
            expected = exact_product(a, b, bias, torch.tensor(5 if accumulate else 0))
            assert torch.equal(out.view, expected), (a_layout, b_layout, M, N)
            out.assert_guards_intact()


def test_batch_dimensions_expanded_permuted_and_gapped(kernel, integers):
    """Batch strides that no single stride describes, on inputs and output alike."""
    K = 21
    a = integers((4, 3, 6, K), K)[::2].movedim(0, 1)  # [3, 2, 6, K]
    b = b_for(kernel, integers((1, 2, K, 18), K)).expand(3, 2, K, 18)
    out = torch.full((2, 5, 3, 6, 30), testing.GUARD, dtype=a.dtype)
    view = out[:, 1].movedim(0, 1)[..., 4:22]  # [3, 2, 6, 18]
    _C.gemm(view, a, b, kernel=kernel["name"], threads=2)
    assert torch.equal(view, exact_product(a, b))
    view.fill_(testing.GUARD)
    assert bool((out == torch.tensor(testing.GUARD, dtype=a.dtype)).all())


def test_more_batch_dimensions_than_the_kernels_loop_over(generator):
    """Ten, none of which merges with its neighbour: torch has no limit either."""
    line = integer_matrix((2000,), 3, generator)
    a = line.as_strided((2,) * 10 + (2, 3), (*range(1, 11), 5, 7))
    b = line.as_strided((2,) * 10 + (3, 2), (*range(10, 0, -1), 3, 11), 5)
    assert torch.equal(functional.matmul(a, b), exact_product(a, b))
    weight = integer_matrix((4, 3), 3, generator)
    assert torch.equal(functional.linear(a, weight), exact_product(a, weight.t()))


# --- nothing outside the operands is touched, nothing is copied -------------------------------------------------------
def test_guard_pages(kernel, run_python):
    """Operands that end, or begin, at a page that may not be accessed: a stray access kills the process."""
    run_python("guard_pages.py", kernel["name"])


def test_guard_pages_do_kill(run_python):
    run_python("guard_pages.py", "--touch", status=-signal.SIGSEGV)


def test_peak_memory(run_python):
    """Output plus the plan's workspace, in every stride case: no operand is copied whole."""
    report = run_python("peak_memory.py", timeout=120)
    if report.startswith("SKIP"):
        pytest.skip(report)


# --- random problems --------------------------------------------------------------------------------------------------
@st.composite
def strided_matrix(draw, rows, cols, batch):
    """An integer matrix [*batch, rows, cols]: any order of dimensions, gaps, offset, dimensions of stride 0."""
    shape = (*batch, rows, cols)
    expanded = [draw(st.integers(0, 5)) == 0 for _ in shape]
    strides, extent = [0] * len(shape), 1
    for d in draw(st.permutations(range(len(shape)))):
        if not expanded[d]:
            strides[d] = extent * draw(st.integers(1, 3))
            extent = strides[d] * max(shape[d], 1) + draw(st.integers(0, 2))
    offset = draw(st.integers(0, 17))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return integer_matrix((offset + extent,), 100, seed).as_strided(shape, strides, offset)


@st.composite
def problems(draw):
    M, N, K = draw(st.integers(0, 40)), draw(st.integers(0, 80)), draw(st.integers(0, 100))
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    a = draw(strided_matrix(M, K, tuple(n if draw(st.booleans()) else 1 for n in batch)))
    b = draw(strided_matrix(K, N, tuple(n if draw(st.booleans()) else 1 for n in batch)))
    bias = integer_matrix((N,), 1) if draw(st.booleans()) else None
    gap = draw(st.integers(0, 9))
    return a, b, bias, batch, gap, draw(st.booleans()), draw(st.sampled_from([1, 2, 3]))


def in_dtype(x, dtype):
    """x with the same strides in another dtype."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(problem=problems())
def test_random_problems(kernel, problem):
    *operands, batch, gap, accumulate, threads = problem
    a, b, bias = (None if x is None else in_dtype(x, DTYPES[kernel["dtype"]]) for x in operands)
    if kernel["kind"] == "dot":
        a, b = LAYOUTS["contiguous"](a), b_for(kernel, b)
    fill = 4.0 if accumulate else float("nan")
    out = GuardedOutput((*batch, a.shape[-2], b.shape[-1]), row_gap=gap, fill=fill, dtype=a.dtype)
    _C.gemm(out.view, a, b, bias, accumulate, kernel=kernel["name"], threads=threads)
    expected = exact_product(a, b, *([] if bias is None else [bias]), torch.tensor(4 if accumulate else 0))
    assert torch.equal(out.view, expected.expand(out.shape))
    out.assert_guards_intact()


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(problem=problems())
def test_random_problems_through_functional(problem):
    a, b, bias, *_ = problem
    assert torch.equal(functional.matmul(a, b), exact_product(a, b))
    weight = b.mT[(0,) * (b.dim() - 2)]
    assert torch.equal(functional.linear(a, weight, bias), exact_product(a, weight.mT) + (0 if bias is None else bias))
