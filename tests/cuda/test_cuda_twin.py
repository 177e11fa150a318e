"""The host twin itself: bugs of the kinds that GPUs have are caught, and instructions do what the PTX manual says."""

import pytest
import torch

twin = pytest.importorskip("fastdl._twin", reason="built without FASTDL_TWIN", exc_type=ImportError)

SEEDS = range(1, 13)
ERRORS = {  # what the twin says; the others show in the result
    "lanes_apart": "different instructions",
    "not_all_at_the_barrier": "deadlock",
    "spins_for_ever": "nothing but spinning",
    "unaligned_matrix_row": "unaligned row",
    "copy_past_shared_memory": "not in shared memory",
}


@pytest.fixture(autouse=True)
def seed_afterwards():
    yield
    twin.set_seed(0)


def reverse(name, planted, seed):
    """The result of a kernel that reverses 64 numbers."""
    x, out = torch.arange(64, dtype=torch.float32), torch.full((64,), float("nan"))
    twin.set_seed(seed)
    twin.run_fault(name, planted, x, out)
    return out


def right(out):
    return torch.equal(out, torch.arange(63, -1, -1, dtype=torch.float32))


@pytest.mark.sanitized
@pytest.mark.parametrize("name", twin.fault_names())
def test_without_the_bug_every_order_gives_the_result(name):
    assert all(right(reverse(name, False, seed)) for seed in (0, *SEEDS))


@pytest.mark.parametrize("name", [n for n in twin.fault_names() if n not in ERRORS])
def test_a_race_shows_in_most_orders(name):
    assert sum(not right(reverse(name, True, seed)) for seed in SEEDS) >= 10


@pytest.mark.parametrize("name", ERRORS)
def test_what_would_hang_or_fault_is_an_error(name):
    for seed in (0, *SEEDS):
        with pytest.raises(RuntimeError, match=ERRORS[name]):
            reverse(name, True, seed)


def test_an_error_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="deadlock"):
        reverse("not_all_at_the_barrier", True, 3)
    assert right(reverse("missing_barrier", False, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("k", [16, 48])
def test_products_of_integers_are_exact(dtype, k):
    a, b = (torch.randint(-9, 10, (n, k)).to(dtype) for n in (16, 8))
    for seed in (0, 1, 2):
        out = torch.full((16, 8), float("nan"))
        twin.set_seed(seed)
        twin.mma_probe(a, b, out)
        assert torch.equal(out, a.float() @ b.float().T)


def test_sums_are_truncated_as_tensor_cores_do():
    """1 + 2^-24 + ... in one product loses what rounding to nearest would keep; each result is at or below the sum."""
    a = torch.rand(16, 256).to(torch.bfloat16)
    b = torch.rand(8, 256).to(torch.bfloat16)
    out = torch.empty(16, 8)
    twin.mma_probe(a, b, out)
    error = out.double() - a.double() @ b.double().T
    assert bool((error <= 0).all()) and bool((error < 0).any())
    assert bool((error.abs() <= 16 * 2.0**-23 * 256).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_special_values_go_through(dtype):
    a, b = torch.ones(16, 16, dtype=dtype), torch.ones(8, 16, dtype=dtype)
    a[3, 5], a[4, 0], b[2, 7] = float("nan"), float("inf"), float("-inf")
    out = torch.empty(16, 8)
    twin.mma_probe(a, b, out)
    assert torch.equal(out.isnan(), (a.float() @ b.float().T).isnan())
    assert torch.equal(out.isinf(), (a.float() @ b.float().T).isinf())


@pytest.mark.parametrize(
    ("shape", "good"),
    [((1, 1, 1, 32, 0), True), ((2, 3, 1, 64, 227 << 10), True), ((0, 1, 1, 32, 0), False),
     ((1, 65536, 1, 32, 0), False), ((1, 1, 65536, 32, 0), False), ((1, 1, 1, 1056, 0), False),
     ((1, 1, 1, 33, 0), False), ((1, 1, 1, 0, 0), False), ((1, 1, 1, 32, (227 << 10) + 1), False)],
)  # fmt: skip
def test_launches_that_no_gpu_takes_are_refused(shape, good):
    if good:
        return twin.try_launch(*shape)
    with pytest.raises(RuntimeError, match=r"CUDA: launch of a kernel: no GPU takes a grid of"):
        twin.try_launch(*shape)
